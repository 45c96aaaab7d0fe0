"""The eager chain that kernels are compared with: decode all, the rule on fp32 tiles, encode all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradfold.backends import Place, Stored, native
from gradfold.codecs import Codec, Parts, Stream, random_bits, row_offsets, state_codec, weight_codec
from gradfold.rules import Rule
from tests.cases import RULE_ROWS, RuleRow

UNSIGNED = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}
# name -> codec of the weight, and whether random bits round it
WEIGHTS: dict[str, tuple[Codec, bool]] = {
    "fp32": (weight_codec(torch.float32), False),
    "bf16": (weight_codec(torch.bfloat16), False),
    "bf16 stochastic": (weight_codec(torch.bfloat16), True),
    "fp16": (weight_codec(torch.float16), False),
    "fp16 stochastic": (weight_codec(torch.float16), True),
    "split8": (weight_codec(torch.bfloat16, "split8"), False),
    "split8 stochastic": (weight_codec(torch.bfloat16, "split8"), True),
    "split16": (weight_codec(torch.bfloat16, "split16"), False),
}
STATES = {"fp32": False, "bf16": True, "int8": True, "int4": True}  # and whether random bits round them
COMBINATIONS = [(weight, states) for states in STATES for weight in WEIGHTS]
NEAR_2_33 = 2**33 - 701  # an offset from which a row crosses it: there hashes, one for two elements, need more bits
SPECIAL = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e-45, 1.1754942e-38, 3.4e38, -3.4e38]
SPECIAL += [65504.0, 65519.9, 65520.0, 7e4, 6e-8, 5.9e-8, 2.9e-8, 6.1e-5, -6.09e-5, 1.0]


class ExactSqrt(TorchDispatchMode):
    """A correctly rounded square root, as in the kernels; torch's own is off by one unit in the last place at times.

    Twice the bits and one more rounding give the right one (Figueroa, SIGNUM 1995).
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = (kwargs or {}).get("out")
        name = func.overloadpacket.__name__
        if name not in ("sqrt", "sqrt_"):
            return func(*args, **(kwargs or {}))
        root = args[0].double().sqrt_().float()
        target = args[0] if name == "sqrt_" else out
        return root if target is None else target.copy_(root)


class Case(NamedTuple):
    """A rule with its numbers, and how its weight and states are stored."""

    rule: Rule
    numbers: Any
    names: list[str]  # of the streams: "weight", then the states
    codecs: list[Codec]
    stochastic: list[bool]
    group: dict[str, Any]

    def kernel(self) -> native.Kernel | None:
        return native.kernel(self.rule, self.numbers, self.codecs[0], self.codecs[1:], self.stochastic)

    def streams(self, step: int = 1) -> list[Stream | None]:
        return [
            Stream.of(7, step, "layer.weight", name) if wanted else None
            for name, wanted in zip(self.names, self.stochastic, strict=True)
        ]

    def keys(self, step: int = 1) -> list[Tensor | None]:
        return [None if stream is None else stream.key() for stream in self.streams(step)]

    def bound(self, parts: Sequence[Parts], step: int = 1, place: Place | None = None) -> list[Stored]:
        """Weight and states as a backend takes them."""
        return [Stored(*one, place) for one in zip(parts, self.codecs, self.streams(step), strict=True)]


def case(row: RuleRow, weight: str = "fp32", states: str = "fp32", step: int = 1, rounds: bool = True) -> Case:
    """``step`` is the step to take; at 1 a lazy state is fresh. rounds: states at random where their codec asks."""
    optimizer = row.ours([torch.nn.Parameter(torch.zeros(1))])
    rule, group = type(optimizer).rule, optimizer.param_groups[0]
    counters = {name: torch.tensor(start, dtype=torch.float64) for name, start in rule.counters.items()}
    for t in range(1, step + 1):
        numbers = rule.advance(counters, group, t == 1)
    names = [state.name for state in rule.states(group)]
    codecs = [state_codec(states, name not in UNSIGNED) for name in names]
    flags = [rounds and STATES[states] and codec.stochastic for codec in codecs]
    codec, stochastic = WEIGHTS[weight]
    return Case(rule, numbers, ["weight", *names], [codec, *codecs], [stochastic, *flags], group)


def variants() -> list[RuleRow]:
    """Rows that take different ways through their rule, whatever their numbers."""
    ways = {}
    for row in RULE_ROWS:
        given = case(row)
        ways.setdefault((row.name, tuple(bool(x) for x in given.numbers if not isinstance(x, str))), row)
    return list(ways.values())


def stored(codec: Codec, tile: Tensor) -> Parts:
    """2-D parts that hold ``tile``, or what is nearest to it."""
    parts = codec.rows_of(codec.allocate(tile.shape), tile.shape)
    for name, value in codec.encode(tile).items():
        parts[name].copy_(value)
    return parts


def make(given: Case, shape: tuple[int, int], seed: int = 0) -> tuple[list[Parts], Tensor]:
    """Parts of a weight and states of sizes that vary within a block, and a gradient with zeros in it."""
    generator = torch.Generator().manual_seed(seed)

    def spread(low: float, high: float) -> Tensor:
        power = low + (high - low) * torch.rand(shape, generator=generator)
        return torch.randn(shape, generator=generator) * 10**power

    weight, grad = spread(-3, 0), spread(-5, -1) * (torch.rand(shape, generator=generator) > 0.1)
    tiles = [spread(-5, -1) if name not in UNSIGNED else spread(-10, -2).abs() for name in given.names[1:]]
    return [stored(codec, tile) for codec, tile in zip(given.codecs, [weight, *tiles], strict=True)], grad


def make_special(given: Case, shape: tuple[int, int], seed: int) -> tuple[list[Parts], Tensor]:
    """The same with special values everywhere: the more the higher the seed, from none at 0 to nothing else at 7."""
    parts, grad = make(given, shape, seed)
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=generator)]
    chosen = torch.rand(shape, generator=generator) < (1.0 if seed == 7 else 0.02 * seed)
    for i, (codec, one) in enumerate(zip(given.codecs, parts, strict=True)):
        tile = torch.where(chosen.roll(3 * i, 1), special.roll(i, 1), codec.decode(one, shape[1]))
        parts[i] = stored(codec, tile)
    return parts, torch.where(chosen.roll(1, 0), special.roll(1, 0), grad)


def clone(parts: Sequence[Parts]) -> list[Parts]:
    return [{name: part.clone() for name, part in one.items()} for one in parts]


def eager(
    given: Case,
    parts: Sequence[Parts],
    grad: Tensor,
    first_offset: int = 0,
    row_stride: int | None = None,
    step: int = 1,
) -> list[Tensor]:
    """Step ``parts`` in place; returns the rule's fp32 results."""
    rows, columns = grad.shape
    row_stride = columns if row_stride is None else row_stride
    offsets = row_offsets(range(rows), row_stride) + first_offset
    tiles = [codec.decode(one, columns).clone() for codec, one in zip(given.codecs, parts, strict=True)]
    scratch = [torch.full_like(grad, float("nan")) for _ in range(given.rule.scratch_tiles(given.group))]
    given.rule.update(tiles[0], grad.clone(), tiles[1:], given.numbers, scratch)
    for codec, one, tile, key in zip(given.codecs, parts, tiles, given.keys(step), strict=True):
        bits = None if key is None else random_bits(key, offsets, columns)
        for name, value in codec.encode(tile, bits).items():
            one[name].copy_(value)
    return tiles


def native_step(
    given: Case,
    parts: Sequence[Parts],
    grad: Tensor,
    first_offset: int = 0,
    row_stride: int | None = None,
    step: int = 1,
) -> None:
    """The same by the kernel."""
    kernel = given.kernel()
    assert kernel is not None, native.reason()
    row_stride = grad.shape[1] if row_stride is None else row_stride
    kernel(parts[0], parts[1:], grad, given.numbers, given.keys(step), first_offset, row_stride)


def differences(wanted: Sequence[Parts], got: Sequence[Parts]) -> dict[str, int]:
    """How many elements differ, by part; a NaN equals a NaN, zeros of unlike sign differ."""
    found = {}
    for i, (one, other) in enumerate(zip(wanted, got, strict=True)):
        for name, part in one.items():
            unlike = ~same(part, other[name])
            if unlike.any():
                found[f"{i} {name}"] = int(unlike.sum())
    return found


def forget_signs_of_nan(given: Case, parts: Sequence[Parts], columns: int) -> None:
    """Where a block's scale is not finite, its codes hold the sign of a NaN, which no arithmetic promises."""
    for codec, one in zip(given.codecs, parts, strict=True):
        if "scales" in one:
            lost = ~one["scales"].isfinite()
            assert not codec.decode(one, columns)[lost.repeat_interleave(128, 1)[:, :columns]].isfinite().any()
            width = one["codes"].shape[1]
            one["codes"][lost.repeat_interleave(codec.code_width(128), 1)[:, :width]] = 0


def same(a: Tensor, b: Tensor) -> Tensor:
    """Bit for bit, with all NaNs alike."""
    if not a.dtype.is_floating_point:
        return a == b
    word = torch.int32 if a.dtype == torch.float32 else torch.int16
    return (a.contiguous().view(word) == b.contiguous().view(word)) | (a.isnan() & b.isnan())


def tile_of(parts: Sequence[Parts], given: Case, columns: int, rows: slice, cut: slice | None = None) -> list[Parts]:
    return [codec.view(one, columns, rows, cut) for codec, one in zip(given.codecs, parts, strict=True)]
