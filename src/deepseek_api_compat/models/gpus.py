"""Accelerators by name: their memory, and whether they multiply FP8.

Memory is what NVML reports, in MiB, where that is on record (nvidia-smi); else what the maker's data sheet
says, taken as 10^9 bytes for a GB, which is never more than there is.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from deepseek_api_compat.errors import ModelError

MIB = 1024 * 1024
GB = 1_000_000_000


class Gpu(msgspec.Struct, frozen=True):
    """memory: bytes. fp8: whether it has FP8 arithmetic (e4m3), for weights as DeepSeek publishes them."""

    name: str
    title: str
    memory: int
    fp8: bool
    source: str
    maker: Literal["NVIDIA", "AMD", "Huawei"] = "NVIDIA"


_NVML = "memory.total of nvidia-smi"
_SHEET = "data sheet"

GPUS: tuple[Gpu, ...] = (
    Gpu("h100-80", "H100 80 GB", 81_559 * MIB, True, _NVML),
    Gpu("h200", "H200 141 GB", 143_771 * MIB, True, _NVML),
    Gpu("h800", "H800 80 GB", 80 * GB, True, _SHEET),
    Gpu("h20", "H20 96 GB", 96 * GB, True, _SHEET),
    Gpu("a100-80", "A100 80 GB", 81_920 * MIB, False, _NVML),
    Gpu("a800", "A800 80 GB", 80 * GB, False, _SHEET),
    Gpu("b200", "B200 180 GB", 180 * GB, True, f"{_SHEET} of DGX B200 (1,440 GB for 8)"),
    Gpu("l40s", "L40S 48 GB", 46_068 * MIB, True, _NVML),
    Gpu("rtx4090", "RTX 4090 24 GB", 24 * GB, True, _SHEET),
    Gpu("mi300x", "MI300X 192 GB", 192 * GB, True, _SHEET, "AMD"),
    Gpu("mi325x", "MI325X 256 GB", 256 * GB, True, _SHEET, "AMD"),
    Gpu("ascend-910b", "Ascend 910B 64 GB", 64 * GB, False, _SHEET, "Huawei"),
)


def find_gpu(name: str) -> Gpu:
    """Raises ModelError, which lists the known ones."""
    for gpu in GPUS:
        if gpu.name == name.lower():
            return gpu
    raise ModelError(
        f"There is no GPU {name!r} in the table; it has: {', '.join(gpu.name for gpu in GPUS)}, none."
    )
