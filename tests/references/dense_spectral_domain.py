"""Transform domains, sparse entries and circulant blocks, dense: every sum written out."""

import numpy as np
from reference import Reference


def spectrum(f, shape):
    """The coefficients in place; each place once, inside."""
    s = np.zeros(shape)
    for value, p, q in zip(f["values"], f["row"], f["col"], strict=True):
        assert s[p, q] == 0
        s[p, q] = value
    return s


def fourierft(w, f, o):
    """Each coefficient times its two-dimensional wave."""
    m, n = w.shape
    p, q = np.arange(m)[:, None], np.arange(n)[None, :]
    waves = [
        c * np.exp(2j * np.pi * (u * p / m + v * q / n))
        for c, u, v in zip(f["values"], f["row"], f["col"], strict=True)
    ]
    return w + o["scaling"] * sum(waves).real / (m * n)


def haar(size):
    """Columns: a wavelet each, first the averages of two neighbours, then their differences."""
    found = np.zeros((size, size))
    for i in range(size // 2):
        found[2 * i : 2 * i + 2, i] = 0.5**0.5, 0.5**0.5
        found[2 * i : 2 * i + 2, size // 2 + i] = 0.5**0.5, -(0.5**0.5)
    return found


def waveft(w, f, o):
    m, n = w.shape
    even = m + m % 2, n + n % 2
    return w + o["scaling"] * (haar(even[0]) @ spectrum(f, even) @ haar(even[1]).T)[:m, :n]


def c3a(w, f, o):
    """Blocks whose first row is the kernel, every further one the row above shifted to the right by one."""
    kernels = f["kernel"]
    blocks = [[np.stack([np.roll(k, i) for i in range(len(k))]) for k in row] for row in kernels]
    return w + np.block(blocks)


def cosines(n):
    """DCT-II: the row of frequency k."""
    k, p = np.arange(n)[:, None], np.arange(n)[None, :]
    d = np.cos(np.pi * (2 * p + 1) * k / (2 * n)) * np.sqrt(2 / n)
    d[0] /= np.sqrt(2)
    return d


def foura(w, f, o):
    """Forward transform, down, gate, up, inverse transform: of each unit vector."""
    back, into = np.linalg.inv(cosines(len(w))), cosines(w.shape[1])
    columns = [back @ (f["b"] @ (f["e"] * (f["a"] @ (into @ x)))) for x in np.eye(w.shape[1])]
    return w + (1.0 if o.get("alpha") is None else o["alpha"] / o["rank"]) * np.stack(columns, axis=1)


def block(m, n, most):
    return max(b for b in range(1, most + 1) if m % b == 0 == n % b)


REFERENCES = {
    "fourierft": Reference(
        fourierft, lambda m, n, o: o["count"], "Gao et al. 2024, arXiv 2405.03003, eq. 3 and 4; 1/(mn) as in PEFT",
        {"count": 30}, ({"count": 3, "scaling": 300.0, "seed": 1},),
    ),
    "waveft": Reference(
        waveft, lambda m, n, o: o["count"], "Bilican et al. 2025, arXiv 2505.12532, by its code in PEFT", {"count": 40},
    ),
    "shira": Reference(
        lambda w, f, o: w + spectrum(f, w.shape), lambda m, n, o: o["rank"] * (m + n),
        "Bhardwaj et al. 2024, arXiv 2406.13175, eq. 4", {"rank": 2}, ({"rank": 1, "mask": "wm"},),
    ),
    "c3a": Reference(
        c3a, lambda m, n, o: m * n // block(m, n, o["block"]), "Chen et al. 2024, arXiv 2407.19342, eq. 4",
        {"block": 8}, ({"block": 5},),
    ),
    "foura": Reference(
        foura, lambda m, n, o: o["rank"] * (m + n + 1), "Borse et al. 2024, arXiv 2406.08798, with one gate for all",
        {"rank": 3}, ({"rank": 4, "alpha": 2.0},),
    ),
}  # fmt: skip
