"""Which tiles a kernel works in: a table, tuned offline, by what the kernel does and what it runs on.

Never tuned in place, where every trial would be a training step, and never by the number of tokens, so that a new
sequence length compiles nothing. ``python -m benchmarks.kernels`` compiles every row and counts what it costs.
"""

from __future__ import annotations

from typing import NamedTuple


class TileConfig(NamedTuple):
    """Tile sizes, and how the compiler is to treat them."""

    bn: int  # rows of the weight in a tile
    bk: int  # columns: a block of a codec
    bt: int  # tokens at a time
    levels: int  # a tile steps in 2 ** levels sub-tiles
    warps: int
    stages: int
    maxnreg: int | None = None  # registers per thread, so that two programs fit a multiprocessor
    group: int = 8  # tiles of rows that share their columns in L2

    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        asked = {"num_warps": self.warps, "num_stages": self.stages}
        return asked if self.maxnreg is None else {**asked, "maxnreg": self.maxnreg}


DESCRIPTORS = ("hopper", "blackwell")  # families that copy tiles by themselves, given a descriptor
PRODUCT, GATHER, DENSE = "product", "gather", "dense"  # what a launch takes its gradient from

# by what it takes its gradient from, bytes of an operand, and family of processors
_TILE_CONFIGS: dict[tuple[str, int, str], TileConfig] = {
    (PRODUCT, 2, "hopper"): TileConfig(128, 128, 64, 4, warps=8, stages=3, maxnreg=128),
    (PRODUCT, 4, "hopper"): TileConfig(64, 128, 32, 3, warps=8, stages=3, maxnreg=128),  # 128 rows spill
    (PRODUCT, 2, "blackwell"): TileConfig(128, 128, 64, 4, warps=8, stages=3, maxnreg=128),
    (PRODUCT, 4, "blackwell"): TileConfig(64, 128, 32, 3, warps=8, stages=3, maxnreg=128),  # 128 rows spill
    (PRODUCT, 2, "ampere"): TileConfig(64, 128, 32, 3, warps=8, stages=4, maxnreg=128),  # 128 rows spill
    (PRODUCT, 4, "ampere"): TileConfig(64, 128, 16, 3, warps=8, stages=3, maxnreg=128),
    (PRODUCT, 2, "amd"): TileConfig(128, 128, 32, 4, warps=8, stages=2),
    (PRODUCT, 4, "amd"): TileConfig(64, 128, 16, 3, warps=8, stages=2),
}
_GATHER = TileConfig(32, 128, 16, 2, warps=4, stages=2)
_DENSE = TileConfig(32, 128, 16, 2, warps=4, stages=1)


def family(backend: str, arch: int | str) -> str:
    """``("cuda", 90)`` -> "hopper"; processors without a row of their own take that of the nearest that has."""
    if backend != "cuda":
        return "amd"
    return "hopper" if arch == 90 else "blackwell" if arch in (100, 103) else "ampere"


def tile_config(source: str, operand_bytes: int, where: str) -> TileConfig:
    """The tiles of a launch. ``where``: of ``family``."""
    if source == GATHER:
        return _GATHER
    return _DENSE if source == DENSE else _TILE_CONFIGS[PRODUCT, min(4, operand_bytes), where]


# Up to how many tokens the kernel is expected to beat a library product followed by the same rule, by bytes per element
# of weight and states: docs/roofline.md. Measured limits go here once there are some.
MAX_TOKENS = {"wide": 4608, "narrow": 3072}
NARROW_BYTES = 6  # weight and states together: bf16 with 8-bit moments has 4


def max_tokens(stored_bytes: float) -> int:
    return MAX_TOKENS["narrow" if stored_bytes <= NARROW_BYTES else "wide"]
