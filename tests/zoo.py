"""Tables of scenes: what a model does with its weights, times how its segments are checkpointed; and how to compare."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import gradfold
from gradfold.backends import Backend, ConvTerm, RowsTerm, Stored
from gradfold.head.term import HeadTerm

VOCABULARY, WIDTH, TOKENS = 11, 6, 5

# One row per rule, tame enough that ten steps do not amplify rounding.
RULES: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 1e-2, "weight_decay": 0.1},
    "Adam": {"lr": 1e-2, "weight_decay": 0.01, "amsgrad": True},
    "SGD": {"lr": 1e-2, "momentum": 0.9, "nesterov": True},
    "Lion": {"lr": 1e-3, "weight_decay": 0.1},
    "RMSprop": {"lr": 1e-3, "momentum": 0.5},
    "Adagrad": {"lr": 1e-2, "lr_decay": 0.1},
    "NAdam": {"lr": 1e-2, "momentum_decay": 0.01},
    "RAdam": {"lr": 1e-2, "weight_decay": 0.01},
    "Adadelta": {"lr": 1.0, "weight_decay": 0.01},
    "Adamax": {"lr": 1e-2, "weight_decay": 0.01},
    "ASGD": {"lr": 1e-2, "t0": 4.0},
    "Rprop": {"lr": 1e-3},
    "Adafactor": {"lr": 1e-2, "weight_decay": 0.1},
}
TORCH_RULES = [name for name in RULES if name != "Lion"]


def ours(model: nn.Module, rule: str = "AdamW") -> gradfold.optim.RuleOptimizer:
    return getattr(gradfold, rule)(model.parameters(), **RULES[rule])


def torchs(model: nn.Module, rule: str = "AdamW") -> torch.optim.Optimizer:
    return getattr(torch.optim, rule)(model.parameters(), foreach=False, **RULES[rule])


# checkpointing --------------------------------------------------------------------------------------------------------

Segment = Callable[[Tensor], Tensor]


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _plain(segment: Segment, x: Tensor, index: int) -> Tensor:
    return segment(x)


def _reentrant(segment: Segment, x: Tensor, index: int) -> Tensor:
    return checkpoint(segment, x, use_reentrant=True)


def _non_reentrant(segment: Segment, x: Tensor, index: int) -> Tensor:
    return checkpoint(segment, x, use_reentrant=False)


def _nested(outer: bool, inner: bool, segment: Segment, x: Tensor, index: int) -> Tensor:
    return checkpoint(lambda z: checkpoint(segment, z, use_reentrant=inner), x, use_reentrant=outer)


def _late_stop(segment: Segment, x: Tensor, index: int) -> Tensor:
    with set_checkpoint_early_stop(False):
        return checkpoint(segment, x, use_reentrant=False)


def _selective(segment: Segment, x: Tensor, index: int) -> Tensor:
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(segment, x, use_reentrant=False, context_fn=contexts)


def _mixed(first: int, segment: Segment, x: Tensor, index: int) -> Tensor:
    kinds = [_reentrant, _non_reentrant, _plain, functools.partial(_nested, False, True)]
    return kinds[(first + index) % len(kinds)](segment, x, index)


CHECKPOINTS: dict[str, Callable[[Segment, Tensor, int], Tensor]] = {
    "none": _plain,
    "reentrant": _reentrant,
    "non_reentrant": _non_reentrant,
    "nested": functools.partial(_nested, False, False),
    "nested_reentrant": functools.partial(_nested, True, True),
    "non_reentrant_in_reentrant": functools.partial(_nested, True, False),
    "reentrant_in_non_reentrant": functools.partial(_nested, False, True),
    "late_stop": _late_stop,
    "selective": _selective,
    "mixed": functools.partial(_mixed, 0),
    "mixed_too": functools.partial(_mixed, 1),
}
each_checkpoint = pytest.mark.parametrize("kind", CHECKPOINTS)


# scenes ---------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A Linear with bias, a norm, a Linear without."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.norm(self.up(x))))


class Net(nn.Module):
    """Embedding, three blocks, head; a scene decides how they are tied and used."""

    def __init__(self, scene: str):
        super().__init__()
        self.scene = scene
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if scene in ("tied", "tied_and_direct"):
            self.head.weight = self.embed.weight
        if scene == "tied_blocks":
            self.blocks[2].up.weight = self.blocks[0].up.weight
            self.blocks[2].norm.weight = self.blocks[0].norm.weight

    def logits(self, ids: Tensor, kind: str, step: int) -> Tensor:
        x = self.embed(ids)  # [B, T, WIDTH]
        run = CHECKPOINTS[kind]
        path = [0, 1, 2]
        if self.scene == "bptt":
            path = [0] * 3
        elif self.scene == "bptt_lengths":
            path = [0] * (1, 3, 2, 1, 4)[step % 5]
        elif self.scene in ("inside_and_after", "inside_and_before"):
            path = [0, 1, 0]
        elif self.scene == "partial":
            path = [0, 1]
        if self.scene == "inside_and_before":
            x = self.blocks[0](x)
        for index, which in enumerate(path):
            x = run(self.blocks[which], x, index)
        if self.scene == "inside_and_after":
            x = self.blocks[0](x)
        return self.head(x)

    def loss(self, ids: Tensor, kind: str = "none", step: int = 0) -> Tensor:
        logits = self.logits(ids, kind, step)
        if self.scene == "partial" and step % 2:
            return self.embed(ids).pow(2).mean() + self.blocks[0](self.embed(ids)).mean()
        loss = F.cross_entropy(logits.flatten(0, 1), ids.roll(1, 0).flatten())
        if self.scene in ("direct", "tied_and_direct"):
            loss = loss + sum(0.1 * m.weight.pow(2).sum() for m in (self.head, self.blocks[0].up, self.blocks[1].norm))
        if self.scene == "summed":
            other = self.logits(ids.flip(0), kind, step)
            loss = loss + F.cross_entropy(other.flatten(0, 1), ids.flatten()) + other.pow(2).mean()
        if self.scene == "dropped":
            self.logits(ids.flip(0), kind, step)
        return loss


SCENES = [
    "untied",
    "tied",
    "tied_blocks",
    "bptt",
    "bptt_lengths",
    "inside_and_after",
    "inside_and_before",
    "partial",
    "direct",
    "tied_and_direct",
    "summed",
    "dropped",
]
each_scene = pytest.mark.parametrize("scene", SCENES)


def batches(steps: int = 10) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (2, TOKENS), generator=generator) for _ in range(steps)]


def scene_run(model: Net, optimizer: torch.optim.Optimizer, kind: str, steps: int = 10) -> None:
    """The loop of a user; after each step no gradient may be left if the model is folded."""
    for step, ids in enumerate(batches(steps)):
        model.loss(ids, kind, step).backward()
        optimizer.step()
        optimizer.zero_grad()


# comparing ------------------------------------------------------------------------------------------------------------


def twins(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """Two models with the same weights."""
    torch.manual_seed(0)
    model = make().to(dtype)
    return model, copy.deepcopy(model)


def distance(a: nn.Module, b: nn.Module) -> float:
    """Relative L2 distance of all parameters, taken in fp64; NaN if one of them is."""
    theirs = dict(b.named_parameters())
    pairs = [(p.detach().double(), theirs[name].detach().double()) for name, p in a.named_parameters()]
    gap = sum(float((p - q).pow(2).sum()) for p, q in pairs) ** 0.5
    return gap / max(sum(float(q.pow(2).sum()) for _, q in pairs) ** 0.5, 1e-30)


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    theirs = dict(b.named_parameters())
    return all(torch.equal(p, theirs[name]) for name, p in a.named_parameters())


def no_gradients(model: nn.Module) -> bool:
    return all(param.grad is None for param in model.parameters())


Loop = Callable[[nn.Module, torch.optim.Optimizer, int], None]


def compare(make: Callable[[], nn.Module], run: Loop, steps: int = 3, rule: str = "AdamW") -> float:
    """Distance between a folded model and torch's after ``steps`` calls of ``run(model, optimizer, step)``."""
    plain, folded = twins(make)
    optimizers = torchs(plain, rule), ours(folded, rule)
    gradfold.fold(folded, optimizers[1])
    for step in range(steps):
        for model, optimizer in zip((plain, folded), optimizers, strict=True):
            torch.manual_seed(100 + step)
            run(model, optimizer, step)
            optimizer.step()
            optimizer.zero_grad()
        assert no_gradients(folded)
    return distance(folded, plain)


class Recorder(Backend):
    """A backend that computes each gradient in row blocks, as a backend must, keeps it, and steps nothing."""

    name = "recorder"

    def __init__(self, model: nn.Module, rows: int = 2):
        self.model = model
        self.rows = rows
        self.grads: dict[str, Tensor] = {}
        self.bounds: dict[str, float] = {}  # Frobenius norm of |dY|^T |X|
        self.order: list[str] = []
        self.log: Callable[[str], None] = self.order.append

    def prepare(self, weight: Stored, states: Any, rule: Any, group: Any) -> Callable[..., float]:
        return lambda terms, numbers, change: self._record(weight.values, terms)

    def _record(self, weight: Tensor, uses: Any) -> float:
        (name,) = {n for n, p in self.model.named_parameters() if p.data_ptr() == weight.data_ptr()}
        assert name not in self.grads, f"{name} steps twice"
        assert no_gradients(self.model)
        self.log(name)
        rows = weight.shape[0]
        starts = range(0, rows, self.rows)
        for use in uses:
            use.prepare(starts, rows)
        grad = torch.full((rows, weight[0].numel()), torch.nan, dtype=weight.dtype)
        for start in starts:
            stop = min(start + self.rows, rows)
            uses[0].write(grad[start:stop], start, stop)
            for use in uses[1:]:
                use.add(grad[start:stop], start, stop)
        self.grads[name] = grad.view(weight.shape)
        self.bounds[name] = float(sum(_bound(use, weight) for use in uses).norm())
        return 0.0


def _bound(use: Any, weight: Tensor) -> Tensor:
    if isinstance(use, RowsTerm):
        found = torch.zeros(weight.shape[0], weight[0].numel(), dtype=weight.dtype)
        rows = found[use.first : use.first + use.count]
        rows.copy_(_bound(use.part, rows))
        return found.view(weight.shape)
    if isinstance(use, ConvTerm):
        found = torch.empty(weight.shape[0], weight[0].numel(), dtype=weight.dtype)
        use.map(torch.abs).write(found, 0, weight.shape[0])
        return found.view(weight.shape)
    if hasattr(use, "left"):
        return use.left.abs().t() @ use.right.abs()
    if isinstance(use, HeadTerm):
        p = torch.cat(
            [use._logit_gradient(start, stop) for start, stop in use._blocks(0, weight.shape[0])], 1
        )  # [T, V]
        return p.abs().t() @ use.x.abs()
    if hasattr(use, "ids"):
        return torch.zeros_like(weight).index_add(0, use.ids, use.grad.abs())
    return use.grad.abs() + 1  # dense: plain autograd's own sum of the order of one


def recorded(model: nn.Module, rule: str = "SGD", rows: int = 2) -> tuple[Recorder, gradfold.optim.RuleOptimizer]:
    """Fold ``model`` with a recorder: its weights never move."""
    recorder, optimizer = Recorder(model, rows), ours(model, rule)
    gradfold.fold(model, optimizer, backend=recorder)
    return recorder, optimizer


def modules_with_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            yield name, module
