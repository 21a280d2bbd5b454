"""What a device has: memory, arithmetic, bandwidth; from data sheets, or measured here."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import psutil
import torch

from rankwise.errors import DataError, UnknownName

HERE = "here"  # the machine that this runs on
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@final
@dataclass(frozen=True)
class Device:
    """What a step can use.

    Attributes:
        name: for reports.
        memory: bytes.
        flops: operations a second in matrix products, by the name of the dtype.
        bandwidth: bytes a second, to and from memory.
    """

    name: str
    memory: int
    flops: Mapping[str, float]
    bandwidth: float

    def seconds(self, work: Mapping[tuple[int, int, torch.dtype], int]) -> float:
        """The roofline of kernels (Williams et al. 2009): each waits for its arithmetic or for its bytes."""
        return sum(
            count * max(flops / self.flops["float32" if dtype == torch.float32 else "bfloat16"], moved / self.bandwidth)
            for (flops, moved, dtype), count in work.items()
        )


def _sheet(name: str, gigabytes: int, half: float, single: float, bandwidth: float) -> Device:
    """Teraflops and GB/s as sheets print them. A sheet's GB is 2^30 bytes; what that is more than 10^9 is left to the
    driver, the libraries' workspaces and the allocator's gaps.
    """
    return Device(name, gigabytes * 10**9, {"bfloat16": half * 1e12, "float32": single * 1e12}, bandwidth * 1e9)


# Dense products in bfloat16 (float16 on the T4) with float32 sums, products in plain float32, memory bandwidth, from
# vendors' sheets: NVIDIA "T4", "L4", "L40S", "A100", "H100" and "H200 Tensor Core GPU" data sheets (SXM where there are
# several; figures with sparsity halved), NVIDIA's white papers on GA102 and Ada, AMD's "Instinct MI300X" data sheet.
DEVICES = {
    device.name: device
    for device in (
        _sheet("t4", 16, 65, 8.1, 300),
        _sheet("l4", 24, 121, 30.3, 300),
        _sheet("l40s", 48, 362, 91.6, 864),
        _sheet("rtx3090", 24, 71, 35.6, 936),
        _sheet("rtx4090", 24, 165.2, 82.6, 1008),
        _sheet("a100-40gb", 40, 312, 19.5, 1555),
        _sheet("a100-80gb", 80, 312, 19.5, 2039),
        _sheet("h100", 80, 989, 67, 3350),
        _sheet("h200", 141, 989, 67, 4800),
        _sheet("mi300x", 192, 1307.4, 163.4, 5300),
    )
}


def device_of(name: str = HERE) -> Device:
    """A device by name; "here" is measured, in less than a second.

    Raises:
        UnknownName: it is not in the table.
    """
    if name == HERE:
        return _measured()
    if name.lower() not in DEVICES:
        raise UnknownName(f'A device is "{HERE}" or one of {", ".join(DEVICES)}; found "{name}".')
    return DEVICES[name.lower()]


def size_of(text: str) -> int:
    """Bytes from "24GiB", "24G" or a plain number.

    Raises:
        DataError: it is none of these.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if found is None:
        raise DataError(f"A size of memory is written 24GiB, 24GB or 25769803776; found {text!r}.")
    return int(float(found[1]) * _UNITS[found[2] or ""])


def in_words(size: float) -> str:
    """Bytes as GiB or MiB."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _free() -> int:
    """Bytes that a process can still take: of the GPU, or of the machine and its container."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    free = psutil.virtual_memory().available
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        cached = re.search(r"^inactive_file (\d+)", limit.with_name("memory.stat").read_text(), re.MULTILINE)
        free = min(free, int(text) - int(used.read_text()) + int(cached[1] if cached else 0))
    return free


def _measured() -> Device:
    """The machine at hand: its free memory, the speed of one large product and of one large copy."""
    where, side = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 1024)
    name = torch.cuda.get_device_name() if where == "cuda" else f"this machine's CPU, {torch.get_num_threads()} threads"

    def rate(run: Callable[[], object]) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            run()
            if where == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return 1 / min(times)

    flops = {}
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(side, side, dtype=dtype, device=where)
        flops[str(dtype).removeprefix("torch.")] = 2 * side**3 * rate(lambda m=square: m @ m)
    one, other = torch.zeros(2, 2**24, device=where)
    return Device(name, _free(), flops, 2 * one.nbytes * rate(lambda: one.copy_(other)))
