"""The methods of quality_workset.py: each makes its optimizer as its documentation says."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gradfold

from .common import fold_plain_head
from .datasets import Task

ADAM: dict[str, Any] = {"betas": (0.9, 0.99), "weight_decay": 0.0}
CHUNKS, INTERVAL = 8, 4


@dataclasses.dataclass(frozen=True)
class Method:
    """A model with its optimizer.

    Attributes:
        model: the model.
        optimizer: its optimizer.
        awake: returns how many parameters the next step trains.
        fold: the fold, if it is folded.
        resting: returns how many more the next step moves, at rest.
    """

    model: nn.Module
    optimizer: Any
    awake: Callable[[], int]
    fold: gradfold.Fold | None = None
    resting: Callable[[], int] = lambda: 0


def trainable_count(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def full(model: nn.Module, lr: float) -> Method:
    """Train everything with folded AdamW."""
    optimizer = gradfold.AdamW(model.parameters(), lr=lr, **ADAM)
    return Method(model, optimizer, lambda: trainable_count(model), fold_plain_head(model, optimizer))


def working_set(model: nn.Module, lr: float, **settings: Any) -> Method:
    """Train a working set with folded AdamW; with the settings of the first release, unless others are given."""
    settings = {"interval": INTERVAL, "schedule": "step"} | settings
    if settings.get("by") != "layer":
        settings["chunks"] = CHUNKS
    optimizer = gradfold.AdamW(model.parameters(), lr=lr, **ADAM)
    fold = fold_plain_head(model, optimizer, working_set=gradfold.WorkingSet(**settings))

    def moved(resting: bool) -> int:
        slices = [one for one in fold._state.slices() if one.param.requires_grad and one.rests is resting]
        return sum(one.view.numel() for one in slices)

    return Method(model, optimizer, lambda: moved(False), fold, lambda: moved(True))


def lisa_style(model: nn.Module, lr: float) -> Method:
    """Train embedding and head always and one layer at a time, drawn at random, whose states begin anew."""
    ends = [part for part in ("embed_tokens", "lm_head") if any(part in name for name, _ in model.named_parameters())]
    return working_set(model, lr, by="layer", order="random", states="reset", always=ends)


def badam(model: nn.Module, lr: float, blocks: dict[str, Any]) -> Method:
    """Train with BAdam as its README says; blocks are layers, in a new random order each round."""
    from badam import BlockOptimizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that fp32 weights lose the benefit of mixed precision
        optimizer = BlockOptimizer(
            base_optimizer=torch.optim.AdamW(model.parameters(), lr=lr, **ADAM),
            named_parameters_list=list(model.named_parameters()),
            switch_block_every=INTERVAL,
            switch_mode="random",
            verbose=0,
            **blocks,
        )
    return Method(model, optimizer, lambda: trainable_count(model))


def lora(model: nn.Module, lr: float) -> Method:
    """Train adapters on every Linear but the head; embedding, head and norms are frozen."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    return Method(adapted, torch.optim.AdamW(trained, lr=lr, **ADAM), lambda: trainable_count(adapted))


def distance_from_masked(task: Task, lr: float = 1e-3) -> float:
    """Return how far a working set ends from AdamW masked to the same slices, relative to the distance covered.

    In fp64, over one cycle and one turn more; the masked run uses plain gradients and one torch AdamW per slice.
    """
    mine, plain = task.build("float64", 0), task.build("float64", 0)
    before = [p.detach().clone() for p in plain.parameters()]
    one, named, slices = working_set(mine, lr), dict(plain.named_parameters()), {}
    for step in range((CHUNKS + 1) * INTERVAL):
        active = one.fold._state.turns.chunks[one.fold.working_set.chunk]
        for model in (mine, plain):
            model(**task.batch(step), use_cache=False).loss.backward()
        one.optimizer.step()
        for slice_ in active:
            if slice_ not in slices:
                leaf = nn.Parameter(part(named[slice_.name].detach(), slice_))  # shares the weight's memory
                slices[slice_] = leaf, torch.optim.AdamW([leaf], lr=lr, **ADAM)
            leaf, optimizer = slices[slice_]
            leaf.grad = part(named[slice_.name].grad, slice_)
            optimizer.step()
        one.optimizer.zero_grad()
        plain.zero_grad()
    one.fold.remove()
    off, way = (
        torch.stack([(a - b).norm() for a, b in zip(ends, plain.parameters(), strict=True)]).norm().item()
        for ends in (mine.parameters(), before)
    )
    return off / way


def part(tensor: Tensor, slice_: Any) -> Tensor:
    """Return a view of a slice."""
    return tensor.narrow(slice_.dim, slice_.start, slice_.stop - slice_.start)


REFERENCE = "AdamW on everything"
SET = f"working set, {CHUNKS} chunks x {INTERVAL} steps"
ROUND: dict[str, Any] = {"schedule": "round"}
SETS: dict[str, dict[str, Any]] = {
    SET: {},
    "working set, by round": ROUND,
    "working set, by round, sgd at rest": ROUND | {"rest": "sgd"},
    "working set, by round, sign at rest": ROUND | {"rest": "sign"},
    "working set, for_quality": ROUND | {"rest": "sgd", "states": "reset"},
    "working set, bands": {"by": "bands"},
    "working set, bands by round": ROUND | {"by": "bands"},
    "working set, kinds of modules by round": ROUND | {"by": "module"},
    "BREAD's rule on layers": {"by": "layer", "order": "random", "states": "reset", "rest": "sgd"},
}
BADAM = f"BAdam, a layer x {INTERVAL} steps"
METHODS: dict[str, tuple[Callable[..., Method], str | None]] = {
    REFERENCE: (full, None),
    **{name: (functools.partial(working_set, **settings), None) for name, settings in SETS.items()},
    BADAM: (badam, "badam"),
    "LISA-style sampling": (lisa_style, None),
    "LoRA, r = 16": (lora, "peft"),
}
COLORS: dict[Any, str] = {full: "#444444", None: "#1f77b4", "badam": "#d95f02", "peft": "#7570b3"}
