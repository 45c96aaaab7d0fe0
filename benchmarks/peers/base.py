"""What an adapter offers to the judge, and how it asks an installed package what it offers."""

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
    """This method cannot run here; the message is what its row says."""


class OutOfDate(Exception):
    """The installed peer is not the one its adapter describes."""


class Definition:
    """A method without its trick: the update it promises, computed from gradients that are stored in ``.grad``.

    The default is a torch optimizer. ``follow`` tells it which parameters the method trains in this step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer

    def step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()


class Contestant:
    """One method on one model, used as its documentation says.

    A subclass makes its objects in ``__init__`` and says in ``step`` what a user writes for one optimizer step. What it
    has no word for it leaves to the loop a torch user would write (``clip_grad_norm_`` after backward), so that the
    judge measures what then happens; ``missing`` says so, and why.
    """

    name: ClassVar[str]
    module: ClassVar[str | None] = None  # imported as
    package: ClassVar[str | None] = None  # installed as
    dtype: ClassVar[torch.dtype] = torch.float64
    defined_by: ClassVar[str] = "torch AdamW"
    notes: ClassVar[dict[str, str]] = {}  # by column; "" is for the row

    def __init__(self, model: nn.Module, accumulate: int = 1, clip_norm: float | None = None):
        self.model = model
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self.norm: float | None = None  # of the last step's gradient, as a training log would have it

    # what a user writes -----------------------------------------------------------------------------------------------

    def step(self, losses: Sequence[Loss]) -> None:
        """One optimizer step on the sum of these micro-batches' losses."""
        raise NotImplementedError

    def attach(self, schedule: Callable[[int], float]) -> list[torch.optim.lr_scheduler.LRScheduler]:
        """A torch scheduler, attached as documented."""
        return [torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)]  # type: ignore[attr-defined]

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()  # type: ignore[attr-defined]

    def load_state_dict(self, saved: Any) -> None:
        self.optimizer.load_state_dict(saved)  # type: ignore[attr-defined]

    orders: ClassVar[tuple[str, ...]] = ("",)
    """Ways to load a state, where the documentation leaves them open or the documented one (the first) fails."""

    order: str = ""  # of these, set before load_state_dict

    # what the judge asks ----------------------------------------------------------------------------------------------

    @classmethod
    def define(cls, model: nn.Module) -> Definition:
        """The same rule, unfused, for the judge's own copy of the model."""
        return Definition(torch.optim.AdamW(model.parameters(), lr=LR))

    @classmethod
    def missing(cls, column: str) -> str | None:
        """Why there is no way to do this with the method, found by looking at what is installed; None if there is."""
        return None

    def trained(self) -> set[str]:
        """The parameters that the next step trains."""
        return {name for name, param in self.model.named_parameters() if param.requires_grad}

    @classmethod
    def version(cls) -> str | None:
        return None if cls.package is None else importlib.metadata.version(cls.package)

    @classmethod
    def load(cls) -> ModuleType:
        """The peer's module.

        Raises:
            PeerUnavailable: it is not installed, or cannot be imported here.
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
    """What a torch user writes between backward and step; returns what he then logs as the gradient's norm."""
    if clip_norm is not None:
        return float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm))
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def no_option(words: Iterable[str], *callables: Callable[..., Any]) -> str:
    """A sentence saying that no argument of these callables has one of ``words`` in its name.

    Raises:
        OutOfDate: one has: the peer has learned something that its adapter does not use yet.
    """
    words = list(words)
    for call in callables:
        for name in inspect.signature(call).parameters:
            if any(word in name for word in words):
                raise OutOfDate(f"{call.__qualname__} has an argument {name!r}: look whether the adapter should use it")
    names = " and ".join(call.__qualname__ for call in callables)
    return f"no argument of {names} has {' or '.join(repr(word) for word in words)} in its name"


def documented(package: str, sentence: str) -> str:
    """``sentence``, as a quotation, if the installed package's own description contains it.

    Raises:
        OutOfDate: it does not (any more).
    """
    metadata = importlib.metadata.metadata(package)
    text = metadata.get("Description") or metadata.get_payload()
    if " ".join(sentence.split()) not in " ".join(str(text).split()):
        raise OutOfDate(f"the README of {package} no longer says {sentence!r}")
    return f'its README says "{sentence}"'
