"""Find the fastest tiles: each candidate against the shipped ones, on weights and states made for it.

Nothing is tuned in place: edit ``src/gradfold/backends/triton/tile_configs.py`` by hand from what this prints.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.context import Context, quartiles
from benchmarks.gpu.kernel import DRY_TILES, Launch, card_family
from benchmarks.gpu.weights import DRY_LINEARS, LINEARS, operands
from benchmarks.gpu.worker import Case, LeftOut
from gradfold.backends.triton import tile_configs

ROUNDS = 11
COPIES = 3
SHAPES = ("gate, up", "q, o", "k, v")
TOKENS = (512, 4096)
STATES = ("bf16", "int8")  # of training.STORAGES


def candidates(where: str, dry: bool = False) -> dict[str, tile_configs.TileConfig]:
    """Return the shipped tiles first, then their neighbours without duplicates."""
    own = DRY_TILES if dry else tile_configs.tile_config(tile_configs.PRODUCT, 2, where)
    changes: list[dict[str, Any]] = [
        {},
        {"maxnreg": None},
        {"bn": 64, "levels": 3, "warps": 4, "maxnreg": None},
        {"bn": 256, "levels": 5, "maxnreg": None},
        {"levels": 3},
        {"stages": 2},
        {"stages": 4},
        {"bn": 64, "levels": 2, "warps": 4, "stages": 4, "maxnreg": None},
        {"bn": 256, "levels": 4, "maxnreg": None},
        {"bn": 64, "levels": 3, "warps": 4, "maxnreg": 168},
        {"bt": 32, "stages": 4},
        {"bt": 128, "stages": 2},
        {"group": 4},
        {"group": 16},
    ]
    if dry:
        changes = [{}, {"bn": 16}]
    made = {label(own._replace(**change)): own._replace(**change) for change in changes}
    if dry or where == "hopper":  # sub-tiles are bounded by registers elsewhere too; columns are a block everywhere
        return made
    return {name: config for name, config in made.items() if config.bt <= 2 * own.bt and config.bn <= 2 * own.bn}


def label(config: tile_configs.TileConfig) -> str:
    """Return a name such as ``(128, 128, 64) levels 4, 8 warps, 3 stages, 128 registers``."""
    registers = "" if config.maxnreg is None else f", {config.maxnreg} registers"
    return (
        f"({config.bn}, {config.bk}, {config.bt}) levels {config.levels}, {config.warps} warps, "
        f"{config.stages} stages{registers}, group {config.group}"
    )


def cases(context: Context) -> list[Case]:
    """Return the cases, most important first."""
    linears, tokens = (DRY_LINEARS, (7,)) if context.dry else (LINEARS, TOKENS)
    shapes, states = (tuple(linears), STATES[1:]) if context.dry else (SHAPES, STATES)
    own, *others = candidates(card_family(), context.dry)
    return [
        Case(
            f"{name}, T={t}, {kind}: {other}",
            lambda name=name, t=t, kind=kind, other=other: compare_tiles(
                name, linears[name], t, kind, own, other, context
            ),
            0.0 if context.dry else 2.0,
        )
        for name in shapes
        for t in tokens
        for kind in states
        for other in others
    ]


def compare_tiles(
    name: str, shape: tuple[int, int], tokens: int, states: str, own: str, other: str, context: Context
) -> dict[str, Any]:
    """Time one candidate against the shipped tiles."""
    found = candidates(card_family(), context.dry)
    each = [operands(shape, tokens, states, context) for _ in range(1 if context.dry else COPIES)]
    groups = [[Launch(one.cell, [one.use], found[which]) for one in each] for which in (own, other)]
    try:
        for group in groups:
            group[0]()
    except Exception as error:
        if type(error).__name__ == "OutOfResources":  # too much shared memory, or too many registers, for this card
            raise LeftOut(f"{other}: {error}") from None
        raise
    steps = [lambda group=group: [launch() for launch in group] for group in groups]
    with torch.no_grad():
        own_times, times = context.kernel_ms(steps, ROUNDS)
    first, median, third = quartiles([b / a for a, b in zip(own_times, times, strict=True)])
    return {
        "shape": f"{name}, T={tokens}, {states}",
        "candidate": other,
        "ours_ms": quartiles(times)[1] / len(each),
        "table_ms": quartiles(own_times)[1] / len(each),
        "ratio": median,
        "ratio_quartiles": f"{first:.3f} - {third:.3f}",
    }
