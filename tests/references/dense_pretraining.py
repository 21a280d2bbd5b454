"""Weights that are factors alone."""

import numpy as np
from reference import Reference


def sltrain(w, f, o):
    m, n = w.shape
    made = np.zeros((m, n))
    for place, value in zip(f["places"], f["values"], strict=True):
        made[divmod(int(place), n)] += value
    s = (o["rank"] / 4 if o["alpha"] is None else o["alpha"]) / o["rank"]
    return made + s * np.einsum("ik,kj->ij", f["b"], f["a"])


def cola(x, f, o):
    h = np.array([[sum(a[j] * row[j] for j in range(len(row))) for a in f["a"]] for row in x])
    return np.einsum("mk,tk->tm", f["b"], h / (1 + np.exp(-h)))


REFERENCES = {
    "sltrain": Reference(
        sltrain, lambda m, n, o: o["rank"] * (m + n) + int(o["density"] * m * n),
        "Han et al. 2024, arXiv 2406.02214: W = (alpha/r) B A + S", {"rank": 3},
        ({"rank": 2, "alpha": 5.0, "density": 0.2},),
    ),
    "loro": Reference(
        lambda w, f, o: sum(np.outer(b, a) for b, a in zip(f["b"].T, f["a"], strict=True)),
        lambda m, n, o: o["rank"] * (m + n), "Mo, Huang, Pan 2025, ICLR: W = B A", {"rank": 3},
    ),
    "cola_act": Reference(
        None, lambda m, n, o: o["rank"] * (m + n), "Liu et al. 2025, arXiv 2502.10940: h = B silu(A x)", {"rank": 3},
        output=cola,
    ),
}  # fmt: skip
