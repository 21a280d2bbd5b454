"""Kronecker and Hadamard products, rotations, chains of pairs, and what is put around them, dense."""

from math import isqrt

import numpy as np
from reference import Reference


def rows(w):
    return np.sqrt((w * w).sum(1))


def near_square(n):
    """n as a product of two factors, the smaller one first, as near to each other as can be."""
    small = max(k for k in range(1, isqrt(n) + 1) if n % k == 0)
    return small, n // small


def kronecker(w, f, o):
    c = f["c"] if "c" in f else f["c_b"] @ f["c_a"]
    d = f["d"] if "d" in f else f["d_b"] @ f["d_a"]
    s = 1.0 if o.get("alpha") is None else o["alpha"] / o["rank"]
    (p, q), (m, n) = c.shape, d.shape
    return w + s * np.array([[c[i // m, j // n] * d[i % m, j % n] for j in range(q * n)] for i in range(p * m)])


def kronecker_count(m, n, o):
    (m1, m2), (n1, n2) = near_square(m), near_square(n)
    r = o.get("rank")
    inner = m2 * n2 if r is None or r >= max(m2, n2) / 2 else r * (m2 + n2)
    return m1 * n1 + inner


def skew(q, b):
    found, at = np.zeros((b, b)), 0
    for i in range(b):
        for j in range(i + 1, b):
            found[i, j], found[j, i] = q[at], -q[at]
            at += 1
    return found


def rotation(w, f, o):
    """W diag(R_i), R = (I + Q)(I - Q)^-1."""
    blocks = [skew(q, o["block"]) for q in f["q"]]
    eye, out = np.eye(o["block"]), w.copy()
    for i, q in enumerate(blocks):
        at = slice(i * o["block"], (i + 1) * o["block"])
        out[:, at] = w[:, at] @ ((eye + q) @ np.linalg.inv(eye - q))
    return out


def three(w, f, o):
    s = 1.0 if o.get("alpha") is None else o["alpha"] / o["rank"]
    return w + s * sum(f["e"][k] * np.outer(f["b"][:, k], f["a"][k]) for k in range(len(f["e"])))


def magnitude(inner):
    def weight(w, f, o):
        changed = inner(w, f, o)
        return f["magnitude"][:, None] / rows(changed)[:, None] * changed

    return weight


def chain(w, f, o):
    s = 1.0 if o.get("alpha") is None else o["alpha"] / o["rank"]
    past = f["past"] if "past" in f else f["past_b"] @ f["past_a"]
    return w + s * (f["b"] @ f["a"] + past)


def delta(w, f, o):
    now, then = f["b"] @ f["a"], f["anchor_b"] @ f["anchor_a"]
    return w + now + o["ratio"] * (now - then)


def pair(m, n, o):
    return o["rank"] * (m + n)


REFERENCES = {
    "loha": Reference(
        lambda w, f, o: w + (f["b1"] @ f["a1"]) * (f["b2"] @ f["a2"]), lambda m, n, o: 2 * o["rank"] * (m + n),
        "Hyeon-Woo et al. 2021, arXiv 2108.06098, prop. 1; 2309.14859, eq. 3", {"rank": 3},
    ),
    "hira": Reference(
        lambda w, f, o: w + w * (f["b"] @ f["a"]), pair, "Huang et al. 2025, ICLR, OpenReview TwJrTz9cRS", {"rank": 3}
    ),
    "krona": Reference(kronecker, kronecker_count, "Edalati et al. 2022, arXiv 2212.10650"),
    "lokr": Reference(
        kronecker, kronecker_count, "Yeh et al. 2023, arXiv 2309.14859, eq. 4 and 5", {"rank": 2},
        ({"rank": 1, "alpha": 3.0},),
    ),
    "oft": Reference(
        rotation, lambda m, n, o: n // o["block"] * o["block"] * (o["block"] - 1) // 2,
        "Qiu et al. 2023, arXiv 2306.07280, eq. 2 and 3", {"block": 4},
    ),
    "dora_lokr": Reference(
        magnitude(kronecker), lambda m, n, o: kronecker_count(m, n, o) + m,
        "Liu et al. 2024, arXiv 2402.09353, eq. 5, around Yeh et al. 2023, arXiv 2309.14859, eq. 4", {"rank": 2},
    ),
    "dora_svd": Reference(
        magnitude(three), lambda m, n, o: o["rank"] * (m + n + 1) + m,
        "Liu et al. 2024, arXiv 2402.09353, eq. 5, around Zhang et al. 2023, arXiv 2303.10512, eq. 3", {"rank": 3},
    ),
    "dylora": Reference(
        three, pair, "Valipour et al. 2022, arXiv 2210.07558, equation 7, as cited by others: e is 0 or 1", {"rank": 3}
    ),
    "sora": Reference(
        three, lambda m, n, o: o["rank"] * (m + n + 1), "Ding et al. 2023, arXiv 2311.11696",
        {"rank": 3, "alpha": 6.0},
    ),
    "relora": Reference(
        chain, pair, "Lialin et al. 2023, arXiv 2307.05695, eq. 3", {"rank": 3, "alpha": 6.0},
        ({"rank": 3, "alpha": 3.0, "links": 2},),
    ),
    "delta_lora": Reference(delta, pair, "Zi et al. 2023, arXiv 2309.02411, eq. 6, summed over steps", {"rank": 3}),
    "galore": Reference(lambda w, f, o: f["value"], lambda m, n, o: m * n, "Zhao et al. 2024, arXiv 2403.03507, eq. 1"),
}  # fmt: skip

SAME = {
    "lora": """
        als altlora altlora_plus bar bi_lora eva flat_lora hidden_key loft lora_dropout lora_plus lora_pro lora_rite
        lora_sam muon_lora nonzero nora orthogonal reflora reflora_s riemannion rolora scaled_adamw scaled_gd
        whitened_muon
    """,
    "rslora": "lora_one",
    "pissa": "corda lora_ga milora olora pissa_lora_plus",
    "lora_xs": "lora_sb",
    "svd": "adalora",
    "relora": "cola_chain periodic_lora scalora xgblora",
    "galore": "apollo apollo_mini fira flora_opt",
}
