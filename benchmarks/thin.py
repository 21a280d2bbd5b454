"""A layer's step with a low-rank correction against its frozen product, by rank: what the thin products add.

    python -m benchmarks.thin

512 tokens, one thread, forward and backward with a gradient to the input. Beside the fused node stand the same products
in the order in which they are usually written (x A^T, h B^T, g B, g^T h, h A, back^T x).
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.paired import fixed_allocator, measure, overhead
from rankwise.ops import fused

TOKENS = 512


class Usual(torch.autograd.Function):
    """The node without dropout, magnitude or a care for how what is narrow lies; in half precision h is made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, a: Tensor) -> Tensor:
        h = x @ a.mT
        ctx.save_for_backward(x, w, b, a, None if x.dtype in fused.HALF else h)
        return (h @ b.mT).addmm_(x, w.mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, a, h = ctx.saved_tensors
        g, h = grads[0], x @ a.mT if h is None else h
        back = g @ b
        return (back @ a).addmm_(g, w), None, g.mT @ h, back.mT @ x


def steps(width: int, rank: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """The node, the usual order and the frozen product on the same tensors."""
    torch.manual_seed(0)
    x, w = torch.randn(TOKENS, width).to(dtype).requires_grad_(), torch.randn(width, width).to(dtype)
    b, a = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((width, rank), (rank, width)))
    ways: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: fused.run(x, [fused.Part(w, b, a)])[0],
        "usual": lambda: Usual.apply(x, w, b, a),
        "floor": lambda: x @ w.mT,
    }

    def step(way: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            x.grad = a.grad = b.grad = None
            y = way()
            y.backward(y.detach())

        return run

    return {name: step(way) for name, way in ways.items()}


def main() -> None:
    """Print a line for each width, rank and dtype."""
    parser = argparse.ArgumentParser(prog="benchmarks.thin", description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    rounds = parser.parse_args().rounds
    fixed_allocator()
    torch.set_num_threads(1)
    print(f"{'dtype':10}{'width':>6}{'rank':>6}   overhead of ours over that of the usual order")
    for dtype in (torch.float32, torch.bfloat16):
        for width in (256, 512, 1024):
            for rank in (4, 8, 12, 16, 32, 64):
                seen = measure(steps(width, rank, dtype), rounds, least=3).wall
                found = overhead(seen["ours"], seen["usual"], seen["floor"])
                said = "{value:.2f} [{low:.2f}, {high:.2f}]".format(**found)
                print(f"{str(dtype).removeprefix('torch.'):10}{width:6}{rank:6}   {said}", flush=True)


if __name__ == "__main__":
    main()
