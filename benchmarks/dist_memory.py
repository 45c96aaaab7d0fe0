"""Peak of live bytes per rank of one training step on several ranks, and the bytes that its collectives bring.

Each way trains the same Llama of 100.7 M parameters on real tensors, after one step that allocates states. Torch's
optimizer reads the gradients' shards when backward is over; folded, a shard steps as soon as FSDP2 has summed it. So a
folded step is to need what torch's needs without these shards: the peak over a step of all bytes but theirs (wanted).
That is more than torch's peak less all its shards, as backward needs most before it has made many of them.

    python -m benchmarks.dist_memory
    python -m benchmarks.dist_memory --layers 2 --tokens 32              # a quick look
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

import gradfold
from gradfold.planner.bytes import format_bytes
from gradfold.planner.trace import CATEGORIES, LiveBytes

from .common import fold_plain_head, llama, llama_config, print_table, random_batch, write_result
from .ranks import Traffic, fully_sharded, run_ranks

LR = 1e-4


class Made(NamedTuple):
    """A model that is ready to train.

    Attributes:
        model: the model.
        optimizer: its optimizer.
        scratch: returns the temporary memory that is held between steps.
    """

    model: nn.Module
    optimizer: Any
    scratch: Callable[[], Any] = tuple


def fsdp2_torch(model: nn.Module) -> Made:
    """FSDP2, and torch's fused AdamW on the shards."""
    fully_sharded(model)
    return Made(model, torch.optim.AdamW(model.parameters(), lr=LR, fused=True))


def fsdp2_hooked(model: nn.Module) -> Made:
    """FSDP2, whose hooks step each shard."""
    fully_sharded(model)
    optimizer = gradfold.AdamW(model.named_parameters(), lr=LR)
    return Made(model, optimizer, fold_plain_head(model, optimizer).scratch_tensors)


class Way(NamedTuple):
    """One way to train on several ranks.

    Attributes:
        make: shards a model and makes its optimizer.
        compared: the way whose peak without gradients this one is to keep to; None: it is one of torch's.
        received_bytes: by the formula, from the bytes of layers and of the rest, and the number of ranks; None: none.
    """

    make: Callable[[nn.Module], Made]
    compared: str | None = None
    received_bytes: Callable[[int, int, int], int] | None = None


def _fsdp2_bytes(layers_bytes: int, rest_bytes: int, ranks: int) -> int:
    """Return what FSDP2 brings: layers are gathered twice, the rest once, and all gradients are summed once."""
    return round((2 * layers_bytes + rest_bytes + layers_bytes + rest_bytes) * (ranks - 1) / ranks)


WAYS = {
    "fsdp2, torch": Way(fsdp2_torch, None, _fsdp2_bytes),
    "fsdp2, hooked": Way(fsdp2_hooked, "fsdp2, torch", _fsdp2_bytes),
}
"""Further ways are further rows."""


def measure(name: str, layers: int, tokens: int, checkpointed: bool) -> dict[str, Any]:
    """Return the figures of one way on this rank."""
    config = llama_config(layers)
    causal: Any = llama(config, torch.float32)
    if checkpointed:
        causal.gradient_checkpointing_enable({"use_reentrant": False})
    of_layers = sum(param.numel() for layer in causal.model.layers for param in layer.parameters())
    of_all = sum(param.numel() for param in causal.parameters())
    made = WAYS[name].make(causal)
    batch = random_batch(config, tokens)

    def step(live: LiveBytes | None) -> None:
        for phase in ("forward", "backward", "step"):
            if live is not None:
                live.moment(phase)
            if phase == "forward":
                loss = made.model(**batch).loss
            elif phase == "backward":
                loss.backward()
                del loss
            else:
                if live is not None:
                    for param in made.model.parameters():
                        if param.grad is not None:
                            live.label(param.grad, "gradients")
                made.optimizer.step()
                made.optimizer.zero_grad()

    step(None)
    live, traffic = LiveBytes(), Traffic()
    with live:
        live.track(made.model, made.optimizer)
        live.track(made.scratch(), category="scratch")
        live.track(batch)
        resting_bytes = live.now_bytes
        step(live)
    with traffic:
        step(None)
    timeline = live.timeline()
    kept = [index for index, category in enumerate(CATEGORIES) if category != "gradients"]
    at_peak = timeline.at(timeline.peak_event)
    formula = WAYS[name].received_bytes
    collectives = {kind: size for kind, size in traffic.received_bytes.items() if size}
    return {
        "resting_bytes": resting_bytes,
        "peak_bytes": live.peak_bytes,
        "peak_phase": live.peak_moment,
        "peak_op": live.peak_op,
        "at_peak_bytes": at_peak,
        "gradient_bytes": int(timeline.live_bytes[:, CATEGORIES.index("gradients")].max()),
        "peak_but_gradients_bytes": int(timeline.live_bytes[:, kept].sum(axis=1).max()),
        "received_bytes": sum(collectives.values()),
        "received_by_kind_bytes": collectives,
        "formula_bytes": None if formula is None else formula(4 * of_layers, 4 * (of_all - of_layers), _ranks()),
    }


def _ranks() -> int:
    return dist.get_world_size()


def worst(each: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of the rank with the highest peak."""
    return max(each, key=lambda row: row["peak_bytes"])


def main() -> None:
    """Measure each way, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="all of them by default")
    parser.add_argument("--ranks", type=int, default=2, help="processes (2)")
    parser.add_argument("--layers", type=int, default=12, help="layers of the Llama; 12 are 100.7 M parameters")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128], help="tokens per rank and step (128)")
    parser.add_argument("--plain", action="store_true", help="also without activation checkpoints")
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/dist_memory.json)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for tokens in args.tokens:
        for checkpointed in (True, False) if args.plain else (True,):
            found: dict[str, dict[str, Any]] = {}
            for name in args.ways:
                found[name] = worst(run_ranks(measure, args.ranks, name, args.layers, tokens, checkpointed))
                rows.append(row_of(name, found, args.ranks, args.layers, tokens, checkpointed))
    print_table(
        ["", "T", "checkpoints", "at rest", "peak", "gradients", "wanted", "received", "formula"],
        [
            [
                row["way"],
                str(row["tokens"]),
                "yes" if row["checkpointed"] else "no",
                format_bytes(row["resting_bytes"]),
                format_bytes(row["peak_bytes"]),
                format_bytes(row["gradient_bytes"]),
                "" if row["wanted_bytes"] is None else f"<= {format_bytes(row['wanted_bytes'])}",
                format_bytes(row["received_bytes"]),
                "" if row["formula_bytes"] is None else format_bytes(row["formula_bytes"]),
            ]
            for row in rows
        ],
    )
    print(f"\nwritten to {write_result('dist_memory', rows, args.out)}")


def row_of(
    name: str, found: dict[str, dict[str, Any]], ranks: int, layers: int, tokens: int, checkpointed: bool
) -> dict[str, Any]:
    """Return one row; ``wanted_bytes`` is the peak without gradients of the way it is compared with."""
    compared = found.get(WAYS[name].compared or "")
    return {
        "way": name,
        "ranks": ranks,
        "layers": layers,
        "tokens": tokens,
        "checkpointed": checkpointed,
        "wanted_bytes": None if compared is None else compared["peak_but_gradients_bytes"],
        **found[name],
    }


if __name__ == "__main__":
    main()
