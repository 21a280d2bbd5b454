"""PEFT's FOURIERFT, WAVEFT, SHIRA and C3A.

The first two draw the places of their coefficients from a seed at every load; ours are stored. PEFT's C3A divides by
the layer's inputs, ours does not.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import ConversionError
from rankwise.formats.peft.method import Method
from rankwise.host import Site
from rankwise.structures import C3A, FourierFT, SHiRA, WaveFT

Build = Callable[[Mapping[str, Any], Site, dict[str, Tensor]], FourierFT | WaveFT]


def _places(structure: FourierFT | WaveFT, site: Site, f: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The places that PEFT draws, and the factor that holds none."""
    drawn = structure.begin(site, lambda: f["values"], f)
    return {**drawn, "sizes": f["values"].new_zeros(site.rows, site.cols, 0)}


def _spectrum(kind: type[FourierFT] | type[WaveFT], scaling: float) -> Build:
    """Read a method of coefficients; ``scaling`` is PEFT's default."""

    def build(config: Mapping[str, Any], site: Site, f: dict[str, Tensor]) -> FourierFT | WaveFT:
        family, inverse = config.get("wavelet_family", "db1"), config.get("use_idwt", True)
        if family not in ("db1", "haar") or not inverse:
            raise ConversionError(
                f"WaveFT is read with Haar wavelets; found wavelet_family={family!r}, use_idwt={inverse} at "
                f"{site.name}. Merge the adapter in PEFT (model.merge_and_unload()) and use the merged model."
            )
        seed = config.get("random_loc_seed", 777)
        structure = kind(len(f["values"]), float(config.get("scaling", scaling)), seed)
        f |= _places(structure, site, f)
        return structure

    return build


def _coefficients(s: FourierFT | WaveFT, site: Site, f: dict[str, Tensor]) -> dict[str, Any]:
    again = _places(s, site, f)
    if any(not torch.equal(f.pop(name), again[name]) for name in ("row", "col", "sizes")):
        raise ConversionError(
            f"PEFT draws the places of coefficients from a seed; those of {site.name} are not of seed={s.seed}. Merge "
            f"the adapter (rw.merge) and save the model."
        )
    return {"n_frequency": s.count, "scaling": s.scaling, "random_loc_seed": s.seed}


def _entries(config: Mapping[str, Any], site: Site, f: dict[str, Tensor]) -> SHiRA:
    f["row"], f["col"] = f.pop("places").to(torch.int32)
    f["sizes"] = f["values"].new_zeros(site.rows, site.cols, 0)
    return SHiRA(config["r"])


def _mask(s: SHiRA, site: Site, f: dict[str, Tensor]) -> dict[str, Any]:
    del f["sizes"]
    f["places"] = torch.stack([f.pop("row"), f.pop("col")])
    return {"r": s.rank}


def _blocks(config: Mapping[str, Any], site: Site, f: dict[str, Tensor]) -> C3A:
    block = site.rows // len(f["kernel"])
    f["kernel"] = f["kernel"].unflatten(1, (-1, block)) / site.cols
    return C3A(block)


def _kernels(s: C3A, site: Site, f: dict[str, Tensor]) -> dict[str, Any]:
    f["kernel"] = f["kernel"] * site.cols
    return {"block_size": f["kernel"].shape[-1]}


_LINEAR, _COUNT = ("Linear", "Conv1D"), {"n_frequency": "n_frequency_pattern"}
_FOURIER = _spectrum(FourierFT, 150.0), _coefficients, _COUNT
_WAVES = _spectrum(WaveFT, 25.0), _coefficients, _COUNT
_ENTRIES = {"values": "shira_weight", "places": "shira_indices"}
METHODS = {
    "FOURIERFT": Method(FourierFT, {"values": "fourierft_spectrum"}, _LINEAR, (), *_FOURIER),
    "WAVEFT": Method(WaveFT, {"values": "waveft_spectrum"}, _LINEAR, (), *_WAVES),
    "SHIRA": Method(SHiRA, _ENTRIES, ("Linear",), (), _entries, _mask, {}),
    "C3A": Method(
        C3A, {"kernel": "c3a_kernel"}, ("Linear",), (), _blocks, _kernels, {"block_size": "block_size_pattern"}
    ),
}
