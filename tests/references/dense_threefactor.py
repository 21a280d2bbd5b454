"""Three factors, dense: SVFT, PoLAR, StelLA, SORSA, KaSA, Asymmetry LoRA, TinyLoRA."""

import numpy as np
from dense_lowrank import product, scale
from reference import Reference


def band(m, n, o):
    """Places of the pattern, counted one diagonal after the other."""
    k = min(m, n)
    return sum(k - abs(offset) for offset in range(-o["width"], o["width"] + 1))


def svft(w, f, o):
    """U (S + M) V^T, U, S and V by the eigenvectors of W W^T, so that M's meaning is fixed but for signs."""
    values = np.sqrt(np.sort(np.linalg.eigvalsh(w @ w.T))[::-1][: min(w.shape)].clip(0))
    u, v = f["u"], f["v"]
    assert np.allclose(u @ np.diag(values) @ v, w) and np.allclose(u.T @ u, np.eye(len(values)))
    core = np.diag(values)
    places = list(zip(f["row"].tolist(), f["col"].tolist(), strict=True))
    assert len(set(places)) == len(places)
    if o["pattern"] == "banded":
        assert {i - j for i, j in places} == set(range(-o["width"], o["width"] + 1))
    for (i, j), entry in zip(places, f["m"], strict=True):
        core[i, j] += entry
    return u @ core @ v


def polar(w, f, o):
    core = np.diag(f["c"]) if f["c"].ndim == 1 else f["c"]
    s = (2.0 if o.get("alpha") is None else o["alpha"] / o["rank"]) if "diagonal" in o else scale(o)
    return w + s * product(product(f["b"], core), f["a"])


def three(b, e, a):
    return sum(e[i] * np.outer(b[:, i], a[i]) for i in range(len(e)))


def sorsa(w, f, o):
    """The residual W - U_p S_p V_p^T, with the p leading triplets of W, and the trained three factors."""
    u, s, v = np.linalg.svd(w)
    r = o["rank"]
    return w - (u[:, :r] * s[:r]) @ v[:r] + scale(o) * three(f["b"], f["e"], f["a"])


def kasa(w, f, o):
    """The sum of the leading min(m, n) - r terms of W's SVD, and the update."""
    u, s, v = np.linalg.svd(w)
    kept = sum(s[i] * np.outer(u[:, i], v[i]) for i in range(min(w.shape) - o["rank"]))
    return kept + scale(o) * three(f["b"], f["e"], f["a"])


def tiny(w, f, o):
    core = sum(f["v"][i] * f["basis"][i] for i in range(o["size"]))
    u, s, v = np.linalg.svd(w)
    r = o["rank"]
    leading = (u[:, :r] * s[:r]) @ v[:r]  # signs of the triplets drop out of U S V^T, not of U S R V^T
    assert np.allclose(f["b"] @ f["a"], leading)
    return w + scale(o) * np.einsum("ir,rs,sj->ij", f["b"], core, f["a"])


def square(m, n, o):
    return o["rank"] * (m + n + (1 if o.get("diagonal") else o["rank"]))


REFERENCES = {
    "svft": Reference(
        svft, band, "Lingam et al. 2024, arXiv 2405.19597, equations 1 and 2; code read", {"width": 2},
        ({"width": 0}, {"pattern": "random", "width": 1}, {"pattern": "top_k", "width": 3}),
    ),
    "polar": Reference(
        polar, square, "Lion et al. 2025, arXiv 2506.03133, W0 + X Theta Y^T; code read", {"rank": 3},
        ({"alpha": 5.0, "rank": 2},),
    ),
    "stella": Reference(
        polar, square, "Li et al. 2025, arXiv 2510.01938, eq. 5; code read", {"rank": 3},
        ({"rank": 2, "diagonal": True},),
    ),
    "sorsa": Reference(
        sorsa, lambda m, n, o: o["rank"] * (m + n + 1), "Cao 2024, arXiv 2409.00055, eq. 7; code read", {"rank": 3}
    ),
    "kasa": Reference(
        kasa, lambda m, n, o: o["rank"] * (m + n + 1), "Wang et al. 2024, arXiv 2412.06071, section 3; code read",
        {"rank": 3},
    ),
    "asym_lora": Reference(
        lambda w, f, o: w + scale(o) * product(f["b"], f["a"]), lambda m, n, o: o["rank"] * m,
        "Zhu et al. 2024, arXiv 2402.16842, W + B A, A frozen", {"rank": 3},
    ),
    "tinylora": Reference(
        tiny, lambda m, n, o: o["size"], "Morris et al. 2026, arXiv 2602.04118, section 4.0.2, no number; PEFT read",
        {"size": 5}, ({"rank": 3, "size": 13},),
    ),
}  # fmt: skip
