"""Whole training steps: the Llama model, and the ways to train it."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

import gradfold
from benchmarks.common import llama, llama_config
from benchmarks.peers.hooks import SteppedInHooks

from .context import Context
from .kernel import using
from .worker import LeftOut

LR = 1e-5
LLAMA_8B = {"hidden": 4096, "intermediate": 14336, "vocabulary": 128256, "kv": 1024, "layers": 32, "heads": 32}
TINY = {"hidden": 32, "intermediate": 40, "vocabulary": 32, "kv": 16, "layers": 1, "heads": 2}
TOKENS, DRY_TOKENS = 512, 7

# Storage by gradfold.AdamW of bf16 weights: what we recommend first
STORAGES: dict[str, dict[str, Any]] = {
    "int8": {"states": "int8", "rounding": "stochastic"},
    "split8": {"states": "int8", "rounding": "stochastic", "master": "split8"},
    "int4": {"states": "int4", "rounding": "stochastic"},
    "bf16": {"states": "bf16", "rounding": "stochastic"},
    "fp32": {"states": "fp32", "rounding": "stochastic"},
}
GRAPH = " graph"  # ends the name of a trainer whose step is captured in a CUDA graph


def shape_of(context: Context) -> dict[str, int]:
    """Return the model's shape."""
    return TINY if context.dry else LLAMA_8B


def tokens_of(context: Context) -> int:
    """Return the tokens of a step."""
    return DRY_TOKENS if context.dry else TOKENS


def config_of(shape: dict[str, int], layers: int) -> Any:
    """Return the config of a Llama of this shape."""
    sizes = {name: shape[name] for name in ("hidden", "intermediate", "vocabulary", "heads")}
    kv_heads = shape["kv"] * shape["heads"] // shape["hidden"]
    return llama_config(layers, bool(shape.get("tied")), kv_heads=kv_heads, **sizes)


def model_of(shape: dict[str, int], layers: int, device: torch.device) -> nn.Module:
    """Return a model with random bf16 weights on the device, the same for every trainer."""
    with device:
        return llama(config_of(shape, layers), torch.bfloat16)


def batch_of(shape: dict[str, int], tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return one sequence ``[1, tokens]`` that is its own labels."""
    ids = torch.randint(0, shape["vocabulary"], (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    return {"input_ids": ids, "labels": ids}


class Trainer(NamedTuple):
    """A model with its optimizer."""

    model: nn.Module
    optimizer: Any
    backend: str = ""
    close: Callable[[], None] = lambda: None


def fused_adamw(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return torch's fused AdamW."""
    return torch.optim.AdamW(params, lr=LR, fused=True)


def torch_fused(model: nn.Module) -> Trainer:
    """Train with stored gradients and torch's fused AdamW."""
    return Trainer(model, fused_adamw(model.parameters()))


def torch_foreach(model: nn.Module) -> Trainer:
    """Train with stored gradients and torch's foreach AdamW."""
    return Trainer(model, torch.optim.AdamW(model.parameters(), lr=LR, foreach=True))


def torch_hooks(model: nn.Module) -> Trainer:
    """Train with post-accumulate-grad hooks, each with a fused AdamW of its own."""
    return Trainer(model, SteppedInHooks(model.parameters(), fused_adamw))


def bitsandbytes(model: nn.Module) -> Trainer:
    """Train with the 8-bit AdamW of bitsandbytes."""
    return Trainer(model, _load(PACKAGES["bitsandbytes 8-bit"]).optim.AdamW8bit(model.parameters(), lr=LR))


def torchao(model: nn.Module) -> Trainer:
    """Train with the 8-bit AdamW of torchao."""
    return Trainer(model, _load(PACKAGES["torchao 8-bit"]).AdamW8bit(model.parameters(), lr=LR))


def flashoptim(model: nn.Module) -> Trainer:
    """Train with FlashAdamW: 8-bit states, an 8-bit correction of the weights, and gradient release."""
    package = _load(PACKAGES["flashoptim release"])
    optimizer = package.FlashAdamW(model.parameters(), lr=LR)
    handle = package.enable_gradient_release(model, optimizer)
    return Trainer(model, optimizer, close=handle.remove)


PACKAGES = {
    "bitsandbytes 8-bit": "bitsandbytes",
    "torchao 8-bit": "torchao.optim",
    "flashoptim release": "flashoptim",
}


def _load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise LeftOut(f"{name.partition('.')[0]} cannot be imported here: {error}") from None


def our_optimizer(params: Iterable[nn.Parameter], storage: str, capturable: bool = False) -> gradfold.AdamW:
    """Return gradfold's AdamW with one of ``STORAGES``, which even tiny matrices have; vectors keep fp32 states."""
    return gradfold.AdamW(params, lr=LR, small_size=1, capturable=capturable, **STORAGES[storage])


def ours(storage: str, head: str = "plain", capturable: bool = False) -> Callable[[nn.Module], Trainer]:
    """Return a function that folds a model.

    Args:
        storage: One of ``STORAGES``.
        head: As in ``gradfold.fold``. Only with a plain head does a ratio compare optimizers alone.
        capturable: As in torch.
    """

    def make(model: nn.Module) -> Trainer:
        optimizer = our_optimizer(model.parameters(), storage, capturable)
        fold = gradfold.fold(model, optimizer, head=head, backend="triton")
        return Trainer(model, optimizer, "triton", fold.remove)

    return make


def torch_capturable(model: nn.Module) -> Trainer:
    """Train with torch's fused AdamW as a CUDA graph needs it."""
    return Trainer(model, torch.optim.AdamW(model.parameters(), lr=LR, fused=True, capturable=True))


TRAINERS: dict[str, Callable[[nn.Module], Trainer]] = {
    "torch fused": torch_fused,
    "torch foreach": torch_foreach,
    "torch hooks": torch_hooks,
    "bitsandbytes 8-bit": bitsandbytes,
    "torchao 8-bit": torchao,
    "flashoptim release": flashoptim,
    **{f"ours {storage}": ours(storage) for storage in STORAGES},
    "ours int8, folded head": ours("int8", head="fold"),
    f"torch fused{GRAPH}": torch_capturable,
    **{f"ours {storage}{GRAPH}": ours(storage, capturable=True) for storage in STORAGES},
}


def look_for(name: str) -> None:
    """Raise ``LeftOut`` if a peer's package cannot be imported, before a model is made for it."""
    if name in PACKAGES:
        _load(PACKAGES[name])


def step_of(trainer: Trainer, batch: dict[str, torch.Tensor], losses: list[torch.Tensor]) -> Callable[[], None]:
    """Return a function that takes one training step; its loss, still on the device, goes to ``losses``."""

    def step() -> None:
        with using(None):
            loss = trainer.model(**batch).loss
            loss.backward()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            losses[:] = [loss.detach()]

    return step


@contextlib.contextmanager
def training(name: str, shape: dict[str, int], layers: int, context: Context) -> Iterator[Trainer]:
    """Make a trainer with a model of its own, and free it afterwards."""
    made = TRAINERS[name](model_of(shape, layers, context.device))
    try:
        yield made
    finally:
        with contextlib.suppress(Exception):  # the step may have failed half-way; its row says so
            made.optimizer.zero_grad()
            made.close()
