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


def blocks(m, n):
    """Rows and columns of square blocks, and the sides of one; one block where the sides do not divide."""
    small = min(m, n)
    return (m // small, n // small, small, small) if max(m, n) % small == 0 else (1, 1, m, n)


def fact(w, f, o, core):
    """Block by block: s V core(i, j) U."""
    (m, n), new = w.shape, w.copy()
    rows, cols, height, width = blocks(m, n)
    for i in range(rows):
        for j in range(cols):
            found = o["alpha"] * f["v"] @ core(i, j) @ f["u"]
            new[i * height : (i + 1) * height, j * width : (j + 1) * width] += found
    return new


def fact_tt(w, f, o):
    r = o["rank"]
    return fact(w, f, o, lambda i, j: f["s"][i * r : (i + 1) * r, j * r : (j + 1) * r])


def fact_tk(w, f, o):
    return fact(w, f, o, lambda i, j: sum(p * slice_ for p, slice_ in zip(f["mix"][i, j], f["c"], strict=True)))


def fact_count(m, n, r, own):
    rows, cols, height, width = blocks(m, n)
    return r * (height + width) + rows * cols * own


def lorta(w, f, o):
    """Head by head, entry by entry of the diagonal."""
    new, heads = w.copy(), f["head"].shape[0]
    rows = w.shape[0] // heads
    for h in range(heads):
        for t in range(o["rank"]):
            weight = o["alpha"] * f["head"][h, t] * f["layer"][0, t] * f["role"][0, t]
            new[h * rows : (h + 1) * rows] += weight * np.outer(f["b"][:, t], f["a"][t])
    return new


def largest(m, most):
    return max(h for h in range(1, most + 1) if m % h == 0)


def lorta_count(m, n, o):
    h = largest(m, o["heads"])
    return o["rank"] * (n + m // h + h + 2)


def cara(w, f, o):
    """Entries of the CP tensor of four modes, or those of three unfolded into blocks."""
    new, (m, n) = w.copy(), w.shape
    if "k" in f:
        tensor = np.einsum("r,kr,er,hr,dr->kehd", f["weight"], f["k"], f["a2"], f["a3"], f["a4"])
        return w + o["alpha"] * tensor[0].reshape(n, m).T
    key = "k_rows" if m >= n else "k_cols"
    tensor = np.einsum("r,kr,ar,br->kab", f["weight"], f[key], f["p2"], f["p3"]).reshape(max(m, n), min(m, n))
    return new + o["alpha"] * (tensor if m >= n else tensor.T)


def cara_count(m, n, o):
    rows, cols, height, width = blocks(m, n)
    if "0" in o["attention"]:  # the name of the layer
        h = largest(m, o["heads"])
        return o["rank"] * (1 + n + h + m // h + 1)
    return o["rank"] * (rows * cols + height + width + 1)


def metatt(w, f, o):
    new, heads = w.copy(), f["head"].shape[0] if "head" in f else 1
    task = sum(c * core for c, core in zip(f["chosen"], f["task"], strict=True)) if "task" in f else np.eye(o["rank"])
    rows = w.shape[0] // heads
    for h in range(heads):
        head = f["head"][h] if "head" in f else np.eye(o["rank"])
        chain = np.linalg.multi_dot([f["b"], head, f["role"][0], task, f["layer"][0], f["a"]])
        new[h * rows : (h + 1) * rows] += o["alpha"] * chain
    return new


def metatt_count(m, n, o):
    h = largest(m, o["heads"]) if o["heads"] else 0
    r = o["rank"]
    return r * (n + (m // h if h else m)) + r * r * (2 + h + (o["tasks"] or 0))


REFERENCES = {
    "tt_lora": Reference(
        tt_lora, tt_count, "Anjum et al. 2024, arXiv 2408.01008: forward of its code",
        {"rank": 3}, ({"rank": 2, "alpha": 4.0, "out_modes": 1},),
    ),
    "loretta": Reference(
        loretta, loretta_count, "Yang et al. 2024, arXiv 2402.11417, eq. 2 and 4: loretta_rep.py of its code",
        {"rank": 4, "bond": 3}, ({"rank": 2, "bond": 3, "alpha": 5.0, "in_modes": 1},),
    ),
    "quanta": Reference(
        quanta, quanta_count, "Chen et al. 2024, arXiv 2406.00132, eq. 8; code read",
        {"modes": 3}, ({"modes": 2}, {"modes": 4}, {"modes": (3, 3, 4)}),
    ),
    "fact_tt": Reference(
        fact_tt, lambda m, n, o: fact_count(m, n, o["rank"], o["rank"] ** 2),
        "Jie and Deng 2022, arXiv 2212.03145: fact_tt.py of its code", {"rank": 3}, ({"rank": 2, "alpha": 10.0},),
    ),
    "fact_tk": Reference(
        fact_tk, lambda m, n, o: fact_count(m, n, o["rank"], o["rank"]) + o["rank"] ** 3,
        "Jie and Deng 2022, arXiv 2212.03145: fact_tk.py of its code", {"rank": 3}, ({"rank": 2, "alpha": 10.0},),
    ),
    "lotr": Reference(
        lambda w, f, o: w + (o["alpha"] or o["rank"]) / o["rank"] * np.einsum("ia,ab,bj->ij", f["l"], f["m"], f["r"]),
        lambda m, n, o: o["rank"] * (m + n + o["rank"]),
        "Bershatsky et al. 2024, arXiv 2402.01376: lotr.py of its code",
        {"rank": 3}, ({"rank": 2, "alpha": 6.0},),
    ),
    "lorta": Reference(
        lorta, lorta_count, "Hounie et al. 2024, arXiv 2410.04060: model.py of its code", {"rank": 3},
        ({"rank": 2, "alpha": 3.0, "heads": 3},),
    ),
    "cara": Reference(
        cara, cara_count, "Veeramacheneni et al. 2025, ICML: cara.py of its code", {"rank": 3, "attention": ()},
        ({"rank": 3, "heads": 4, "attention": ("0",)},),
    ),
    "metatt": Reference(
        metatt, metatt_count, "Lopez-Piqueres et al. 2025, arXiv 2506.09105: as cited by others, not read", {"rank": 3},
        ({"rank": 2, "alpha": 2.0, "heads": 4}, {"rank": 2, "heads": 4, "tasks": 3}),
    ),
}  # fmt: skip
