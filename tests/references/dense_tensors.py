"""Tensor formats, dense: every entry by a loop over its indices."""

from itertools import combinations, product
from math import prod

import numpy as np
from reference import Reference


def cores(f, side, modes, rank, ends):
    """The cores of one side with three dims, from the matrices in which they are held."""
    inner = [rank] * (len(modes) - 1)
    bonds = [ends[0], *inner, ends[1]]
    return [f[f"{side}{i}"].reshape(bonds[i], n, bonds[i + 1]) for i, n in enumerate(modes)]


def train(found):
    """The tensor of a train, entry by entry as a product of matrices."""
    modes = [core.shape[1] for core in found]
    tensor = np.empty(modes)
    for at in np.ndindex(*modes):
        entry = np.eye(1)
        for core, i in zip(found, at, strict=True):
            entry = entry @ core[:, i]
        tensor[at] = entry[0, 0]
    return tensor


MODES = {16: (2, 2, 4), 24: (2, 3, 4), 32: (2, 4, 4)}  # three balanced ones


def modes(size, asked):
    return MODES[size] if asked == 3 else (size,) if asked == 1 else asked


def tt_lora(w, f, o):
    r, (m, n) = o["rank"], w.shape
    left = cores(f, "out", modes(m, o["out_modes"]), r, (1, r))
    right = cores(f, "in", modes(n, o["in_modes"]), r, (r, 1))
    return w + o["alpha"] * train([*left, *right]).reshape(m, n)


def tt_count(m, n, o):
    rows, r = [*modes(m, o["out_modes"]), *modes(n, o["in_modes"])], o["rank"]
    bonds = [1, *[r] * (len(rows) - 1), 1]
    return sum(bonds[i] * k * bonds[i + 1] for i, k in enumerate(rows))


def loretta(w, f, o):
    r, bond, (m, n) = o["rank"], o["bond"], w.shape
    left = cores(f, "out", modes(m, o["out_modes"]), bond, (1, bond))
    right = cores(f, "in", modes(n, o["in_modes"]), bond, (bond, 1))
    b = train([*left, f["b"].reshape(bond, r, 1)]).reshape(m, r)
    a = train([f["a"].reshape(1, r, bond), *right]).reshape(r, n)
    return w + (o["alpha"] or r) / r * np.einsum("ik,kj->ij", b, a)


def loretta_count(m, n, o):
    r, bond = o["rank"], o["bond"]
    sides = [[*modes(m, o["out_modes"]), r], [r, *modes(n, o["in_modes"])]]
    bonds = [[1, *[bond] * (len(side) - 1), 1] for side in sides]
    return sum(k * b[i] * b[i + 1] for side, b in zip(sides, bonds, strict=True) for i, k in enumerate(side))


EVEN = {(24, 3): (2, 3, 4), (32, 3): (2, 4, 4), (24, 2): (4, 6), (32, 2): (4, 8), (24, 4): (2, 2, 2, 3)}
EVEN |= {(32, 4): (2, 2, 2, 4)}


def gates(d):
    """Pairs of axes in the order in which their gates act: the last axis with each one before it, and so on."""
    return [(d + two, d + one) for one, two in combinations(range(-1, -d - 1, -1), 2)]


def axes_of(m, n, o):
    return EVEN[max(m, n), o["modes"]] if isinstance(o["modes"], int) else o["modes"]


def circuit(f, prefix, d, m, n):
    """T as a matrix: each gate as a matrix over all axes, entry by entry, then the corner of their product."""
    size = prod(d)
    found, where = np.eye(size), list(product(*map(range, d)))
    for k, (i, j) in enumerate(gates(len(d))):
        gate, whole = f[f"{prefix}gate{k}"], np.zeros((size, size))
        for row, at in enumerate(where):
            for col, to in enumerate(where):
                if all(at[a] == to[a] for a in range(len(d)) if a not in (i, j)):
                    whole[row, col] = gate[at[i] * d[j] + at[j], to[i] * d[j] + to[j]]
        found = whole @ found
    return found[:m, :n]


def quanta(w, f, o):
    d, (m, n) = axes_of(*w.shape, o), w.shape
    return w + circuit(f, "", d, m, n) - circuit(f, "anchor_", d, m, n)


def quanta_count(m, n, o):
    d = axes_of(m, n, o)
    return sum((d[i] * d[j]) ** 2 for i, j in combinations(range(len(d)), 2))


REFERENCES = {
    "tt_lora": Reference(
        tt_lora, tt_count, "Anjum et al. 2024, arXiv 2408.01008: forward of its code",
        {"rank": 3}, ({"rank": 2, "alpha": 4.0, "out_modes": 1},),
    ),
    "loretta": Reference(
        loretta, loretta_count, "Yang et al. 2024, arXiv 2402.11417: loretta_rep.py of its code",
        {"rank": 4, "bond": 3}, ({"rank": 2, "bond": 3, "alpha": 5.0, "in_modes": 1},),
    ),
    "quanta": Reference(
        quanta, quanta_count, "Chen et al. 2024, arXiv 2406.00132: quanta.py of its code",
        {"modes": 3}, ({"modes": 2}, {"modes": 4}, {"modes": (3, 3, 4)}),
    ),
}  # fmt: skip
