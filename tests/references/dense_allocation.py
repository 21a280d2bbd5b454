"""Methods that find each layer's rank, dense: their weights at given gates."""

import numpy as np
from reference import Reference


def outer(w, f, gates, s):
    return w + s * sum(g * np.outer(f["b"][:, k], f["a"][k]) for k, g in enumerate(gates))


def hard_concrete(w, f, o):
    """Louizos et al. 2017, arXiv 1712.01312, eq. 13, stretched from -0.1 to 1.1."""
    gates = np.minimum(1, np.maximum(0, (1.1 + 0.1) / (1 + np.exp(-f["e"])) - 0.1))
    return outer(w, f, gates, 1.0 if o["alpha"] is None else o["alpha"] / o["rank"])


def switched(w, f, o):
    assert f["e"].tolist() == [1.0] * o["rank"] + [0.0] * (o["most"] - o["rank"])
    return outer(w, f, [1.0] * o["rank"], 1.0 if o["alpha"] is None else o["alpha"] / o["rank"])


def softmax(w, f, o):
    return outer(w, f, [np.exp(x) / np.exp(f["e"]).sum() for x in f["e"]], o["alpha"] / o["rank"])


def pair(w, f, o):
    return w + (1.0 if o["alpha"] is None else o["alpha"] / o["rank"]) * f["b"] @ f["a"]


def gated(m, n, o):
    return o["rank"] * (m + n + 1)


REFERENCES = {
    "salora_struct": Reference(
        hard_concrete, gated, "Hu et al. 2023, Mathematics 11(20), 4317", {"rank": 3}, ({"rank": 4, "alpha": 2.0},)
    ),
    "alora_alloc": Reference(
        switched, lambda m, n, o: o["most"] * (m + n), "Liu et al. 2024, arXiv 2403.16187, eq. 3",
        {"rank": 2, "most": 5}, ({"rank": 3, "most": 3, "alpha": 6.0},),
    ),
    "autolora": Reference(softmax, gated, "Zhang et al. 2024, arXiv 2403.09113, eq. 2 and 3; code read", {"rank": 3}),
    "prilora": Reference(  # a layer alone has the average rank
        pair, lambda m, n, o: o["rank"] * (m + n), "Benedek and Wolf 2024, arXiv 2401.11316", {"rank": 3},
        ({"rank": 4, "alpha": 2.0},),
    ),
    "lora_drop": Reference(
        pair,
        lambda m, n, o: o["rank"] * (m + n), "Zhou et al. 2024, arXiv 2402.07721", {"rank": 3},
        ({"rank": 2, "alpha": 3.0},),
    ),
}  # fmt: skip
