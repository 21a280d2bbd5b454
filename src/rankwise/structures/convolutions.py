"""Maps of a convolution that are linear in x, though no weight of the layer's shape says them.

g groups, k the kernel's size, r rank; a (r, g * in) sees the channels of every group, b (out, r/g) keeps to its own;
q (blocks, b(b-1)/2) holds skew-symmetric generators.
"""

from dataclasses import dataclass
from math import prod
from typing import Any, final

from torch import Tensor
from torch.nn.functional import fold, unfold

from rankwise.errors import NotMergeable, RankError, TargetError
from rankwise.host import Host, Site
from rankwise.ops import BlockDiagonal, Dense, Product, Scaled
from rankwise.structures.lowrank import Ranked
from rankwise.structures.rotations import Blocks
from rankwise.structures.structure import Factor, Factors, Leaf, Start, check_rank


class Unmerged(Leaf):
    """A structure that is applied and never merged."""

    @final
    def weight(self, f: Factors, w: Tensor) -> Tensor:
        """No weight.

        Raises:
            NotMergeable: always; the trait ``not_mergeable`` says so beforehand.
        """
        raise NotMergeable(f"A dense form is a weight of the layer's shape; {self!r} has none. Serve it unmerged.")


@final
@dataclass(frozen=True)
class CrossGroup(Ranked, Unmerged):
    """LoRA on a grouped convolution, across its groups: ``W x + s B A x``, as PEFT 0.21.2 has it.

    A convolves all channels to r, and the outputs of group i read the i-th r/g of them. (LoRA itself keeps within each
    group, and merges.)

    Attributes:
        rank: r, a multiple of the groups.
        alpha: numerator of the scale; None for a scale of 1.
        scale_rule: "alpha/r" or "alpha/sqrt(r)".
    """

    traits = frozenset({"not_mergeable", "two_sided", "random_start", "drops"})

    def factors(self, site: Site) -> dict[str, Factor]:
        g, cols = site.groups, site.cols * site.groups
        if g < 2:
            raise TargetError(f"Groups are those of a grouped convolution; {site.name} has none. Take LoRA there.")
        r = check_rank(self.rank, site, max(self.rank, 1))
        if r % g:
            raise RankError(f"A rank across groups is a multiple of them; found rank={r}, {g} groups at {site.name}.")
        b = Factor({"out": site.rows, "group_rank": r // g})  # masks on "rank" act on a alone
        return {"a": Factor({"rank": r, "in": cols}, Start.RANDOM), "b": b}

    def apply(self, f: Factors, x: Tensor, host: Host) -> Tensor:
        b = f["b"].unflatten(-2, (f["a"].shape[-2] // f["b"].shape[-1], -1))  # (*batch, g, out/g, r/g)
        update = Scaled(Product(BlockDiagonal(b), Dense(f["a"])), self.scale)
        return host(x) + host.mv(update, host.drop(x))


@final
@dataclass(frozen=True)
class PatchOFT(Blocks, Unmerged):
    """Rotated patches of a 2-d convolution's input, added up where they overlap: OFT's forward in PEFT 0.21.2.

    Every k-patch of x, all channels at stride 1 without padding, is rotated; the patches are summed to an image, and
    the layer convolves that. Two facts of PEFT are kept, so that its files mean here what they mean there: a channel's
    values, in the order (position, kernel), are summed as if in the order (kernel, position), and nothing is divided by
    how many patches hold a pixel. Above 1x1 the layer is therefore another one from the start; for a new adapter take
    OFT, which rotates the weight.

    Attributes:
        block: desired size of a block; the largest divisor of all channels * kernel not above it is taken.
        terms: of the Neumann series; None for the exact inverse.
    """

    traits = frozenset({"not_mergeable", "rotation", "moves_at_start"})

    def factors(self, site: Site) -> dict[str, Factor]:
        if site.kind != "conv" or len(site.shape) != 4:
            raise TargetError(f"Patches are those of a 2-d convolution; {site.name} is another layer. Take OFT there.")
        return self.blocks(site, site.cols * site.groups)

    def apply(self, f: Factors, x: Tensor, host: Host) -> Tensor:
        size: Any = host.module.kernel_size
        patches = unfold(x, size)  # (*batch, channels * kernel, positions)
        turned = self.operator(f).mv(patches.mT).unflatten(-1, (-1, prod(size)))
        # (*batch, channels, positions, kernel), read as (channels, kernel, positions): PEFT's order, see above
        return host(fold(turned.transpose(-3, -2).reshape(patches.shape), x.shape[-2:], size))
