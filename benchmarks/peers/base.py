"""Base class of the adapters, and how they find out what an installed package offers."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

LR = 1e-2
Loss = Callable[[], Tensor]


class PeerUnavailable(Exception):
    """The method cannot run here; the message goes into its row."""


class OutOfDate(Exception):
    """The installed package is not the one that its adapter describes."""


class Definition:
    """A method without its trick: the update it promises, computed from gradients stored in ``.grad``.

    The default is a torch optimizer. ``follow`` tells it which parameters the method trains in this step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer

    def step(self, lr: float) -> None:
        """Take one step from stored gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()


class Contestant:
    """One method on one model, used as its documentation says.

    A subclass makes its objects in ``__init__``, and does in ``step`` what a user writes for one optimizer step. What
    the method has no option for is left to the loop that a torch user would write (``clip_grad_norm_`` after
    backward), so that the judge measures what then happens; ``missing`` says so, and why.
    """

    name: ClassVar[str]
    module: ClassVar[str | None] = None  # imported as
    package: ClassVar[str | None] = None  # installed as
    dtype: ClassVar[torch.dtype] = torch.float64
    defined_by: ClassVar[str] = "torch AdamW"
    notes: ClassVar[dict[str, str]] = {}  # by column; "" is the note of the whole row

    def __init__(self, model: nn.Module, accumulate: int = 1, clip_norm: float | None = None):
        self.model = model
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self.norm: float | None = None  # gradient norm of the last step, as a training log would show it

    # What a user writes -----------------------------------------------------------------------------------------------

    def step(self, losses: Sequence[Loss]) -> None:
        """Take one optimizer step on the sum of these micro-batches' losses."""
        raise NotImplementedError

    def attach(self, schedule: Callable[[int], float]) -> list[torch.optim.lr_scheduler.LRScheduler]:
        """Return torch schedulers, attached as documented."""
        return [torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)]  # type: ignore[attr-defined]

    def state_dict(self) -> Any:
        """Return what a user would save."""
        return self.optimizer.state_dict()  # type: ignore[attr-defined]

    def load_state_dict(self, saved: Any) -> None:
        """Restore a saved state."""
        self.optimizer.load_state_dict(saved)  # type: ignore[attr-defined]

    orders: ClassVar[tuple[str, ...]] = ("",)
    """Ways to load a state, where the documentation leaves them open or the documented one (the first) fails."""

    order: str = ""  # one of ``orders``, set before load_state_dict

    # What the judge asks ----------------------------------------------------------------------------------------------

    @classmethod
    def define(cls, model: nn.Module) -> Definition:
        """Return the same rule with stored gradients, for the judge's copy of the model."""
        return Definition(torch.optim.AdamW(model.parameters(), lr=LR))

    @classmethod
    def missing(cls, column: str) -> str | None:
        """Return why the method cannot do this, found by looking at the installed package; None if it can."""
        return None

    def trained(self) -> set[str]:
        """Return the parameters that the next step trains."""
        return {name for name, param in self.model.named_parameters() if param.requires_grad}

    @classmethod
    def version(cls) -> str | None:
        """Return the package's version."""
        return None if cls.package is None else importlib.metadata.version(cls.package)

    @classmethod
    def load(cls) -> ModuleType:
        """Return the peer's module.

        Raises:
            PeerUnavailable: It is not installed, or cannot be imported here.
        """
        try:
            importlib.metadata.version(cls.package or "")
        except importlib.metadata.PackageNotFoundError:
            raise PeerUnavailable(f"not installed (pip install {cls.package})") from None
        try:
            return importlib.import_module(cls.module or "")
        except ImportError as error:
            raise PeerUnavailable(f"not run here ({type(error).__name__}: {error})") from error


def clip_as_torch(model: nn.Module, clip_norm: float | None) -> float:
    """Clip as a torch user does between backward and step; returns the gradient norm that they would log."""
    if clip_norm is not None:
        return float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm))
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def message(error: Exception) -> str:
    """Return an exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def no_option(words: Iterable[str], *callables: Callable[..., Any]) -> str:
    """Return a sentence saying that no argument of these callables has one of ``words`` in its name.

    Raises:
        OutOfDate: One has, so the package has an option that its adapter does not use yet.
    """
    words = list(words)
    for call in callables:
        for name in inspect.signature(call).parameters:
            if any(word in name for word in words):
                raise OutOfDate(f"{call.__qualname__} has an argument {name!r}: look whether the adapter should use it")
    names = " and ".join(call.__qualname__ for call in callables)
    return f"no argument of {names} has {' or '.join(repr(word) for word in words)} in its name"


def documented(package: str, sentence: str) -> str:
    """Return ``sentence`` as a quotation, if the installed package's description contains it.

    Raises:
        OutOfDate: It does not contain it any more.
    """
    metadata = importlib.metadata.metadata(package)
    text = metadata.get("Description") or metadata.get_payload()
    if " ".join(sentence.split()) not in " ".join(str(text).split()):
        raise OutOfDate(f"the README of {package} no longer says {sentence!r}")
    return f'its README says "{sentence}"'
