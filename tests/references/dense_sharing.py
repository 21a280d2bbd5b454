"""Methods whose layers share factors, one layer at a time, dense."""

import numpy as np
from reference import Reference


def four(w, f, o):
    s = 1.0 if "start_u" in o or o.get("alpha") is None else o["alpha"] / o["rank"]
    rows, cols = w.shape
    return w + s * np.diag(f["v"]) @ f["b"][:rows] @ np.diag(f["u"]) @ f["a"][:, :cols]


def mean(w, f, o):
    half = {**f, "a": f["a"][: o["rank"]], "u": f["u"][: o["rank"]]}
    return four(w, half, o)


def rasa(w, f, o):
    b, a = np.hstack([f["b"], f["b_s"]]), np.vstack([f["a"], f["a_s"]])
    return w + b @ np.diag(np.concatenate([f["e"], f["e_s"]])) @ a


def three_pairs(w, f, o):
    found = w.copy()
    for suffix in ("", "_i", "_g"):
        b, a = f[f"b{suffix}"], f[f"a{suffix}"]
        top, left = (len(b) - w.shape[0]) // 2, (a.shape[1] - w.shape[1]) // 2
        found += o["strength"] * b[top : top + w.shape[0]] @ a[:, left : left + w.shape[1]]
    return found


def bank(w, f, o):
    """One number after another."""

    def piece(logits):
        best = np.argsort(-logits)[: o["topk"]]
        share = np.exp(logits[best]) / np.exp(logits[best]).sum()
        return sum(s * f["bank"][i] for s, i in zip(share, best, strict=True))

    a = np.array([np.concatenate([piece(x) for x in row]) for row in f["logits_a"]])
    b = np.array([np.concatenate([piece(x) for x in column]) for column in f["logits_b"].swapaxes(0, 1)]).T
    return w + b @ a


def bases(w, f, o):
    s = 20.0 if o["alpha"] is None else o["alpha"] / o["rank"]
    wide = w.shape[1] > w.shape[0]
    g = f["g_out"] if wide else f["g_in"]
    delta = sum(f["basis_b"][:, i] @ np.diag(f["l"][i]) @ f["basis_a"] @ np.diag(g[i]) for i in range(len(g)))
    return w + s * (delta.T if wide else delta)


def projected(w, f, o):
    """By the projection P (D, d) itself, of which no two columns overlap."""
    index = np.concatenate([f["index_a"].ravel(), f["index_b"].ravel()])
    p = np.zeros((len(index), o["size"]))
    p[np.arange(len(index)), index] = 1
    counts = p.sum(0)
    p /= np.sqrt(np.maximum(counts, 1))
    assert np.allclose(p.T @ p, np.diag(counts > 0))
    a, b = np.split(p @ f["theta"], [o["rank"] * w.shape[1]])
    return w + b.reshape(-1, o["rank"]) @ a.reshape(o["rank"], -1)


def hashed(key, first, size):
    """MurmurHash3's finalizer twice, in 32-bit arithmetic."""

    def mix(h):
        h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        return h ^ (h >> np.uint32(16))

    place, key = np.arange(first, first + size, dtype=np.uint32), np.uint32(key)
    return (mix(mix(place ^ key) + key) >> np.uint32(8)) / 2.0**23 - 1


def mixtures(w, f, o):
    (m, n), r, k = w.shape, o["rank"], o["bases"]
    a = hashed(f["key"][0], k * r * n, r * n).reshape(r, n) / np.sqrt(n)
    b = np.zeros((m, r))
    for i in range(k):
        a += f["u"][i] * hashed(f["key"][0], i * r * n, r * n).reshape(r, n) / np.sqrt(k)
        b += f["v"][i] * hashed(f["key"][1], i * m * r, m * r).reshape(m, r) / np.sqrt(k)
    return w + b @ a * (1.0 if o["alpha"] is None else o["alpha"] / r)


REFERENCES = {
    "share_lora": Reference(
        lambda w, f, o: w + f["b"] @ f["a"], lambda m, n, o: o["rank"] * (m + n), "Song et al. 2024, arXiv 2406.10785",
        {"rank": 3}, ({"rank": 3, "share": "both"},),
    ),
    "tied_lora": Reference(
        four, lambda m, n, o: o["rank"] * (m + n) + o["rank"] + m,
        "Renduchintala et al. 2023, arXiv 2311.09578", {"rank": 3}, ({"rank": 3, "alpha": 6.0},),
    ),
    "vera": Reference(
        four, lambda m, n, o: o["rank"] + m, "Kopiczko et al. 2023, arXiv 2310.11454, eq. 2", {"rank": 5},
        ({"rank": 40}, {"rank": 5, "widths": (40, 33)}),
    ),
    "pvera": Reference(
        mean, lambda m, n, o: 2 * o["rank"] + m, "Fillioux et al. 2025, arXiv 2512.07703, its mean", {"rank": 5},
        ({"rank": 4, "widths": (40, 33)},),
    ),
    "rasa": Reference(
        rasa, lambda m, n, o: o["rank"] * (m + n + 1), "He et al. 2025, arXiv 2503.12576, equation 5", {"rank": 4},
        ({"rank": 4, "given": 3, "alpha": 6.0},),
    ),
    "bslora": Reference(
        three_pairs, lambda m, n, o: (o["rank"] + o["intra"] + o["inter"]) * (m + n) if "widths" not in o or
        o["widths"] is None else o["rank"] * (m + n) + (o["intra"] + o["inter"]) * sum(o["widths"]),
        "Zhou et al. 2025, ICML, slice sharing, by its code", {"rank": 1, "intra": 2, "inter": 3},
        ({"rank": 0, "intra": 2, "inter": 1, "widths": (40, 37), "strength": 1.5},),
    ),
    "vblora": Reference(
        bank, lambda m, n, o: o["vectors"] * (o["length"] + o["rank"] * (m + n) // o["length"]),
        "Li et al. 2024, arXiv 2405.15179, eq. 3.1 to 3.3, by PEFT 0.21.2", {"rank": 3, "vectors": 6, "length": 8},
        ({"rank": 2, "vectors": 5, "length": 4, "topk": 3},),
    ),
    "randlora": Reference(
        bases, lambda m, n, o: -(-min(m, n) // o["rank"]) * (o["rank"] + min(m, n)),
        "Albert et al. 2025, arXiv 2502.00987, eq. 4", {"rank": 5}, ({"rank": 16, "alpha": 8.0},),
    ),
    "unilora": Reference(
        projected, lambda m, n, o: o["size"], "Li et al. 2025, arXiv 2506.00799, P of theorem 1",
        {"rank": 3, "size": 11}, ({"rank": 1, "size": 100},),
    ),
    "nola": Reference(
        mixtures, lambda m, n, o: 2 * o["bases"], "Koohpayegani et al. 2023, arXiv 2310.02556, its LLaMA code",
        {"rank": 3, "bases": 4}, ({"rank": 2, "bases": 1, "alpha": 6.0},),
    ),
}  # fmt: skip
