"""Tile sizes of the kernels, by gradient source, operand size and processor; tuned offline.

They are not tuned while training, where every trial would be a training step, and do not depend on the number of
tokens, so that a new sequence length compiles nothing. ``python -m benchmarks.kernels`` compiles every row and counts
what it costs.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class TileConfig(NamedTuple):
    """Tile sizes and compiler options of a kernel.

    Attributes:
        bn: Rows of the weight in a tile.
        bk: Columns of the weight in a tile: one block of a codec.
        bt: Tokens at a time.
        levels: A tile is updated in 2 ** levels sub-tiles.
        warps: Warps of a program.
        stages: Software pipelining stages.
        maxnreg: Limit of registers per thread, so that two programs fit a multiprocessor.
        group: Tiles of rows that share their columns in the L2 cache.
    """

    bn: int
    bk: int
    bt: int
    levels: int
    warps: int
    stages: int
    maxnreg: int | None = None
    group: int = 8

    def options(self) -> dict[str, int]:
        """Return the compiler options."""
        asked = {"num_warps": self.warps, "num_stages": self.stages}
        return asked if self.maxnreg is None else {**asked, "maxnreg": self.maxnreg}


DESCRIPTORS = ("hopper", "blackwell")  # families whose hardware copies tiles by descriptor
PRODUCT, GATHER, DENSE = "product", "gather", "dense"  # gradient sources of a launch
GROUPED = "grouped"  # products of experts, in the tiles of a product

# (gradient source, bytes of an operand's element, processor family)
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
    """Return the processor family: ("cuda", 90) is "hopper"; a processor without rows of its own takes similar ones."""
    if backend != "cuda":
        return "amd"
    return "hopper" if arch == 90 else "blackwell" if arch in (100, 103) else "ampere"


def tile_config(source: str, operand_bytes: int, where: str) -> TileConfig:
    """Return the tiles of a launch.

    Args:
        source: PRODUCT, GROUPED, GATHER or DENSE.
        operand_bytes: Bytes of an element of the product's operands.
        where: A processor family, from ``family``.
    """
    if source == GATHER:
        return _GATHER
    return _DENSE if source == DENSE else _TILE_CONFIGS[PRODUCT, min(4, operand_bytes), where]


# Up to how many tokens the fused kernel should beat a library product followed by the rule kernel, by bytes of weight
# and states per element: the smaller of two processors' predictions in docs/roofline.md, in steps of 256. Limits that
# were measured take their place, by processor family.
PREDICTED_MAX_TOKENS = ((3.5, 2816), (4.5, 2304), (5.5, 2560), (7.0, 3072), (math.inf, 4608))
MEASURED_MAX_TOKENS: dict[str, tuple[tuple[float, int], ...]] = {}


def max_tokens(stored_bytes: float, where: str = "hopper") -> int:
    """Return up to how many tokens the fused kernel should beat a library product and the rule's kernel.

    Args:
        stored_bytes: Bytes of weight and states per element, without scales.
        where: A processor family, from ``family``.
    """
    limits = MEASURED_MAX_TOKENS.get(where, PREDICTED_MAX_TOKENS)
    return next(tokens for most, tokens in limits if stored_bytes <= most)
