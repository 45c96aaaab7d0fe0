"""Time and peak memory of a loss head's training step: transformers' loss over logits in memory, or folded.

Three heads of one shape on one thread. plain: nn.Linear, transformers' ForCausalLMLoss, torch's fused AdamW. folded:
gradfold.linear_cross_entropy, whose weight steps in backward, with the default keep_bytes; and again with
keep_bytes=0. A step is forward, backward to the hidden states and the weight, and optimizer.step(). Times are ratios
to the plain head within a round, in alternating order. Bytes are live bytes at the peak, beyond weights, states and
batch, on fake tensors; they include the fold's scratch buffer.

    OMP_NUM_THREADS=1 python -m benchmarks.head
    OMP_NUM_THREADS=1 python -m benchmarks.head --tokens 64 --vocabulary 4096 --width 128       # a quick look
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

import gradfold
from gradfold.planner.step import step_memory

from .common import DTYPES, interleaved_ms, print_table, write_result

LR = 1e-4


class Head(nn.Module):
    """A loss head; if ``tied``, with the embedding that shares its weight and gives its input."""

    def __init__(self, vocabulary: int, width: int, tied: bool, dtype: torch.dtype):
        super().__init__()
        self.tied = tied
        torch.manual_seed(0)
        self.head = nn.Linear(width, vocabulary, bias=False, dtype=dtype)
        if tied:
            self.embed = nn.Embedding(vocabulary, width, _weight=self.head.weight)
            self.embed.weight = self.head.weight

    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the hidden states of a batch."""
        return self.embed(batch["ids"]) if self.tied else batch["x"].detach().requires_grad_()


HeadLoss = Callable[[Head, dict[str, Tensor]], Tensor]


def in_memory(model: Head, batch: dict[str, Tensor]) -> Tensor:
    """Return transformers' loss over logits in memory."""
    return ForCausalLMLoss(model.head(model.hidden(batch)), batch["ids"], model.head.out_features)


def in_blocks(keep_bytes: int | None) -> HeadLoss:
    """Return a loss function over ``linear_cross_entropy``."""

    def loss(model: Head, batch: dict[str, Tensor]) -> Tensor:
        x = model.hidden(batch)
        return gradfold.linear_cross_entropy(x, model.head.weight, batch["ids"], shift=True, keep_bytes=keep_bytes)

    return loss


@dataclass(frozen=True)
class HeadVariant:
    """One way to train the head."""

    name: str
    loss: HeadLoss
    fold: bool

    def optimizer(self, params: Any) -> Any:
        """Return the optimizer."""
        return gradfold.AdamW(params, lr=LR) if self.fold else torch.optim.AdamW(params, lr=LR, fused=True)


HEAD_VARIANTS = [
    HeadVariant("plain", in_memory, fold=False),
    HeadVariant("folded", in_blocks(None), fold=True),
    HeadVariant("folded, nothing kept", in_blocks(0), fold=True),
]


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--pairs", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--warm-up", type=int, default=1, help="untimed rounds (default 1)")
    parser.add_argument("--tied", action="store_true", help="tie the head to an embedding")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/head.json)")
    args = parser.parse_args()
    if args.pairs < 1:
        parser.error(f"--pairs {args.pairs}: give at least 1")
    torch.set_num_threads(args.threads)

    shape = {"tokens": args.tokens, "vocabulary": args.vocabulary, "width": args.width, "dtype": args.dtype}
    peaks = peak_bytes(make_head(args), hidden_batch(args))
    times = interleaved_ms(
        [make_step(one, make_head(args)(), hidden_batch(args)) for one in HEAD_VARIANTS], args.pairs, args.warm_up
    )
    rows = []
    for one, peak, taken_ms in zip(HEAD_VARIANTS, peaks, times, strict=True):
        ratios = [mine / plain for mine, plain in zip(taken_ms, times[0], strict=True)]
        rows.append(
            {
                "head": one.name,
                **shape,
                "tied": args.tied,
                "pairs": args.pairs,
                "step_ms_median": statistics.median(taken_ms),
                "time_ratio_median": statistics.median(ratios),
                "time_ratio_least": min(ratios),
                "time_ratio_most": max(ratios),
                "peak_bytes": peak,
                "peak_ratio": peak / peaks[0],
            }
        )
    print_table(
        ["", "step ms", "time ratio", "least - most", "peak MiB", "peak ratio"],
        [
            [
                row["head"],
                f"{row['step_ms_median']:.0f}",
                f"{row['time_ratio_median']:.3f}",
                f"{row['time_ratio_least']:.3f} - {row['time_ratio_most']:.3f}",
                f"{row['peak_bytes'] / 2**20:.0f}",
                f"{row['peak_ratio']:.3f}",
            ]
            for row in rows
        ],
    )
    print(f"\nwritten to {write_result('head', rows, args.out)}")


def make_head(args: argparse.Namespace) -> Callable[[], Head]:
    """Return a function that makes the head."""
    return lambda: Head(args.vocabulary, args.width, args.tied, DTYPES[args.dtype])


def hidden_batch(args: argparse.Namespace) -> dict[str, Tensor]:
    """Return one sequence that is its own labels, and hidden states for an untied head."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, args.vocabulary, (1, args.tokens), generator=generator)
    x = torch.randn(1, args.tokens, args.width, generator=generator).to(DTYPES[args.dtype])
    return {"ids": ids, "x": x}


def peak_bytes(make: Callable[[], Head], batch: dict[str, Tensor]) -> list[int]:
    """Return each variant's peak above what the plain variant keeps between steps (weights, states, batch)."""
    steps = [step_memory(make, one.optimizer, batch, fold=one.fold, loss=one.loss) for one in HEAD_VARIANTS]
    return [step.peak_bytes - steps[0].resting_bytes for step in steps]


def make_step(one: HeadVariant, model: Head, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Return a function that takes one training step."""
    optimizer = one.optimizer(model.parameters())
    if one.fold:
        gradfold.fold(model, optimizer)

    def step() -> None:
        one.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
