"""Small models folded with the Triton backend over several steps: biases, embeddings, ties, norms, deferred gradients.

The same training in fp64 with torch's AdamW is the truth; the reference backend's distance from it is the yardstick.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gradfold
from benchmarks.gpu import training
from benchmarks.gpu.context import Context
from benchmarks.gpu.worker import Case, Failed

FACTOR, NEGLIGIBLE = 2.0, 1e-4  # as in correctness.py, relative to the distance that training covers
STEPS = 4
LR = 1e-2  # far enough for bf16 weights to see


class FoldedNet(nn.Module):
    """An embedding with a padding id, Linears with bias, a norm, one weight used twice, and a head, tied or not."""

    def __init__(self, width: int, hidden: int, words: int, tied: bool):
        super().__init__()
        self.embed = nn.Embedding(words, width, padding_idx=0)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return the loss."""
        x = self.embed(ids)
        for _ in range(2):
            x = x + self.down(torch.tanh(self.up(self.norm(x))))
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), ids.roll(-1, 1).flatten())


def cases(context: Context) -> list[Case]:
    """Return the cases, most important first."""
    size = (24, 40, 36) if context.dry else (132, 260, 516)
    options: list[tuple[torch.dtype, dict[str, Any], bool, dict[str, Any]]] = [
        (torch.float32, {}, True, {"clip_norm": 0.5}),
        (torch.bfloat16, {"states": "int8", "rounding": "stochastic", "small_size": 1}, False, {}),
    ]
    if not context.dry:
        options += [
            (torch.float32, {}, False, {}),
            (torch.float32, {}, True, {"accumulate": 2}),
            (torch.float32, {"states": "int8", "small_size": 0}, True, {}),
            (torch.float32, {"states": "int4", "small_size": 1}, False, {}),
            (torch.bfloat16, {"states": "int8", "small_size": 1}, False, {}),
            (torch.bfloat16, {"states": "int4", "rounding": "stochastic", "small_size": 1}, True, {}),
            (torch.bfloat16, {"states": "bf16", "small_size": 1}, True, {}),
            (torch.bfloat16, {"states": "fp32", "master": "split16"}, False, {"accumulate": 2}),
            (torch.bfloat16, {"states": "int8", "master": "split8", "small_size": 1}, False, {"clip_norm": 0.5}),
        ]

    def case(dtype: torch.dtype, storage: dict[str, Any], tied: bool, how: dict[str, Any]) -> Case:
        words = [str(dtype).removeprefix("torch."), "tied" if tied else "untied"]
        words += [f"{name}={value}" for name, value in {**storage, **how}.items()]
        return Case(", ".join(words), lambda: check_fold(dtype, storage, tied, how, size, context))

    return [case(*option) for option in options]


def check_fold(
    dtype: torch.dtype, storage: dict[str, Any], tied: bool, how: dict[str, Any], size: Any, context: Context
) -> dict[str, Any]:
    """Train one case on the GPU and compare it with fp64."""
    torch.manual_seed(0)
    start = FoldedNet(*size, tied).to(dtype)
    micro_batches, steps = how.get("accumulate", 1), 2 if context.dry else STEPS
    batches = [torch.randint(0, size[2], (2, 9 if context.dry else 65)) for _ in range(steps * micro_batches)]

    def copy_of(device: torch.device | str, dtype: torch.dtype = dtype) -> FoldedNet:
        made = FoldedNet(*size, tied).to(dtype)
        made.load_state_dict({name: value.to(dtype) for name, value in start.state_dict().items()})
        return made.to(device)

    truth = copy_of("cpu", torch.float64)
    plain = torch.optim.AdamW(truth.parameters(), lr=LR)
    norms = []
    for first in range(0, len(batches), micro_batches):
        for batch in batches[first : first + micro_batches]:
            truth(batch).backward()
        limit = how.get("clip_norm", float("inf"))
        norms.append(float(nn.utils.clip_grad_norm_(truth.parameters(), limit)))
        plain.step()
        plain.zero_grad()

    def trained(device: torch.device, fold: Callable[[nn.Module, Any], Any]) -> tuple[float, float]:
        """The distance of the weights from the truth's, and of the last norm."""
        model = copy_of(device)
        optimizer = gradfold.AdamW(model.parameters(), lr=LR, **storage)
        folded = fold(model, optimizer)
        with training.using(None):
            for first in range(0, len(batches), micro_batches):
                for batch in batches[first : first + micro_batches]:
                    model(batch.to(device)).backward()
                optimizer.step()
                optimizer.zero_grad()
        apart = moved = 0.0
        for found, wanted, begun in zip(model.parameters(), truth.parameters(), start.parameters(), strict=True):
            apart += float((found.detach().cpu().double() - wanted.detach()).square().sum())
            moved += float((wanted.detach() - begun.detach().double()).square().sum())
        return (apart / moved) ** 0.5, abs(float(folded.grad_norm or 0.0) / norms[-1] - 1)

    cpu = torch.device("cpu")
    reference, reference_norm = trained(cpu, lambda m, o: gradfold.fold(m, o, backend="reference", **how))
    error, norm = trained(context.device, lambda m, o: gradfold.fold(m, o, backend="triton", **how))
    figures = {"error": error, "reference_error": reference, "norm_error": norm, "reference_norm_error": reference_norm}
    if not error <= FACTOR * reference + NEGLIGIBLE:
        raise Failed("weights are further from fp64 training than the reference backend's", **figures)
    if not norm <= FACTOR * reference_norm + (1e-4 if dtype == torch.float32 else 2e-2):
        raise Failed("the gradient's norm is further from fp64 training's than the reference backend's", **figures)
    return figures
