"""Whole training steps: the Llama model, and the ways to train it."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

import gradfold
from benchmarks.common import fold_plain_head, llama, llama_config
from benchmarks.peers.hooks import SteppedInHooks

from .context import Context
from .kernel import using
from .worker import LeftOut

LR = 1e-5
LLAMA_8B = {"hidden": 4096, "intermediate": 14336, "vocabulary": 128256, "kv": 1024, "layers": 32, "heads": 32}
TINY = {"hidden": 32, "intermediate": 48, "vocabulary": 64, "kv": 16, "layers": 2, "heads": 2}
TOKENS, DRY_TOKENS = 512, 7


def shape_of(context: Context) -> dict[str, int]:
    """Return the model's shape."""
    return TINY if context.dry else LLAMA_8B


def tokens_of(context: Context) -> int:
    """Return the tokens of a step."""
    return DRY_TOKENS if context.dry else TOKENS


def config_of(shape: dict[str, int], layers: int) -> Any:
    """Return the config of Llama-3.1-8B, or of a smaller shape."""
    sizes = {name: shape[name] for name in ("hidden", "intermediate", "vocabulary", "heads")}
    return llama_config(layers, kv_heads=shape["kv"] * shape["heads"] // shape["hidden"], **sizes)


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
    return Trainer(model, _load("bitsandbytes").optim.AdamW8bit(model.parameters(), lr=LR))


def torchao(model: nn.Module) -> Trainer:
    """Train with the 8-bit AdamW of torchao."""
    return Trainer(model, _load("torchao.optim").AdamW8bit(model.parameters(), lr=LR))


def flashoptim(model: nn.Module) -> Trainer:
    """Train with FlashAdamW: 8-bit states, an 8-bit correction of the weights, and gradient release."""
    package = _load("flashoptim")
    optimizer = package.FlashAdamW(model.parameters(), lr=LR)
    handle = package.enable_gradient_release(model, optimizer)
    return Trainer(model, optimizer, close=handle.remove)


def _load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise LeftOut(f"{name.partition('.')[0]} cannot be imported here: {error}") from None


def ours(states: str, capturable: bool = False) -> Callable[[nn.Module], Trainer]:
    """Return a function that folds a model.

    Args:
        states: States of matrices, even tiny ones; vectors keep fp32 states.
        capturable: As in torch.
    """

    def make(model: nn.Module) -> Trainer:
        optimizer = gradfold.AdamW(model.parameters(), lr=LR, states=states, small_size=1, capturable=capturable)
        fold = fold_plain_head(model, optimizer, backend="triton")
        return Trainer(model, optimizer, "triton", fold.remove)

    return make


TRAINERS: dict[str, Callable[[nn.Module], Trainer]] = {
    "torch fused": torch_fused,
    "torch foreach": torch_foreach,
    "torch hooks": torch_hooks,
    "bitsandbytes 8-bit": bitsandbytes,
    "torchao 8-bit": torchao,
    "flashoptim release": flashoptim,
    "ours fp32": ours("fp32"),
    "ours bf16": ours("bf16"),
    "ours int8": ours("int8"),
    "ours int4": ours("int4"),
    "ours bf16 graph": ours("bf16", capturable=True),
}


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
