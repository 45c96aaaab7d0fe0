"""The methods of peers_table.py: each makes its optimizer as its documentation says, and finishes a step from a loss.

The adapters of ``peers/`` make the objects of those that ``correctness.py`` judges, so both tables show the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import io
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import gradfold

from .common import fold_plain_head
from .peers import PeerUnavailable
from .peers.base import message
from .peers.flashoptim import FlashOptim
from .peers.hooks import SteppedInHooks
from .peers.lomo import Lomo
from .peers.optimi import Optimi

LR = 1e-4
CHUNKS = 8
RANK = 128
"""GaLore's rank, as its README has it."""
Finish = Callable[[Tensor], None]
"""What a user writes after the forward: backward, step, zero_grad."""


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to train all weights, or one block of them at a time.

    Attributes:
        make: attaches the optimizer to a model, and returns what finishes a step.
        package: what is installed for it; None: torch alone, or gradfold.
        judged: its row in results/correctness.json; None: it has none.
        turns: after how many steps every block has had a turn; 1: every weight steps in every step.
        note: what the row should say beside its figures.
    """

    make: Callable[[nn.Module], Finish]
    package: str | None = None
    judged: str | None = None
    turns: Callable[[nn.Module], int] = lambda model: 1
    note: str = ""

    def version(self) -> str | None:
        """Return the package's version."""
        return None if self.package is None else importlib.metadata.version(self.package)


def usual(optimizer: Any) -> Finish:
    """Return the loop of torch's tutorials; an optimizer that stepped in backward has nothing left to do in it."""

    def finish(loss: Tensor) -> None:
        loss.backward()
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore", UserWarning)  # flashoptim says that its step and zero_grad do nothing
            optimizer.step()
            optimizer.zero_grad()

    return finish


def torch_adamw(**how: bool) -> Callable[[nn.Module], Finish]:
    """Return torch's AdamW in one of its implementations."""
    return lambda model: usual(torch.optim.AdamW(model.parameters(), lr=LR, **how))


def dropped(model: nn.Module) -> Finish:
    """Train nothing: every gradient is dropped as it arrives."""
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return lambda loss: loss.backward()


def hooks(make: Callable[[list[nn.Parameter]], Any]) -> Callable[[nn.Module], Finish]:
    """Return an optimizer per parameter, stepped in its hook."""
    return lambda model: usual(SteppedInHooks(model.parameters(), make))


def released(model: nn.Module) -> Finish:
    """Train with optimi's gradient release."""
    Optimi(model)
    return lambda loss: loss.backward()


def flashoptim(model: nn.Module) -> Finish:
    """Train with flashoptim's gradient release, in its eager form."""
    return usual(FlashOptim(model).optimizer)


def lomo(model: nn.Module) -> Finish:
    """Train with LOMO, whose loop calls ``fused_backward`` in the place of ``backward``."""
    optimizer = Lomo(model).optimizer
    return lambda loss: optimizer.fused_backward(loss, LR)


def badam(model: nn.Module) -> Finish:
    """Train one block of layers at a time, another one in every step; embedding and head are blocks, too."""
    from badam import BlockOptimizer

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # it warns that fp32 weights lose the benefit of mixed precision
        optimizer = BlockOptimizer(
            base_optimizer=torch.optim.AdamW(model.parameters(), lr=LR, fused=True),
            named_parameters_list=list(model.named_parameters()),
            switch_block_every=1,
            switch_mode="ascending",
            include_embedding=True,
            include_lm_head=True,
            verbose=0,
        )
    return usual(optimizer)


def galore(params: Iterable[nn.Parameter]) -> Any:
    """Return GaLore's AdamW of one parameter: matrices of layers are projected, all else is plain, as in its README."""
    from galore_torch import GaLoreAdamW

    one = list(params)
    low_rank = {"rank": RANK, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    projected = one[0].ndim == 2 and min(one[0].shape) > RANK and not getattr(one[0], "is_end", False)
    return GaLoreAdamW([{"params": one, **(low_rank if projected else {})}], lr=LR, no_deprecation_warning=True)


def galore_per_layer(model: nn.Module) -> Finish:
    """Train with GaLore in hooks ("per-layer weight updates")."""
    for name, param in model.named_parameters():
        param.is_end = "layers." not in name  # type: ignore[attr-defined]  # embedding and head are not projected
    return hooks(galore)(model)


def of_package(module: str, name: str) -> Callable[[nn.Module], Finish]:
    """Return an optimizer with stored gradients from a package."""
    return lambda model: usual(getattr(importlib.import_module(module), name)(model.parameters(), lr=LR))


def folded(head: str = "plain", working_set: bool = False, **storage: Any) -> Callable[[nn.Module], Finish]:
    """Return gradfold's AdamW."""

    def make(model: nn.Module) -> Finish:
        optimizer = gradfold.AdamW(model.parameters(), lr=LR, **storage)
        # Its sleeping states begin anew, as BAdam's do: elsewhere they would be in the same memory on a processor.
        turns = gradfold.WorkingSet(chunks=CHUNKS, interval=1, states="reset") if working_set else None
        if head == "plain":
            fold_plain_head(model, optimizer, working_set=turns)
        else:
            gradfold.fold(model, optimizer, working_set=turns)
        return usual(optimizer)

    return make


def blocks_of(model: nn.Module) -> int:
    """Return how many blocks BAdam has: the layers, embedding, and head with the last norm."""
    return model.config.num_hidden_layers + 2  # type: ignore[union-attr]


ROTATING = "another block in every step; states begin anew"
METHODS: dict[str, Method] = {
    "torch fused": Method(torch_adamw(fused=True), judged="torch AdamW"),
    "torch foreach": Method(torch_adamw(foreach=True), judged="torch AdamW"),
    "forward and backward alone": Method(dropped, note="gradients are dropped as they arrive"),
    "torch hooks": Method(
        hooks(lambda one: torch.optim.AdamW(one, lr=LR, fused=True)),
        judged="torch hooks",
        note="an optimizer per parameter",
    ),
    "optimi": Method(released, "torch-optimi", "optimi", note="gradient release"),
    "flashoptim": Method(
        flashoptim, "flashoptim", "flashoptim", note="gradient release; eager form, states in the weights' dtype"
    ),
    "LOMO": Method(lomo, "lomo-optim", "LOMO", note="SGD: no states"),
    "BAdam": Method(badam, "badam", "BAdam", turns=blocks_of, note=ROTATING),
    "GaLore": Method(galore_per_layer, "galore-torch", note=f"per layer, rank {RANK}; between two projections"),
    "torchao 8-bit": Method(of_package("torchao.optim", "AdamW8bit"), "torchao", note="stored gradients; compiled"),
    "bitsandbytes 8-bit": Method(
        of_package("bitsandbytes.optim", "AdamW8bit"), "bitsandbytes", note="stored gradients"
    ),
    "gradfold": Method(folded(), judged="gradfold", note="states as torch keeps them"),
    "gradfold, bf16 states": Method(folded(states="bf16"), judged="gradfold"),
    "gradfold, int8 states": Method(folded(states="int8"), judged="gradfold"),
    "gradfold, int4 states": Method(folded(states="int4"), judged="gradfold"),
    "gradfold, int8 states, head folded": Method(folded("fold", states="int8"), judged="gradfold"),
    "gradfold, working set": Method(
        folded(working_set=True), judged="gradfold", turns=lambda model: CHUNKS, note=f"{CHUNKS} chunks; {ROTATING}"
    ),
}


def attach(name: str, model: nn.Module) -> Finish:
    """Attach a method to a model.

    Raises:
        PeerUnavailable: It is not installed, or does not run here.
    """
    method = METHODS[name]
    try:
        method.version()
    except importlib.metadata.PackageNotFoundError:
        raise PeerUnavailable(f"not installed (pip install --no-deps {method.package})") from None
    try:
        return method.make(model)
    except PeerUnavailable:
        raise
    except Exception as error:  # whatever a peer raises is its answer
        raise PeerUnavailable(f"does not run here: {message(error)}") from error
