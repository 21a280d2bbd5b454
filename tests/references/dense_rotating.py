"""Rotations, gates, bounded and shared updates, dense: explicit matrices and loops."""

import numpy as np
from reference import Reference


def generators(q, b):
    """Skew-symmetric b x b matrices from upper triangles, read row by row."""
    full = np.zeros((*q.shape[:-1], b, b))
    pairs = [(i, j) for i in range(b) for j in range(i + 1, b)]
    for k, (i, j) in enumerate(pairs):
        full[..., i, j], full[..., j, i] = q[..., k], -q[..., k]
    return full


def cayley(q, b):
    one = np.eye(b)
    return (one + generators(q, b)) @ np.linalg.inv(one - generators(q, b))


def block(n, o):
    parts = 2 ** (o["levels"] - 1)
    return max(b for b in range(2, o["block"] + 1, 2) if n % (b * parts) == 0)


def butterfly(w, f, o):
    """Entry by entry: level i joins the half-blocks h and h + 2^i of every 2^(i+1)."""
    n = w.shape[1]
    b = block(n, o)
    found = np.eye(n)
    for level, turns in enumerate(cayley(f["q"], b)):
        matrix, stride, done = np.zeros((n, n)), 2**level, 0
        for chunk in range(0, 2 * n // b, 2 * stride):
            for h in range(chunk, chunk + stride):
                at = [k * b // 2 + e for k in (h, h + stride) for e in range(b // 2)]
                matrix[np.ix_(at, at)] = turns[done]
                done += 1
        found = found @ matrix  # R_1 R_2 ...: R^T = B(d, 2^m) ... B(d, 2) turns W^T
    return f.get("s", np.ones(len(w)))[:, None] * (w @ found)


def reflections(w, f, o):
    for u in f["u"]:
        w = w @ (np.eye(len(u)) - 2 * np.outer(u, u) / (u @ u))
    return w


def principal(w, f, o):
    r, rest = o["rank"], w - f["b"] @ f["a"]
    turn = cayley(f["q"], r)
    turn = np.diag(f.get("left", np.ones(r))) @ turn @ np.diag(f.get("right", np.ones(r)))
    return rest + f["b"] @ turn @ f["a"]


def pairs(w, f, o):
    """Pair by pair: the 2 x 2 matrices of the paper."""
    out, group, turned = len(w), 2 * f["theta"].shape[-1], np.zeros_like(w)
    theta, alpha = (np.broadcast_to(f[k], (f[k].shape[0], out // group, 2, group // 2)) for k in ("theta", "alpha"))
    for g in range(out // group):
        for i in range(group // 2):
            one, two = g * group + i, g * group + group // 2 + i
            c1, c2 = alpha[0, g, :, i] * np.cos(theta[0, g, :, i])
            s1, s2 = alpha[-1, g, :, i] * np.sin(theta[-1, g, :, i])
            turned[one], turned[two] = c1 * w[one] - s1 * w[two], s2 * w[one] + c2 * w[two]
    return turned


def bounded(w, f, o):
    change, lengths = np.zeros_like(w), np.sqrt((w * w).sum(0))
    for sign, start in ((1, ""),) if o["from_zero"] else ((1, ""), (-1, "anchor_")):
        for b, a in zip(f[start + "b"].T, f[start + "a"], strict=True):
            one = np.outer(b / np.sqrt(b @ b), a / np.sqrt(a @ a))
            change += sign * f[start + "strength"][0] / o["rank"] * one
    return w + change * lengths


def shared(w, f, o):
    """A column after another: x is summed r apart, so that column j is the shard's j mod r."""
    columns = [f["b"][:, j % o["rank"]] for j in range(w.shape[1])]
    shard = np.stack(columns, axis=1)
    return w + np.stack([shard[i % len(shard)] for i in range(len(w))])


def guided(w, f, o):
    found, r = w.copy(), o["rank"]
    for i in range(0, w.shape[0], r):
        for j in range(0, w.shape[1], r):
            d = f["d"][i // r]
            found[i : i + r, j : j + r] += w[i : i + r, j : j + r] @ d + d
    return found


def blocked(w, f, o):
    k, r = o["blocks"], o["rank"]
    side, other = (f["a"], f["b"]) if o["side"] == "a" else (f["b"], f["a"])
    parts = np.split(side, k, axis=0)
    whole = np.zeros((len(side), k * side.shape[1]))
    for i, part in enumerate(parts):
        whole[i * len(part) : (i + 1) * len(part), i * part.shape[1] : (i + 1) * part.shape[1]] = part
    b, a = (other, whole) if o["side"] == "a" else (whole, other)
    return w + (r if o["alpha"] is None else o["alpha"]) / r * b @ a


REFERENCES = {
    "boft": Reference(
        butterfly, lambda m, n, o: o["levels"] * n * (block(n, o) - 1) // 2 + o["scaled"] * m,
        "Liu et al. 2023, arXiv 2311.06243, section 4, no number, of equation 1's factors", {"block": 4},
        ({"block": 2, "levels": 3, "scaled": True}, {"block": 8, "levels": 1}),
    ),
    "hra": Reference(
        reflections, lambda m, n, o: o["rank"] * n, "Yuan et al. 2024, arXiv 2405.17484, equation 1", {"rank": 4},
    ),
    "psoft": Reference(
        principal, lambda m, n, o: o["rank"] * (o["rank"] - 1) // 2 + 2 * o["relaxed"] * o["rank"],
        "Wu et al. 2025, arXiv 2505.11235, eq. 6 to 8", {"rank": 5}, ({"rank": 3, "relaxed": False},),
    ),
    "ia3": Reference(
        lambda w, f, o: f["l"][:, None] * w if o["side"] == "out" else w * f["l"],
        lambda m, n, o: m if o["side"] == "out" else n, "Liu et al. 2022, arXiv 2205.05638, section 3.3, no number", {},
        ({"side": "in"},),
    ),
    "road": Reference(
        pairs, lambda m, n, o: o["variant"] * m, "Liao and Monz 2024, arXiv 2409.00119, eq. 3 and table 1", {},
        ({"variant": 2, "group": 8}, {"variant": 4, "group": 2}),
    ),
    "delora": Reference(
        bounded, lambda m, n, o: o["rank"] * (m + n) + 1, "Bini et al. 2025, arXiv 2503.18225, eq. 5, 8 and 9",
        {"rank": 3}, ({"rank": 2, "strength": 3.0, "from_zero": True},),
    ),
    "miss": Reference(
        shared, lambda m, n, o: o["rank"] * (m if o["shard"] is None else o["shard"]),
        "Kang and Yin 2024, arXiv 2409.15371, eq. 4 to 7", {"rank": 5}, ({"rank": 4, "shard": 2},),
    ),
    "bat": Reference(
        guided, lambda m, n, o: o["rank"] * m, "Kang 2024, arXiv 2409.15371v7; PEFT 0.21.2", {"rank": 4},
    ),
    "bd_lora": Reference(
        blocked, lambda m, n, o: o["rank"] * (m + n // o["blocks"] if o["side"] == "a" else m // o["blocks"] + n),
        "Wang et al. 2025, arXiv 2510.23346; PEFT 0.21.2", {"rank": 4, "alpha": 3.0},
        ({"rank": 8, "blocks": 4, "side": "a"},),
    ),
}  # fmt: skip
