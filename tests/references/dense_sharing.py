"""Methods whose layers share factors, one layer at a time, dense."""

import numpy as np
from reference import Reference


def four(w, f, o):
    s = 1.0 if "start_u" in o or o.get("alpha") is None else o["alpha"] / o["rank"]
    return w + s * np.diag(f["v"]) @ f["b"] @ np.diag(f["u"]) @ f["a"]


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
        four, lambda m, n, o: o["rank"] + m, "Kopiczko et al. 2023, arXiv 2310.11454, eq. 2", {"rank": 5}
    ),
}  # fmt: skip
