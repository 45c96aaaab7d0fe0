"""Every kernel, rule and storage on fresh random numbers: is a launch right, and is it right each time?

For each case, on operands that lie in larger buffers full of NaN:

- fp64: weight and states after one launch are as near to the step in fp64 as the reference backend's, within a factor;
- bits: given the gradient that the kernel itself has summed, the reference backend on the CPU stores the same bits.
  Where the weight has 16 bits the kernels take approximate reciprocals and roots (``MATH`` is ``FAST``): a few weights
  may be a unit away (``UNITS``), and a few signed codes, which are divided by a scale, one code; all else is the same;
- writes: nothing outside of a slice moves, and every tile's norm is written (they are NaN before the launch);
- race: the same launch on copies, 20 times, stores the same bits;
- masks: tiles whose gradient is not finite keep their bits, the others step as they do without.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import gradfold
from benchmarks.gpu.context import Context
from benchmarks.gpu.kernel import Cell, Launch, gradient_by_kernel, rounds_once
from benchmarks.gpu.worker import Case, Failed
from gradfold.backends import DenseTerm, GatherTerm, GradTerm, GroupedTerm, MatmulTerm
from gradfold.engine import Region

REPEATS = 20
FACTOR = 2.0  # how much further from fp64 than the reference's a result may be
NEGLIGIBLE = 1e-5  # ... and below which it does not matter, in units of the step
# approximate reciprocals and roots, where the weight is not fp32: of how many elements another bit may come out, and by
# how much of the element then, per storage of the weight
OTHER_BITS = 2e-3
TINY = 1e-7  # below fp16's normal numbers units are absolute
UNITS = {"bf16": 2.0**-7, "fp16": 2.0**-10, "split8": 2.0**-14, "split16": 2.0**-21}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUND, ODD, SMALL = (256, 512), (252, 507), (3, 5)
EXPERTS, ODD_EXPERTS = (6, 256, 512), (5, 200, 331)

RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (gradfold.AdamW, {"weight_decay": 0.1}),
    "adam amsgrad coupled": (gradfold.Adam, {"amsgrad": True, "weight_decay": 0.1, "maximize": True}),
    "sgd": (gradfold.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "sgd nesterov": (gradfold.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "lion": (gradfold.Lion, {"weight_decay": 0.1}),
    "rmsprop": (gradfold.RMSprop, {"weight_decay": 0.1}),
    "rmsprop momentum": (gradfold.RMSprop, {"momentum": 0.9}),
    "rmsprop centered": (gradfold.RMSprop, {"centered": True, "states": "fp32"}),
    "adagrad": (gradfold.Adagrad, {}),
    "nadam": (gradfold.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "radam": (gradfold.RAdam, {"weight_decay": 0.1}),
}


@dataclass(frozen=True)
class Example:
    """One case: rule, storage, shape and gradient source."""

    rule: str = "adamw"
    dtype: str = "bf16"
    states: str | None = "fp32"
    master: str | None = None
    rounding: str | None = None
    shape: tuple[int, ...] = ODD
    source: str = "product"
    tokens: int = 123
    operand: str = "bf16"
    region: Region | None = None
    options: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def key(self) -> str:
        """Name of the row."""
        storage = [self.dtype, self.states or "as torch", self.master, self.rounding]
        where = "x".join(map(str, self.shape)) + ("" if self.region is None else f" {self.region}")
        words = [self.rule, *filter(None, storage), where, f"{self.source} of {self.operand}", f"T={self.tokens}"]
        return ", ".join(words)


def examples() -> list[Example]:
    """Return a compact set of cases, the most common in training first."""
    # every storage of bf16 weights: what we recommend first
    masters = (None, "split8", "split16")
    kinds = [(m, s) for m in masters for s in ("int8", "int4", "bf16", "fp32")]
    found = [Example(states=s, master=m, rounding="stochastic", shape=ROUND, tokens=512) for m, s in kinds]
    experts = [(EXPERTS, "stochastic", 512), (ODD_EXPERTS, None, 123)]
    found += [
        Example(states="int8", rounding=rounding, shape=shape, tokens=tokens, source=source)
        for shape, rounding, tokens in experts
        for source in ("experts", "experts x 2")
    ]
    found += [Example(states=s, master=m) for m, s in kinds]
    found += [Example(dtype="fp32", operand=o, states=s) for o, s in (("fp32", None), ("bf16", "int8"))]
    found += [Example(dtype="fp16", operand="fp16", states=s) for s in (None, "int8")]
    sources = ("product x 3", "gather", "gather x 2", "dense", "dense x 2", "mixed")
    found += [Example(dtype=d, operand=d, states="int8", source=s) for s in sources for d in ("bf16", "fp32")]
    found += [Example(dtype="fp32", states="fp32", tokens=tokens) for tokens in (1, 7, 64)]
    found += [Example(dtype="fp32", states="int4", shape=shape) for shape in (SMALL, (129, 128), (1, 384))]
    found += [Example(dtype="bf16", states="fp32", shape=(509,), source="dense", operand="bf16")]
    rows, columns = Region(0, 128, 200), Region(1, 128, 384)
    found += [Example(states="int8", shape=ROUND, region=region) for region in (rows, columns)]
    found += [Example(dtype="fp32", rule=rule, states=s, source="dense") for rule in RULES for s in ("fp32", "int8")]
    found += [Example(rule=rule, states=s, rounding="stochastic") for rule in RULES for s in ("bf16", "int4", "fp32")]
    # SGD has no state, and the centered rule takes fp32 ones alone
    return [e for e in dict.fromkeys(found) if e.states == "fp32" or e.rule not in ("sgd", "rmsprop centered")]


def dry_examples() -> list[Example]:
    """Return one small case of each kind."""
    return [
        Example(states="int8", shape=(34, 140), tokens=16),
        Example(states="int8", master="split8", rounding="stochastic", shape=(34, 140), tokens=7),
        Example(dtype="fp32", operand="fp32", states="int4", source="mixed", shape=(40, 130), tokens=7),
        Example(dtype="fp32", rule="lion", states="fp32", source="dense", shape=(34, 130), operand="fp32"),
        Example(states="int8", rounding="stochastic", shape=(3, 34, 140), tokens=16, source="experts x 2"),
        Example(states="int8", shape=(40, 256), tokens=1, region=Region(1, 128, 256)),
    ]


def cases(context: Context) -> list[Case]:
    """Return the cases, most important first."""
    chosen = dry_examples() if context.dry else examples()
    seconds = 0.0 if context.dry else 8.0  # to compile two kernels
    return [Case(example.key, lambda example=example: check_example(example, context), seconds) for example in chosen]


def check_example(example: Example, context: Context) -> dict[str, Any]:
    """Run all checks of one example; raises Failed with the first that fails."""
    seed = random.SystemRandom().randrange(2**31)
    torch.manual_seed(seed)
    made, options = RULES[example.rule]
    options = {"states": example.states, "master": example.master, "rounding": example.rounding, **options}
    options = {"small_size": 0, "lr": 1e-3, **{name: value for name, value in options.items() if value is not None}}
    before = Cell(made, example.shape, DTYPES[example.dtype], options, example.region)
    uses = uses_of(example, tuple(before.param.shape))
    there = [_moved(use, context.device) for use in uses]
    figures: dict[str, Any] = {"seed": seed, "checks": "fp64, bits, writes, race, masks", "repeats": _repeats(context)}

    stepped = before.to(context.device)
    launch = Launch(stepped, there)
    launch()
    context.synchronize()
    if launch.norms.isnan().any():
        raise Failed("writes: a tile's norm was not written, or is NaN", **figures)
    grad64 = truth_of(uses, before.param.shape)
    if not torch.isclose(launch.norms.double().square().sum().cpu(), grad64.square().sum(), rtol=1e-3):
        raise Failed("writes: the norms are not the gradient's", **figures)

    reference = before.to("cpu")
    reference.by_reference([_fresh(use) for use in uses])
    truth = before.truth(grad64)
    figures["error"] = _distance(stepped, truth, before)
    figures["reference_error"] = _distance(reference, truth, before)
    if not figures["error"] <= FACTOR * figures["reference_error"] + NEGLIGIBLE:
        raise Failed("fp64: further from it than the reference", **figures)

    grad = gradient_by_kernel(there, tuple(before.param.shape), context.device)
    twin = before.to("cpu")
    twin.by_reference([DenseTerm(grad)])
    figures["bits_differ"], wrong = _other_bits(example, stepped, twin)
    if wrong and not rounds_once(context.device):
        figures["note"] = f"bits not judged, since this interpreter's fma rounds twice: {wrong}"
    elif wrong:
        raise Failed(f"bits: {wrong}", **figures)

    first = stepped.bits()
    for _ in range(_repeats(context)):
        again = before.to(context.device)
        Launch(again, there)()
        if changed := _changed(first, again.bits()):
            raise Failed(f"race: another launch left other bits in {changed}", **figures)
    if wrong := masks(before, uses, first, launch, context):
        raise Failed(f"masks: {wrong}", **figures)
    return figures


def uses_of(example: Example, shape: tuple[int, ...]) -> list[GradTerm]:
    """Return the terms of the gradient, on the CPU."""
    rows, columns = (1, shape[0]) if len(shape) == 1 else shape[-2:]
    dtype, tokens = DTYPES[example.operand], example.tokens

    def product(tokens: int) -> GradTerm:
        return MatmulTerm(_poisoned(tokens, rows, dtype), _poisoned(tokens, columns, dtype))

    def gather(tokens: int, padding: int | None) -> GradTerm:
        return GatherTerm(torch.randint(0, rows, (tokens,)), _poisoned(tokens, columns, dtype), padding)

    def dense() -> GradTerm:
        grad = _poisoned(rows, columns, dtype)
        return DenseTerm(grad.reshape(shape) if len(shape) == 1 else grad)

    def experts(tokens: int) -> GradTerm:
        """Some have no token, and the last tokens no expert."""
        ends = torch.randint(0, max(1, tokens - 2), (shape[0],)).sort().values
        ends[1] = ends[0]
        return GroupedTerm(_poisoned(tokens, rows, dtype), _poisoned(tokens, columns, dtype), ends.to(torch.int32))

    if example.source.startswith("experts"):
        return [experts(tokens), experts(70)][: 1 + example.source.endswith("x 2")]
    kinds: dict[str, list[GradTerm]] = {
        "product": [product(tokens)],
        "product x 3": [product(tokens), product(1), product(70)],
        "gather": [gather(tokens, 0)],
        "gather x 2": [gather(tokens, None), gather(33, 1)],
        "dense": [dense()],
        "dense x 2": [dense(), dense()],
        "mixed": [product(tokens), gather(tokens, 0), dense()],
    }
    return kinds[example.source]


def _poisoned(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random numbers in the corner of a larger buffer of NaN: a load past an edge shows. Rows stay 16-byte aligned."""
    around = torch.full((rows + 3, (columns // 8 + 2) * 8), float("nan"), dtype=dtype)
    around[:rows, :columns] = torch.randn(rows, columns).to(dtype) * 0.1
    return around[:rows, :columns]


def _moved(use: GradTerm, device: torch.device) -> GradTerm:
    """The same use on a device, in the same kind of buffer."""

    def move(t: Tensor) -> Tensor:
        if t.dim() != 2:
            return t.to(device)
        around = torch.full((t.shape[0] + 3, (t.shape[1] // 8 + 2) * 8), float("nan"), dtype=t.dtype, device=device)
        around[: t.shape[0], : t.shape[1]] = t.to(device)
        return around[: t.shape[0], : t.shape[1]]

    return use.map(move)


def _fresh(use: GradTerm) -> GradTerm:
    return use.map(lambda t: t.clone())


def truth_of(uses: list[GradTerm], shape: torch.Size) -> Tensor:
    """Return the gradient in fp64."""
    total = torch.zeros(shape, dtype=torch.float64)
    for use in uses:
        if isinstance(use, MatmulTerm):
            total += (use.left.double().t() @ use.right.double()).view(shape)
        elif isinstance(use, GroupedTerm):
            for expert in range(use.experts):
                for left, right in use.products(expert):
                    total[expert] += left.double().t() @ right.double()
        elif isinstance(use, GatherTerm):
            grad = use.grad.double()
            if use.padding_idx is not None:
                grad = grad.masked_fill((use.ids == use.padding_idx)[:, None], 0)
            total.index_add_(0, use.ids, grad)
        else:
            total += use.grad.double().view(shape)
    return total


def _distance(cell: Cell, truth: list[Tensor], before: Cell) -> float:
    """The largest over weight and states: root mean square of the error, in units of that of the step."""
    errors = []
    for found, wanted, old in zip(cell.decoded(), truth, before.decoded(), strict=True):
        step = (wanted - old).square().mean().sqrt().clamp(min=1e-30)
        errors.append(float((found - wanted).square().mean().sqrt() / step))
    return max(errors)


def _other_bits(example: Example, found: Cell, wanted: Cell) -> tuple[float, str]:
    """The largest share of elements of a tensor that differ, and what is wrong with that, if anything."""
    ours, theirs = found.bits(), wanted.bits()
    shares = {name: float((_ints(ours[name]) != _ints(theirs[name])).double().mean()) for name in theirs}
    worst = max(shares.values())
    # only where the weight is not fp32 may a quotient or a root differ; RMSprop's momentum is made of quotients
    loose = {"weight", "weight.residual"} if example.dtype != "fp32" else set()
    if example.rule == "rmsprop momentum" and loose:
        loose |= {name for name in theirs if name.startswith("momentum_buffer")}
    codes = found.signed_codes() if loose else {}
    for name, share in shares.items():
        if share and name not in loose | codes.keys():
            return worst, f"{share:.2%} of {name} differ"
        if share > OTHER_BITS and name in {"weight", *codes} - {"momentum_buffer.codes"}:
            return worst, f"{share:.2%} of {name} differ, where {OTHER_BITS:.2%} may"
        if name in codes and name not in loose and (steps := codes_apart(ours[name], theirs[name], codes[name])) > 1:
            return worst, f"{name} are up to {steps} codes apart"
    unit = UNITS.get(example.master or example.dtype, 0.0)
    a, b = found.decoded()[0], wanted.decoded()[0]
    apart = (a - b).abs() > unit * torch.maximum(a.abs(), b.abs()) + TINY
    return worst, f"{int(apart.sum())} weights are more than a unit apart" if apart.any() else ""


def codes_apart(ours: Tensor, theirs: Tensor, code_bits: int) -> int:
    """Return how many steps of a signed code two tensors are apart at most; two codes of 4 bits share a byte."""

    def codes(t: Tensor) -> Tensor:
        whole = _ints(t).int()
        return whole if code_bits == 8 else torch.stack([whole << 28 >> 28, whole << 24 >> 28])

    return int((codes(ours) - codes(theirs)).abs().max())


def _changed(first: dict[str, Tensor], second: dict[str, Tensor]) -> str:
    return ", ".join(name for name in first if not torch.equal(_ints(first[name]), _ints(second[name])))


def _ints(t: Tensor) -> Tensor:
    """Its bits, for which NaN equals itself."""
    return t.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def masks(before: Cell, uses: list[GradTerm], clean: dict[str, Tensor], launch: Launch, context: Context) -> str:
    """Return what is wrong after a step of a matrix with one non-finite gradient row; empty if nothing."""
    shape = before.param.shape
    if len(shape) != 2:
        return ""
    row = int(torch.randint(0, shape[0], ()))
    bad = [_fresh(use) for use in uses]
    if isinstance(bad[0], MatmulTerm):
        bad[0].left[0, row] = float("inf")
    elif isinstance(bad[0], DenseTerm):
        bad[0].grad[row] = float("nan")
    else:
        found = torch.nonzero(bad[0].ids != (-1 if bad[0].padding_idx is None else bad[0].padding_idx))
        if not len(found):
            return ""
        row = int(bad[0].ids[found[0, 0]])
        bad[0].grad[found[0, 0]] = float("inf")
    cell = before.to(context.device)
    marred = Launch(cell, [_moved(use, context.device) for use in bad])
    marred()
    first = row // launch.config.bn * launch.config.bn
    inside = slice(first, first + launch.config.bn)
    offset = before.region.start if before.region is not None and before.region.dim == 0 else 0
    old = before.bits()
    for name, found in cell.bits().items():
        move = offset if name == "weight" else 0
        height = inside.stop if name != "weight" else min(inside.stop, shape[0])
        tiles = slice(inside.start + move, height + move)
        wanted = clean[name].clone()
        wanted[tiles] = old[name][tiles]
        if not torch.equal(_ints(wanted), _ints(found)):
            return f"{name} of tiles that are not finite moved, or others did not"
    told = int(marred.norms.isnan().sum())
    columns = -(-shape[1] // launch.config.bk)
    return "" if told == columns else f"{told} norms are NaN, where {columns} tiles are"


def _repeats(context: Context) -> int:
    return 1 if context.dry else REPEATS
