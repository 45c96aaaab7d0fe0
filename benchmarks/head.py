"""Time and peak memory of a loss head's training step: with logits in memory, in chunks, and folded.

Heads of one shape on one thread, each with nn.Linear's weight and a step of AdamW:

    plain                transformers' ForCausalLMLoss over logits in memory, torch's fused AdamW
    torch, chunked       torch.nn.functional.linear_cross_entropy (torch 2.13), default options, the same AdamW
    Liger, CCE           LigerFusedLinearCrossEntropyLoss and cut_cross_entropy.linear_cross_entropy, the same; their
                         kernels are Triton's: on a processor their rows say why they did not run
    folded               gradfold.linear_cross_entropy, whose weight steps in backward, with the default keep_bytes;
                         and again with keep_bytes=0

A step is forward, backward to the hidden states and the weight, and optimizer.step(). Times are ratios to the plain
head within a round, in alternating order. Bytes are what torch's allocator had handed out at the peak of a real step,
by its own events, beyond the plain head's weights, states and batch; they include the fold's scratch buffer. torch's
documentation says that its chunks pay where there are at least as many tokens as the head is wide: so it is here.

    OMP_NUM_THREADS=1 python -m benchmarks.head                            # about 4 minutes on a quiet machine
    OMP_NUM_THREADS=1 python -m benchmarks.head --only memory
    OMP_NUM_THREADS=1 python -m benchmarks.head --tokens 64 --vocabulary 4096 --width 128       # a quick look
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers.loss.loss_utils import ForCausalLMLoss

import gradfold

from .common import DTYPES, RESULTS, AllocatorBytes, allocator_bytes, interleaved_ms, print_table
from .peers.base import message
from .resumable import ResultFile

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


def shifted(model: Head, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return hidden states [T - 1, H] and the words that follow them [T - 1]."""
    return model.hidden(batch)[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten()


def in_chunks(model: Head, batch: dict[str, Tensor]) -> Tensor:
    """Return torch's loss over chunks of tokens."""
    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError(f"torch {torch.__version__} has no linear_cross_entropy; 2.13 has")
    x, labels = shifted(model, batch)
    return F.linear_cross_entropy(x, model.head.weight, labels, options=nn.LinearCrossEntropyOptions())


def liger(model: Head, batch: dict[str, Tensor]) -> Tensor:
    """Return Liger's loss."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    x, labels = shifted(model, batch)
    return LigerFusedLinearCrossEntropyLoss()(model.head.weight, x, labels)


def cut(model: Head, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of Cut Your Losses."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(model.hidden(batch), model.head.weight, batch["ids"], shift=True)


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
    HeadVariant("torch, chunked", in_chunks, fold=False),
    HeadVariant("Liger", liger, fold=False),
    HeadVariant("CCE", cut, fold=False),
    HeadVariant("folded", in_blocks(None), fold=True),
    HeadVariant("folded, nothing kept", in_blocks(0), fold=True),
]


PLAIN = HEAD_VARIANTS[0].name
SHAPE = ("tokens", "vocabulary", "width", "dtype", "tied")


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="(default 2,048)")
    parser.add_argument("--vocabulary", type=int, default=32_768, help="(default 32,768)")
    parser.add_argument("--width", type=int, default=1024, help="(default 1,024)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="(default fp32)")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--warm-up", type=int, default=1, help="untimed rounds (default 1)")
    parser.add_argument("--tied", action="store_true", help="tie the head to an embedding")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["memory", "time"], help="one kind of figure (default: both)")
    parser.add_argument("--out", type=Path, default=RESULTS / "head.json")
    args = parser.parse_args()
    if args.pairs < 1:
        parser.error(f"--pairs {args.pairs}: give at least 1")
    torch.set_num_threads(args.threads)

    shape = {name: getattr(args, name) for name in SHAPE}
    results = ResultFile("head", args.out, ("head", "what", *SHAPE))
    refused = {one.name: reason for one in HEAD_VARIANTS if (reason := why_not(one, args))}
    running = [one for one in HEAD_VARIANTS if one.name not in refused]
    made: dict[str, list[dict[str, Any]]] = {}
    if args.only != "time":
        made["memory"] = memory_rows(running, args)
    if args.only != "memory":
        made["time"] = time_rows(running, args)
    for what, rows in made.items():
        for row in [*rows, *({"head": name, "unavailable": reason} for name, reason in refused.items())]:
            results.add({**row, "what": what, **shape})
    header, lines = table([row for row in results.rows if all(row[name] == shape[name] for name in SHAPE)])
    print_table(header, lines)
    print(f"\nwritten to {args.out}")


def why_not(one: HeadVariant, args: argparse.Namespace) -> str | None:
    """Return why a variant does not run here, by a step of a tiny head; None if it does."""
    tiny = argparse.Namespace(tokens=16, vocabulary=256, width=128, dtype=args.dtype, tied=args.tied)
    try:
        make_step(one, make_head(tiny)(), hidden_batch(tiny))()
    except ModuleNotFoundError as error:
        return f"not installed ({error})"
    except Exception as error:  # whatever it raises is its answer
        return f"does not run here: {message(error)}"
    return None


def memory_rows(running: list[HeadVariant], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of memory."""
    found = [measured_bytes(one, args) for one in running]
    above = [one.peak - found[0].resting for one in found]
    return [
        {"head": one.name, "peak_bytes": mine, "peak_ratio": mine / above[0]}
        for one, mine in zip(running, above, strict=True)
    ]


def measured_bytes(one: HeadVariant, args: argparse.Namespace) -> AllocatorBytes:
    """Return what the allocator had handed out between steps, and at the peak of one."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        step = make_step(one, make_head(args)(), hidden_batch(args))
        step()  # until every state is there
        gc.collect()
        with torch.profiler.record_function("measured step"):
            step()
    return allocator_bytes(profiled, "measured step")


def time_rows(running: list[HeadVariant], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of times."""
    steps = [make_step(one, make_head(args)(), hidden_batch(args)) for one in running]
    times = interleaved_ms(steps, args.pairs, args.warm_up)
    rows = []
    for one, taken_ms in zip(running, times, strict=True):
        ratios = [mine / plain for mine, plain in zip(taken_ms, times[0], strict=True)]
        rows.append(
            {
                "head": one.name,
                "pairs": args.pairs,
                "step_ms_median": statistics.median(taken_ms),
                "time_ratio_median": statistics.median(ratios),
                "time_ratio_least": min(ratios),
                "time_ratio_most": max(ratios),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of one shape."""
    found = {(row["head"], row["what"]): row for row in rows}
    lines = []
    for one in HEAD_VARIANTS:
        time, memory = (found.get((one.name, what), {}) for what in ("time", "memory"))
        lines.append(
            [
                one.name,
                f"{time['step_ms_median']:.0f}" if "step_ms_median" in time else "-",
                f"{time['time_ratio_median']:.3f}" if "time_ratio_median" in time else "-",
                f"{time['time_ratio_least']:.3f} - {time['time_ratio_most']:.3f}"
                if "time_ratio_least" in time
                else "-",
                f"{memory['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in memory else "-",
                f"{memory['peak_ratio']:.3f}" if "peak_ratio" in memory else "-",
                memory.get("unavailable") or time.get("unavailable", ""),
            ]
        )
    return ["", "step ms", "time ratio", "least - most", "peak MiB", "peak ratio", ""], lines


def make_head(args: argparse.Namespace) -> Callable[[], Head]:
    """Return a function that makes the head."""
    return lambda: Head(args.vocabulary, args.width, args.tied, DTYPES[args.dtype])


def hidden_batch(args: argparse.Namespace) -> dict[str, Tensor]:
    """Return one sequence that is its own labels, and hidden states for an untied head."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, args.vocabulary, (1, args.tokens), generator=generator)
    x = torch.randn(1, args.tokens, args.width, generator=generator).to(DTYPES[args.dtype])
    return {"ids": ids, "x": x}


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
