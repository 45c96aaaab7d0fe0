"""What only a GPU runs: the interpreter takes another branch for each of these.

- instructions: ``rcp.approx``, ``sqrt.approx``, ``cvt.rn.bf16`` and the warp's integer maximum, by themselves, on many
  millions of numbers, against fp64 and torch
- prefetch: the same launch without it stores the same bits
- descriptors: the same product through pointers
- streams: a fold on one stream, forward and backward on another, a slow gate, and memory that is reused at once
- graph: replays of a captured step against steps
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

import gradfold
from benchmarks.gpu import training
from benchmarks.gpu.context import Context
from benchmarks.gpu.graphs import DRY_WARM_UP, WARM_UP, captured
from benchmarks.gpu.kernel import Cell, Launch, card_family, gradient_by_kernel, rounds_once, using
from benchmarks.gpu.worker import Case, Failed, LeftOut
from gradfold.backends import MatmulTerm
from gradfold.backends.triton.kernels import codecs, rules
from gradfold.backends.triton.tile_configs import DESCRIPTORS

COUNT, DRY_COUNT = 1 << 24, 1 << 12
BLOCK = 1024
# units in the last place that ``codecs.py`` and ``rules.py`` promise
UNITS = {"reciprocal": 1, "quotient": 3, "root": 2}
LAYERS, WIDTH = 12, 1024  # of the model whose memory is reused
SLOW_CYCLES = 40_000_000  # about 20 ms: longer than the backward that goes on meanwhile
REPLAYS = 4
APART = 0.02  # of the distance trained: how far replays may be from steps (attention's backward adds in any order)


@triton.jit
def _instruction(out, a, b, WHICH: tl.constexpr, MATH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(a + at), tl.load(b + at)
    if WHICH == 0:
        tl.store(out + at, codecs.reciprocal(y, MATH))
    elif WHICH == 1:
        tl.store(out + at, rules.div(x, y, MATH))
    elif WHICH == 2:
        tl.store(out + at, rules.sqrt(y, MATH))
    else:
        tl.store(out + at, codecs.to_bf16(x, 0, False, MATH))


@triton.jit
def _scales(out, x, FORMAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.load(x + rows[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    tl.store(out + rows, codecs.scale_of(tile, FORMAT))


def cases(context: Context) -> list[Case]:
    """Return the cases, most important first."""
    checks: list[tuple[str, Callable[[Context], dict[str, Any]]]] = [
        ("reciprocal", lambda context: instruction("reciprocal", context)),
        ("quotient", lambda context: instruction("quotient", context)),
        ("root", lambda context: instruction("root", context)),
        ("bf16 rounding", bf16_rounding),
        ("largest of a block", largest),
        ("fma", fma),
        ("prefetch", prefetch),
        ("descriptors", descriptors),
        ("streams", streams),
        ("graph", graph),  # last: a failed capture can leave the process unusable
    ]
    return [
        Case(name, lambda check=check: check(context), 0.0 if context.dry else 4.0, alone=name == "graph")
        for name, check in checks
    ]


def _math(context: Context) -> int:
    return (codecs.PLAIN if context.dry else codecs.FAST).value


def _count(context: Context) -> int:
    return DRY_COUNT if context.dry else COUNT


def _run(which: int, a: Tensor, b: Tensor, out: Tensor, context: Context) -> Tensor:
    block = DRY_COUNT if context.dry else BLOCK
    _instruction[(a.numel() // block,)](
        out, a, b, WHICH=which, MATH=_math(context), BLOCK=block, enable_fp_fusion=False
    )
    context.synchronize()
    return out


def _numbers(count: int, least: int, most: int, device: torch.device) -> Tensor:
    """Positive fp32 numbers of all mantissas, and exponents from ``least`` to ``most``; powers of two among them."""
    exponents = torch.randint(least + 127, most + 128, (count,), device=device, dtype=torch.int32)
    mantissas = torch.randint(0, 1 << 23, (count,), device=device, dtype=torch.int32)
    mantissas[:: count // 64] = 0
    return ((exponents << 23) | mantissas).view(torch.float32)


def instruction(name: str, context: Context) -> dict[str, Any]:
    """Compare approximate reciprocals, quotients or roots with fp64, in units in the last place."""
    count, device = _count(context), context.device
    a = _numbers(count, -40, 40, device)
    b = _numbers(count, *((-126, 125) if name != "quotient" else (-40, 40)), device)
    out = _run(list(UNITS).index(name), a, b, torch.empty_like(b), context)
    wanted = {"reciprocal": 1 / b.double(), "quotient": a.double() / b.double(), "root": b.double().sqrt()}[name]
    units = (out.view(torch.int32).long() - wanted.float().view(torch.int32).long()).abs()
    figures = {"checks": count, "units": int(units.max()), "limit_units": UNITS[name]}
    figures["bits_differ"] = float((units > 0).double().mean())
    if figures["units"] > UNITS[name]:
        worst = int(units.argmax())
        raise Failed(f"{name} of {float(a[worst])!r}, {float(b[worst])!r}: {float(out[worst])!r}", **figures)
    if name == "root":
        edges = torch.tensor([0.0, float("inf"), float("nan"), -1.0], device=device).repeat(BLOCK)
        edges = edges[:DRY_COUNT] if context.dry else edges
        found = _run(2, edges, edges, torch.empty_like(edges), context)[:4].tolist()
        if found[:2] != [0.0, float("inf")] or found[2] == found[2] or found[3] == found[3]:
            raise Failed(f"roots of 0, inf, nan and -1: {found}", **figures)
    return figures


def bf16_rounding(context: Context) -> dict[str, Any]:
    """Compare the processor's rounding to bf16 with torch's on the CPU, on bits of every kind."""
    count = _count(context)
    bits = torch.randint(-(2**31), 2**31, (count,), dtype=torch.int64).to(torch.int32)
    bits[: count // 4] &= ~0x7FFF  # ties, odd and even, and what is exact
    edges = torch.tensor([0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0x7F800000, 0x7F800001, 0x7FC00000, 1, 0, 0x8000, 0x7FFF])
    bits[-20:] = torch.cat([edges, edges - 2**31]).to(torch.int32)
    values = bits.view(torch.float32)
    there = values.to(context.device)
    out = _run(3, there, there, torch.empty(count, dtype=torch.int16, device=context.device), context)
    found, wanted = out.cpu().view(torch.bfloat16), values.to(torch.bfloat16)
    wrong = (found.view(torch.int16) != wanted.view(torch.int16)) & ~(found.isnan() & wanted.isnan())
    figures = {"checks": count, "bits_differ": float(wrong.double().mean())}
    if wrong.any():
        worst = int(wrong.double().argmax())
        raise Failed(f"{float(values[worst])!r} becomes {float(found[worst])!r}", **figures)
    return figures


def largest(context: Context) -> dict[str, Any]:
    """Compare the scales of blocks with those of the codecs, with what is not finite, tiny and zero among them."""
    rows, columns = (16, 128) if context.dry else (1 << 14, 128)
    values = torch.randn(rows, columns) * torch.logspace(-38, 38, rows)[:, None]
    values[1], values[2, 5], values[3, 7], values[4] = 0.0, float("inf"), float("nan"), 1e-45
    figures: dict[str, Any] = {"checks": 2 * rows}
    for name, signed, kind in (("signed", True, codecs.SIGNED8), ("unsigned", False, codecs.UNSIGNED8)):
        tile = values if signed else values.abs()
        wanted = tile.abs().amax(1)
        if not signed:  # the power of two from there up
            found = torch.frexp(wanted)
            whole = torch.where(found.mantissa == 0.5, found.exponent - 1, found.exponent)
            wanted = torch.where(wanted < 2.0**-126, torch.where(wanted > 0, 2.0**-126, 0.0), 2.0**whole)
            wanted = torch.where(tile.isfinite().all(1), wanted, float("inf"))
        there = tile.to(context.device)
        out = torch.empty(rows, device=context.device)
        _scales[(rows // 16,)](out, there, FORMAT=kind.value, ROWS=16, COLUMNS=columns)
        context.synchronize()
        got = out.cpu()
        same = (got == wanted) | (~got.isfinite() & ~wanted.isfinite())
        figures[f"{name}_bits_differ"] = float((~same).double().mean())
        if not same.all():
            worst = int((~same).double().argmax())
            raise Failed(f"the {name} scale of row {worst} is {float(got[worst])!r}, not {float(wanted[worst])!r}")
    return figures


def fma(context: Context) -> dict[str, Any]:
    """Check that a * b + c is rounded once."""
    if not rounds_once(context.device):
        if context.dry:
            raise LeftOut("this interpreter rounds twice")
        raise Failed("tl.fma rounds twice")
    return {"checks": 1}


def _operands(rows: int, columns: int, tokens: int, device: torch.device, shift: int = 0) -> MatmulTerm:
    """A product of bf16 operands whose rows begin ``shift`` elements after a multiple of 16 bytes."""

    def made(width: int) -> Tensor:
        values = torch.randn(tokens, width + 8, device=device, dtype=torch.bfloat16) * 0.1
        return values[:, shift : shift + width]

    return MatmulTerm(made(rows), made(columns))


def prefetch(context: Context) -> dict[str, Any]:
    """Compare a launch with prefetches with the same launch without."""
    if context.dry:
        raise LeftOut("the interpreter prefetches nothing")
    figures: dict[str, Any] = {"checks": 0}
    for storage, options in training.STORAGES.items():
        before = Cell(
            gradfold.AdamW, (512, 1024), torch.bfloat16, {"lr": 1e-3, "small_size": 0, **options}, device=context.device
        )
        use = _operands(512, 1024, 512, context.device)
        bits = []
        for asked in (1, 0):
            cell = before.to(context.device)
            launch = Launch(cell, [use])
            if not launch.constants["PREFETCH"]:
                raise LeftOut(f"no prefetch on {card_family()}")
            launch.constants["PREFETCH"] = asked
            launch()
            bits.append(cell.bits())
        changed = [name for name in bits[0] if not torch.equal(_ints(bits[0][name]), _ints(bits[1][name]))]
        if changed:
            raise Failed(f"{storage} states: prefetching changes {', '.join(changed)}", **figures)
        figures["checks"] += 1
    return figures


def descriptors(context: Context) -> dict[str, Any]:
    """Compare a product through tensor descriptors with the same through pointers, whole tiles and ragged ones."""
    if context.dry or card_family() not in DESCRIPTORS:
        raise LeftOut(f"no tensor descriptors on {card_family() if not context.dry else 'a CPU'}")
    figures: dict[str, Any] = {"checks": 0, "bits_differ": 0.0, "error": 0.0}
    for rows, columns, tokens in ((512, 1024, 512), (504, 1000, 123), (128, 128, 1), (8, 264, 64)):
        aligned = _operands(rows, columns, tokens, context.device)
        moved = _operands(rows, columns, tokens, context.device, shift=1)
        moved.left.copy_(aligned.left)
        moved.right.copy_(aligned.right)
        found = gradient_by_kernel([aligned], (rows, columns), context.device)
        other = gradient_by_kernel([moved], (rows, columns), context.device)
        wanted = (aligned.left.double().t() @ aligned.right.double()).cpu()
        figures["bits_differ"] = max(figures["bits_differ"], float((found != other).double().mean()))
        for one in (found, other):
            error = float((one.double() - wanted).norm() / wanted.norm())
            figures["error"] = max(figures["error"], error)
        figures["checks"] += 1
        if not figures["error"] < 1e-5:
            raise Failed(f"{rows}x{columns}, T={tokens}: a product is {figures['error']:.1e} from fp64", **figures)
    return figures


def streams(context: Context) -> dict[str, Any]:
    """Compare training on one stream with training across two, where kernels come late and freed memory is reused."""
    if context.dry:
        raise LeftOut("a CPU has no streams")
    torch.manual_seed(0)
    start = [torch.randn(WIDTH, WIDTH) * 0.03 for _ in range(LAYERS)]
    batch = torch.randn(256, WIDTH, device=context.device, dtype=torch.bfloat16)

    def trained(apart: bool) -> list[Tensor]:
        here = torch.cuda.Stream()
        gates = torch.cuda.Stream() if apart else here
        with torch.cuda.stream(gates):  # AccumulateGrad nodes are made here, and so run here
            model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in start)).to(batch)
            for layer, weight in zip(model, start, strict=True):
                layer.weight.data.copy_(weight)
            optimizer = gradfold.AdamW(model.parameters(), lr=1e-3, small_size=1, **training.STORAGES["int8"])
            fold = gradfold.fold(model, optimizer, backend="triton")
        torch.cuda.synchronize()
        for number in range(4):
            with torch.cuda.stream(here):
                loss = model(batch).float().square().mean()
                if apart and number:  # the first compiles
                    with torch.cuda.stream(gates):
                        torch.cuda._sleep(SLOW_CYCLES)
                handles = [layer.register_full_backward_hook(_litter) for layer in model] if apart else []
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                for handle in handles:
                    handle.remove()
            torch.cuda.synchronize()
        fold.remove()
        return [layer.weight.detach().cpu() for layer in model]

    pairs = list(zip(trained(False), trained(True), strict=True))
    figures = {"checks": LAYERS, "bits_differ": max(float((a != b).double().mean()) for a, b in pairs)}
    if figures["bits_differ"]:
        raise Failed("weights differ where gates run on another stream: operands were freed and reused", **figures)
    return figures


def _litter(module: nn.Module, *_: Any) -> None:
    """Overwrite what was freed: ask for memory of the operands' size, and fill it."""
    for _ in range(8):
        torch.full((256, WIDTH), float("nan"), dtype=torch.bfloat16, device=next(module.parameters()).device)


def graph(context: Context) -> dict[str, Any]:
    """Compare replays of a captured step with as many steps, with the same counters on the device."""
    shape = {**training.TINY, "tied": 1} if context.dry else {**training.LLAMA_8B, "vocabulary": 1024, "tied": 1}
    replays, warm_up = (1, DRY_WARM_UP) if context.dry else (REPLAYS, WARM_UP)
    name = f"ours int8{training.GRAPH}"
    found: list[list[Tensor]] = []
    for captures in (False, True):
        stream = None if context.dry else torch.cuda.Stream()
        batch = training.batch_of(shape, training.tokens_of(context), context.device)
        context.synchronize()
        with torch.cuda.stream(stream), training.training(name, shape, 1, context) as trainer:
            first = [param.detach().clone() for param in trainer.model.parameters()]
            step = training.step_of(trainer, batch, [])
            if captures:
                step = captured(trainer, step, stream)
            for _ in range(replays if captures else warm_up + replays):
                with using(None):
                    step()
            context.synchronize()
            states = [t for state in trainer.optimizer.state.values() for t in state.values()]
            found.append([t.detach().cpu().clone() for t in (*trainer.model.parameters(), *states)])
    differ = max(float((_ints(a) != _ints(b)).double().mean()) for a, b in zip(*found, strict=True))
    apart = moved = 0.0
    for a, b, begun in zip(*found, first, strict=False):
        apart += float((a.double() - b.double()).square().sum())
        moved += float((a.double() - begun.cpu().double()).square().sum())
    figures = {"checks": replays, "bits_differ": differ, "error": (apart / moved) ** 0.5}
    if not figures["error"] <= APART:
        raise Failed("replays do not train as steps do", **figures)
    return figures


def _ints(t: Tensor) -> Tensor:
    """Its bits, for which NaN equals itself."""
    return t.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])
