"""Peak of live bytes per rank of one training step on several ranks, and the bytes that its collectives bring.

Each way trains the same Llama of 100.7 M parameters on real tensors, after one step that allocates states. Torch's
optimizer reads the gradients' shards when backward is over; folded, a shard steps as soon as FSDP2 has summed it. So a
folded step is to need what torch's needs without these shards: the peak over a step of all bytes but theirs (wanted).
That is more than torch's peak less all its shards, as backward needs most before it has made many of them.

    fsdp2, torch    FSDP2, and torch's fused AdamW on the shards
    fsdp2, hooked   FSDP2 sums a whole gradient, and its hooks step each shard
    fsdp2, tiles    the fold sums gradients by tiles: of gradients there are two tiles, and those of the norms
    fsdp2, tokens   the fold sends tokens to the owners of rows, where that is less
    tp+sp, torch    tensor and sequence parallelism, vocabulary-parallel embedding and head, torch's fused AdamW
    tp+sp, folded   the same, folded on shards: no tensor of the shape of a weight or of its shard is made

"like a weight" is the largest tensor of the shape of a matrix or of its shard that a step makes, besides what FSDP2
gathers: a gradient, or a copy.

    python -m benchmarks.dist_memory
    python -m benchmarks.dist_memory --layers 2 --tokens 32              # a quick look
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gradfold
from gradfold.dist.messages import HEADER, TILE_BYTES
from gradfold.engine import held
from gradfold.planner.bytes import format_bytes
from gradfold.planner.trace import CATEGORIES, LiveBytes

from .common import fold_plain_head, llama, llama_config, print_table, random_batch, write_result
from .ranks import Decoder, Traffic, fully_sharded, run_ranks, tensor_parallel

LR = 1e-4


class Made(NamedTuple):
    """A model that is ready to train.

    Attributes:
        model: the model.
        optimizer: its optimizer.
        batch: what ``loss`` takes.
        loss: computes the loss of a batch.
        of_layers_bytes: bytes of the layers' weights, before they were cut.
        of_rest_bytes: the same of all others.
        norms_bytes: the same of those that are no matrices.
        fold: the fold, if it is folded.
    """

    model: nn.Module
    optimizer: Any
    batch: dict[str, Tensor]
    loss: Callable[..., Tensor]
    of_layers_bytes: int
    of_rest_bytes: int
    norms_bytes: int
    fold: gradfold.Fold | None = None


def _sizes(model: nn.Module, layers: nn.Module) -> tuple[int, int, int]:
    """Return the bytes of the layers, of the rest, and of what is no matrix."""
    of_layers = sum(param.nbytes for param in layers.parameters())
    of_all = sum(param.nbytes for param in model.parameters())
    return of_layers, of_all - of_layers, sum(param.nbytes for param in model.parameters() if param.dim() < 2)


def fsdp2(layers: int, tokens: int, checkpointed: bool, data: str | None) -> Made:
    """FSDP2: torch's fused AdamW on the shards, or folded with ``data``."""
    config = llama_config(layers)
    model: Any = llama(config, torch.float32)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    sizes, batch = _sizes(model, model.model.layers), random_batch(config, tokens)
    fully_sharded(model)

    def loss(**batch: Tensor) -> Tensor:
        return model(**batch).loss

    if data is None:
        return Made(model, torch.optim.AdamW(model.parameters(), lr=LR, fused=True), batch, loss, *sizes)
    optimizer = gradfold.AdamW(model.named_parameters(), lr=LR)
    return Made(model, optimizer, batch, loss, *sizes, fold_plain_head(model, optimizer, data=data))


def tp_sp(layers: int, tokens: int, checkpointed: bool, folds: bool) -> Made:
    """Tensor and sequence parallelism of a decoder of the Llama's sizes, without activation checkpoints."""
    torch.manual_seed(0)
    model = Decoder(layers)
    sizes = _sizes(model, model.layers)
    tensor_parallel(model)
    batch = {"ids": torch.randint(0, 10_240, (1, tokens), generator=torch.Generator().manual_seed(0))}

    def loss(ids: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())

    if not folds:
        return Made(model, torch.optim.AdamW(model.parameters(), lr=LR, fused=True), batch, loss, *sizes)
    optimizer = gradfold.AdamW(model.named_parameters(), lr=LR)
    return Made(model, optimizer, batch, loss, *sizes, fold_plain_head(model, optimizer))


class Way(NamedTuple):
    """One way to train on several ranks.

    Attributes:
        make: makes a model of this many layers, shards it, and makes its optimizer and a batch of this many tokens;
            the last argument says whether activations are checkpointed.
        compared: the way whose peak without gradients this one is to keep to; None: it is one of torch's.
        received_bytes: by the formula, from the bytes of layers and of the rest, and the number of ranks; None: none.
        gradients: the most bytes of gradients and of scratch memory that are wanted, from those of norms; None: any.
    """

    make: Callable[[int, int, bool], Made]
    compared: str | None = None
    received_bytes: Callable[[int, int, int], int] | None = None
    gradients: Callable[[int], int] | None = None


def _two_tiles(norms_bytes: int) -> int:
    """Return the bytes of two tiles, their headers, and the gradients of norms."""
    return 2 * (TILE_BYTES + 2 * 4 * HEADER) + norms_bytes


def _fsdp2_bytes(layers_bytes: int, rest_bytes: int, ranks: int) -> int:
    """Return what FSDP2 brings: layers are gathered twice, the rest once, and all gradients are summed once."""
    return round((2 * layers_bytes + rest_bytes + layers_bytes + rest_bytes) * (ranks - 1) / ranks)


WAYS = {
    "fsdp2, torch": Way(partial(fsdp2, data=None), None, _fsdp2_bytes),
    "fsdp2, hooked": Way(partial(fsdp2, data="hook"), "fsdp2, torch", _fsdp2_bytes),
    "fsdp2, tiles": Way(partial(fsdp2, data="tile"), "fsdp2, torch", _fsdp2_bytes, _two_tiles),
    "fsdp2, tokens": Way(partial(fsdp2, data="tokens"), "fsdp2, torch"),
    "tp+sp, torch": Way(partial(tp_sp, folds=False)),
    "tp+sp, folded": Way(partial(tp_sp, folds=True), "tp+sp, torch"),
}
"""Further ways are further rows."""


class LikeWeights(TorchDispatchMode):
    """Notes the largest new tensor that has the shape of one of some matrices."""

    def __init__(self, shapes: set[tuple[int, ...]]):
        super().__init__()
        self.shapes, self.largest_bytes, self.op = shapes, 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at what an operator makes."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local tensors come by
        out = func(*args, **(kwargs or {}))
        plain = (Tensor, nn.Parameter)  # what stands for a collective's result has no memory of its own
        given = {one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if type(one) in plain}
        for made in tree_leaves(out):
            if type(made) not in plain or tuple(made.shape) not in self.shapes:
                continue
            fresh = made.untyped_storage().data_ptr() not in given
            if fresh and made.nbytes > self.largest_bytes:
                self.largest_bytes, self.op = made.nbytes, str(func)
        return out


def measure(name: str, layers: int, tokens: int, checkpointed: bool) -> dict[str, Any]:
    """Return the figures of one way on this rank."""
    made = WAYS[name].make(layers, tokens, checkpointed)
    matrices = [param for param in made.model.parameters() if param.dim() == 2]
    shapes = {tuple(one.shape) for one in matrices} | {tuple(held(one).shape) for one in matrices}

    within: Any = loss_parallel if name.startswith("tp") else contextlib.nullcontext

    def step(live: LiveBytes | None) -> None:
        for phase in ("forward", "backward", "step"):
            if live is not None:
                live.moment(phase)
            if phase == "forward":
                with within():
                    loss = made.loss(**made.batch)
            elif phase == "backward":
                with within():
                    loss.backward()
                del loss
            else:
                if live is not None:
                    for param in made.model.parameters():
                        if param.grad is not None:
                            live.label(param.grad, "gradients")
                made.optimizer.step()
                made.optimizer.zero_grad()

    def scratch() -> list[Tensor]:
        return [] if made.fold is None else list(made.fold.scratch_tensors())

    step(None)
    live, traffic = LiveBytes(), Traffic()
    with live:
        live.track(made.model, made.optimizer)
        live.track(scratch(), category="scratch")
        live.track(made.batch)
        resting_bytes = live.now_bytes
        step(live)
    with traffic:
        step(None)
    with LikeWeights(shapes) as like_weights:
        step(None)
    timeline = live.timeline()
    kept = [index for index, category in enumerate(CATEGORIES) if category != "gradients"]
    at_peak = timeline.at(timeline.peak_event)
    formula, limit = WAYS[name].received_bytes, WAYS[name].gradients
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in scratch()}
    scratch_bytes = sum(storage.nbytes() for storage in storages.values())
    collectives = {kind: size for kind, size in traffic.received_bytes.items() if size}
    return {
        "resting_bytes": resting_bytes,
        "peak_bytes": live.peak_bytes,
        "peak_phase": live.peak_moment,
        "peak_op": live.peak_op,
        "at_peak_bytes": at_peak,
        "gradient_bytes": int(timeline.live_bytes[:, CATEGORIES.index("gradients")].max()),
        "scratch_bytes": scratch_bytes,
        "wanted_gradient_and_scratch_bytes": None if limit is None else limit(made.norms_bytes),
        "like_a_weight_bytes": like_weights.largest_bytes,
        "like_a_weight_op": like_weights.op,
        "peak_but_gradients_bytes": int(timeline.live_bytes[:, kept].sum(axis=1).max()),
        "received_bytes": sum(collectives.values()),
        "received_by_kind_bytes": collectives,
        "formula_bytes": None if formula is None else formula(made.of_layers_bytes, made.of_rest_bytes, _ranks()),
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
        [
            *("", "T", "checkpoints", "at rest", "peak", "wanted", "gradients", "scratch", "wanted"),
            *("like a weight", "received", "formula"),
        ],
        [
            [
                row["way"],
                str(row["tokens"]),
                "yes" if row["checkpointed"] else "no",
                format_bytes(row["resting_bytes"]),
                format_bytes(row["peak_bytes"]),
                _at_most(row["wanted_bytes"]),
                format_bytes(row["gradient_bytes"]),
                format_bytes(row["scratch_bytes"]),
                _at_most(row["wanted_gradient_and_scratch_bytes"]),
                format_bytes(row["like_a_weight_bytes"]),
                format_bytes(row["received_bytes"]),
                "" if row["formula_bytes"] is None else format_bytes(row["formula_bytes"]),
            ]
            for row in rows
        ],
    )
    print(f"\nwritten to {write_result('dist_memory', rows, args.out)}")


def _at_most(size: int | None) -> str:
    return "" if size is None else f"<= {format_bytes(size)}"


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
