"""Products, sharing, sines, gates and blocks, dense and by loops."""

from math import floor, sqrt

import numpy as np
from reference import Reference


def scale(o):
    return 1.0 if o.get("alpha") is None else o["alpha"] / o["rank"]


def pair(m, n, o):
    return o["rank"] * (m + n)


def abba(w, f, o):
    s = 8.0 if o.get("alpha") is None else o["alpha"] / sqrt(o["rank"] * o["rank"])
    first, second = np.einsum("ik,kj->ij", f["b1"], f["a1"]), np.einsum("ik,kj->ij", f["b2"], f["a2"])
    return w + s * first * second


def sine(w, f, o):
    return w + scale(o) * np.sin(o["frequency"] * np.einsum("ik,kj->ij", f["b"], f["a"])) / sqrt(w.shape[1])


def side(m, n, o):
    h = floor(sqrt((m + n) * o["rank"]) + 0.5)
    return h // 2 * 2 if o["kind"] == "rope" else h


def square(f, x, o, m):
    """MoRA of one vector x, as its equations 6 to 9 have it: compress, M, decompress."""
    h, n, matrix = len(f["m"]), len(x), f["m"]
    assert h == side(m, n, o)
    blocks = [[x[(j * h + i) % n] for i in range(h)] for j in range(-(-n // h))]
    if o["kind"] == "sharing":
        y = matrix @ np.sum(blocks, axis=0)
        return [y[i % h] for i in range(m)]
    y = []
    for j, block in enumerate(blocks):
        z = np.array(block[: h // 2]) + 1j * np.array(block[h // 2 :])
        z = z * np.exp(1j * j * 10000.0 ** (-2 * np.arange(h // 2) / h))
        y += list(matrix @ np.concatenate([z.real, z.imag]))
    return [y[i % len(y)] for i in range(m)]


def mora(w, f, o):
    return w + np.array([square(f, unit, o, len(w)) for unit in np.eye(w.shape[1])]).T


def blockwise(w, k, block):
    """W and a grid of blocks, block (i, j) given."""
    rows, cols = np.split(np.arange(w.shape[0]), k), np.split(np.arange(w.shape[1]), k)
    out = w.copy()
    for i in range(k):
        for j in range(k):
            out[np.ix_(rows[i], cols[j])] += block(i, j)
    return out


def melora(w, f, o):
    return blockwise(w, o["blocks"], lambda i, j: scale(o) * f["b"][i] @ f["a"][i] if i == j else 0)


def bora(w, f, o):
    return blockwise(w, o["blocks"], lambda i, j: scale(o) * f["b"][i] @ np.diag(f["e"][i, j]) @ f["a"][j])


def grid(w, f, s, k):
    def block(i, j):
        r = f["a"].shape[1] // k
        return s * f["b"][i][:, j * r : j * r + r] @ f["a"][j][i * r : i * r + r]

    return blockwise(w, k, block)


def gralora(w, f, o):
    out = grid(w, f, scale(o), o["blocks"])
    return out + scale(o) * f["whole_b"] @ f["whole_a"] if o["hybrid"] else out


def glora(w, f, o):
    def part(name, kind):
        if kind == "none":
            return 0.0
        return np.einsum("ik,kj->ij", f[f"{name}_b"], f[f"{name}_a"]) if kind == "lora" else f[f"{name}_x"]

    return w + w * part("gate", o["gate"]) + part("update", o["update"])


def of_glora(m, n, o):
    size = {"lora": o["rank"] * (m + n), "vector": m, "constant": 1, "none": 0}
    return size[o["gate"]] + size[o["update"]]


def prolora(w, f, o):
    def entry(chunk, k, where, rank):
        """Of the repeated chunk (places, ranks), at a place of the whole."""
        size, r = chunk.shape
        return chunk[where % size, (rank - where // size * max(r // k, 1)) % r]

    (m, n), u = w.shape, o["unshared"]
    b = [[entry(f["b"], o["shares_out"], i, k) for k in range(o["rank"] - u)] for i in range(m)]
    a = [[entry(f["a"].T, o["shares_in"], j, k) for k in range(o["rank"] - u)] for j in range(n)]
    own = f["own_b"] @ f["own_a"] if u else 0.0
    return w + scale(o) * (np.array(b) @ np.array(a).T + own)


def of_prolora(m, n, o):
    u = o["unshared"]
    return u * (m + n) + (o["rank"] - u) * (m // o["shares_out"] + n // o["shares_in"])


REFERENCES = {
    "abba": Reference(
        abba, lambda m, n, o: 2 * pair(m, n, o), "Singhal et al. 2025, arXiv 2505.14238, eq. 7",
        {"rank": 3}, ({"rank": 2, "alpha": 5.0},),
    ),
    "mora": Reference(
        mora, lambda m, n, o: side(m, n, o) ** 2, "Jiang et al. 2024, arXiv 2405.12130, eq. 6 and 9 (and its code)",
        {"rank": 3}, ({"rank": 3, "kind": "sharing"}, {"rank": 1, "kind": "sharing"}, {"rank": 1}),
    ),
    "sinelora": Reference(
        sine, pair, "Ji et al. 2024, arXiv 2403.19243, eq. 3, as its code has it", {"rank": 3},
        ({"rank": 2, "alpha": 3.0, "frequency": 7.0},),
    ),
    "melora": Reference(
        melora, pair, "Ren et al. 2024, arXiv 2402.17263", {"rank": 2}, ({"rank": 1, "blocks": 8, "alpha": 3.0},)
    ),
    "bora": Reference(
        bora, lambda m, n, o: pair(m, n, o) + o["blocks"] ** 2 * o["rank"],
        "Li et al. 2025, arXiv 2508.06953, section 3.2, the diagonals themselves trained", {"rank": 3},
        ({"rank": 2, "blocks": 2, "alpha": 3.0},),
    ),
    "gralora": Reference(
        gralora, lambda m, n, o: (o["rank"] + o["hybrid"]) * (m + n),
        "Jung et al. 2025, arXiv 2505.20355, eq. 5 (and PEFT)", {"rank": 4},
        ({"rank": 8, "blocks": 4, "alpha": 3.0}, {"rank": 4, "hybrid": 2}),
    ),
    "localized": Reference(
        lambda w, f, o: grid(w, f, scale(o), o["blocks"]), lambda m, n, o: o["blocks"] * pair(m, n, o),
        "Barazandeh et al. 2025, arXiv 2506.00236", {"rank": 1}, ({"rank": 2, "blocks": 2, "alpha": 3.0},),
    ),
    "glora": Reference(
        glora, of_glora, "Chavan et al. 2023, arXiv 2306.07967, eq. 10, as its code has it, without the bias",
        {"rank": 3},
        ({"gate": "vector", "update": "constant"}, {"gate": "constant", "update": "vector"},
         {"gate": "none", "rank": 2}, {"update": "none"}),
    ),
    "prolora": Reference(
        prolora, of_prolora, "Wang et al. 2024, arXiv 2402.16902, equation 4", {"rank": 8},
        ({"rank": 5, "unshared": 0, "shares_out": 4, "shares_in": 8}, {"rank": 6, "unshared": 1, "alpha": 3.0}),
    ),
}  # fmt: skip
