"""A folded step of one weight, beside what it replaces, at Llama-3.1-8B's shapes.

Each contestant goes through several copies of a weight in turn, from a cold L2:

    ours       the kernel ``fold_step``
    backend    ``Triton.step``: Python's work and the backend's choice of a route included
    dw         the library's product alone, its gradient written in bf16
    separate   that product, then torch's fused AdamW: bf16 states whatever ours are, since it knows no others
    side       the same, the optimizer on a stream beside the next product
    blocks     the reference backend's row blocks on this card: only where states are bf16, which it keeps as torch does
    copy       a plain copy that moves as many bytes as ours

Figures are milliseconds per weight, and ratios ours / theirs within rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.context import Context, quartiles, ratios
from benchmarks.gpu.kernel import Launch, by_backend, row_blocks
from benchmarks.gpu.weights import DRY_LINEARS, DRY_TOKENS, LINEARS, TOKENS, Operands, operands
from benchmarks.gpu.worker import Case

ROUNDS = 15
STATES = ("int8", "bf16", "split8", "fp32", "int4")  # of training.STORAGES
LARGE = 2**28  # elements: of such weights two copies, else four


def cases(context: Context) -> list[Case]:
    """Return the cases, most important first."""
    linears, tokens = (DRY_LINEARS, DRY_TOKENS) if context.dry else (LINEARS, TOKENS)
    order = [
        (name, t, states)
        for group in (STATES[:2], STATES[2:])
        for name in linears
        for t in tokens
        for states in (group if not context.dry else group[:1])
    ]
    return [
        Case(
            f"{name} {'x'.join(map(str, linears[name]))}, T={t}, {states}",
            lambda name=name, t=t, states=states: timed(linears[name], t, states, context),
            0.0 if context.dry else 3.0,
        )
        for name, t, states in order
    ]


def timed(shape: tuple[int, int], tokens: int, states: str, context: Context) -> dict[str, Any]:
    """Time one weight's step in all ways."""
    copies = 1 if context.dry else 2 if shape[0] * shape[1] > LARGE else 4
    each = [operands(shape, tokens, states, context) for _ in range(copies)]
    launches = [Launch(one.cell, [one.use]) for one in each]
    contestants: dict[str, Callable[[], Any]] = {
        "ours": lambda: [launch() for launch in launches],
        **separate(each, shape, context),
        "copy": copied(each, context),
    }
    if not context.dry or tokens == 1:  # the interpreter's time
        steps = [by_backend(one.cell, [one.use]) for one in each]
        contestants["backend"] = lambda: [step() for step in steps]
    if states == "bf16":
        blocks = [row_blocks(one.cell, [one.use]) for one in each]
        contestants["blocks"] = lambda: [step() for step in blocks]
    with torch.no_grad():
        times = dict(zip(contestants, context.kernel_ms(list(contestants.values()), ROUNDS), strict=True))
    per_weight = {name: [ms / copies for ms in found] for name, found in times.items()}
    figures: dict[str, Any] = {"tokens": tokens, "states": states, "shape": "x".join(map(str, shape))}
    for name, found in per_weight.items():
        figures[f"{name}_ms"] = quartiles(found)[1]
        if name != "ours":
            figures |= ratios(f"ours_{name}", per_weight["ours"], found)
    ours_s = figures["ours_ms"] / 1e3
    figures["ours_gb_s"] = each[0].moved_bytes / ours_s / 1e9
    figures["copy_gb_s"] = each[0].moved_bytes / (figures["copy_ms"] / 1e3) / 1e9
    figures["ours_tflop_s"] = 2 * tokens * shape[0] * shape[1] / ours_s / 1e12
    figures["dw_tflop_s"] = 2 * tokens * shape[0] * shape[1] / (figures["dw_ms"] / 1e3) / 1e12
    return figures


def separate(each: list[Operands], shape: tuple[int, int], context: Context) -> dict[str, Callable[[], Any]]:
    """Return functions for the library product alone, and followed by torch's fused AdamW."""
    weights = [one.cell.param.clone() for one in each]
    moments = [[torch.zeros_like(w), torch.zeros_like(w)] for w in weights]
    grads = [torch.empty_like(w) for w in weights]
    count = torch.ones((), dtype=torch.float32, device=context.device)

    def product(i: int) -> None:
        torch.mm(each[i].use.left.t(), each[i].use.right, out=grads[i])

    def adamw(i: int) -> None:
        first, second = moments[i]
        torch._fused_adamw_(
            [weights[i]],
            [grads[i]],
            [first],
            [second],
            [],
            [count],
            lr=1e-5,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.01,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )

    def products() -> None:
        for i in range(len(each)):
            product(i)

    def in_turn() -> None:
        for i in range(len(each)):
            product(i)
            adamw(i)

    found: dict[str, Callable[[], Any]] = {"dw": products, "separate": in_turn}
    if context.dry:
        return found | {"side": in_turn}
    side = torch.cuda.Stream()

    def beside() -> None:
        main = torch.cuda.current_stream()
        for i in range(len(each)):
            product(i)
            side.wait_stream(main)
            with torch.cuda.stream(side):
                adamw(i)
        main.wait_stream(side)

    return found | {"side": beside}


def copied(each: list[Operands], context: Context) -> Callable[[], Any]:
    """Return a function that reads half of the bytes a folded step moves, and writes the other half."""
    buffers = [torch.empty((2, one.moved_bytes // 2), dtype=torch.uint8, device=context.device).zero_() for one in each]

    def copy() -> None:
        for source, target in buffers:
            target.copy_(source)

    return copy
