"""LoRA and its kin, dense."""

from math import sqrt

import numpy as np
from reference import Reference


def scale(o):
    return 1.0 if o.get("alpha") is None else o["alpha"] / o["rank"]


def pair(m, n, o):
    return o["rank"] * (m + n)


def rows(w):
    return np.sqrt((w * w).sum(1))


def product(b, a):
    m, n = b.shape[0], a.shape[1]
    return np.array([[sum(b[i, k] * a[k, j] for k in range(b.shape[1])) for j in range(n)] for i in range(m)])


def dora(w, f, o):
    changed = w + scale(o) * product(f["b"], f["a"])
    return f["magnitude"][:, None] / rows(changed)[:, None] * changed


def anchored(w, f, o):
    return w + scale(o) * (product(f["b"], f["a"]) - product(f["anchor_b"], f["anchor_a"]))


def three(w, f, o):
    return w + scale(o) * np.einsum("ik,k,kj->ij", f["b"], f["e"], f["a"])


REFERENCES = {
    "lora": Reference(
        lambda w, f, o: w + scale(o) * product(f["b"], f["a"]), pair, "Hu et al. 2021, arXiv 2106.09685, eq. 3",
        {"rank": 3}, ({"rank": 2, "alpha": 5.0},),
    ),
    "rslora": Reference(
        lambda w, f, o: w + o["alpha"] / sqrt(o["rank"]) * product(f["b"], f["a"]), pair,
        "Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2", {"rank": 4},
    ),
    "dora": Reference(
        dora, lambda m, n, o: o["rank"] * (m + n) + m, "Liu et al. 2024, arXiv 2402.09353, eq. 5", {"rank": 3}
    ),
    "svd": Reference(
        three, lambda m, n, o: o["rank"] * (m + n + 1), "Zhang et al. 2023, arXiv 2303.10512, eq. 3", {"rank": 3}
    ),
    "lora_fa": Reference(
        lambda w, f, o: w + scale(o) * product(f["b"], f["a"]), lambda m, n, o: o["rank"] * m,
        "Zhang et al. 2023, arXiv 2308.03303", {"rank": 3},
    ),
    "mica": Reference(
        lambda w, f, o: w + scale(o) * product(f["b"], f["a"]), lambda m, n, o: o["rank"] * n,
        "arXiv 2604.01694", {"rank": 3},
    ),
    "lora_xs": Reference(
        lambda w, f, o: w + scale(o) * f["b"] @ f["c"] @ f["a"], lambda m, n, o: o["rank"] ** 2,
        "Balazy et al. 2024, arXiv 2405.17604, eq. 2, transposed", {"rank": 3},
    ),
    "pissa": Reference(anchored, pair, "Meng et al. 2024, arXiv 2404.02948, eq. 4 and 5", {"rank": 3}),
}  # fmt: skip
