"""A fold as its parameters see it: what all of them share, and the questions only the whole fold can answer."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from gradfold._options import FoldOptions
from gradfold.backends import Backend

from .backward import Backward
from .offload import Host
from .protocols import Optimizer, Ranks, Reducer, Sharding, Streaming, Turns
from .segments import Segment
from .step import Step


class FoldContext(ABC):
    """A fold as its parameters see it; ``FoldState`` is the whole of it.

    Attributes:
        model: the folded model.
        optimizer: its optimizer.
        backend: computes gradients and steps parameters.
        options: what ``fold()`` was asked for.
        joint: whether a backward that also reaches another fold may step its parameters.
        params: its parameters (``FoldParam``), by id of the Parameter.
        host: copies deferred gradients to host memory, with ``tape="host"``.
        turns: the working set, if there is one.
        streamer: brings weights and states to the device for their steps, if they live elsewhere.
        ranks: the ranks that step together, if there is more than this one.
        reducer: averages gradients over ranks that have other tokens, if there are any.
        sharding: how parameters are gathered while modules run, if FSDP2 does so.
        parts: how many parts of the model have backwards of their own: the stages of a pipeline on this rank.
        scale: what gradients are multiplied by before anything else: 1 / micro-batches, where a pipeline's schedule
            would divide ``.grad``.
        schedule: the pipeline's schedule that runs the model, if one does.
        late: the parameters that always wait for ``optimizer.step()`` (``FoldParam.late``).
        paused: depth of nested ``fold.paused()`` contexts.
        contexts: depth of nested ``fold.accumulating()`` contexts.
        accumulate_while: tells whether a backward is not the last of its step; None: only these contexts do.
        segments: reentrant checkpoints and the like, by the id of their node.
        following: what clipping multiplies gradients by in the next step, for ``clip="delayed"``.
        owing: of several optimizers, those whose ``step()`` has not been called since another one's closed the step.
        grad_norm: the norm of the last step; a tensor where the host has not waited for it.
        step: the open step.
        last_step: the step before, as long as some parameter remembers that it stepped in it.
        zeroed: parameters whose gradient is zeros in torch, after ``zero_grad(set_to_none=False)``.
        compiled: whether code has been compiled, which may be that of modules of the model.
        told_dense: whether dense gradients of folded modules' weights have been warned of.
        region_bytes: the most that one compiled region has handed over: its uses live until its backward ends.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, backend: Backend, options: FoldOptions, joint: bool):
        self.model = model
        self.optimizer = optimizer
        self.backend = backend
        self.options = options
        self.joint = joint
        self.params: dict[int, Any] = {}
        self.host = Host() if options.tape == "host" else None
        self.turns: Turns | None = None
        self.streamer: Streaming | None = None
        self.ranks: Ranks | None = None
        self.reducer: Reducer | None = None
        self.sharding: Sharding | None = None
        self.region_bytes = 0
        self.told_dense = self.compiled = False
        self.parts = 1
        self.scale = 1.0
        self.schedule: Any = None
        self.late: tuple[Any, ...] = ()
        self.paused = 0
        self.contexts = 0
        self.accumulate_while: Callable[[], bool] | None = None
        self.segments: dict[int, Segment] = {}
        self.following: dict[int, float | Tensor] = {}
        self.owing: tuple[Optimizer, ...] = ()
        self.grad_norm: float | Tensor | None = None
        self.step = Step(optimizer, options)
        self.last_step: weakref.ref[Step] | None = None
        self.zeroed: set[Any] = set()

    def segment(self, node: Any) -> Segment:
        """Return the segment of a node of the outer graph."""
        found = self.segments.get(id(node))
        if found is None or not found.is_of(node):
            found = self.segments[id(node)] = Segment(node)
        return found

    @property
    def accumulating(self) -> bool:
        """Whether a backward only adds to the gradient now, so that a later one is the last of its step."""
        if self.contexts > 0 or (self.accumulate_while is not None and self.accumulate_while()):
            return True
        return self.reducer is not None and self.reducer.holds_back()

    def full(self, parts: Iterable[int]) -> bool:
        """Return whether all backwards of these parts of the model are done that the open step sums."""
        counts, wanted = self.step.counts, self.options.accumulate
        for part in parts:
            if counts[part] < wanted:
                return False
        return not self.accumulating

    # answered by the whole fold -----------------------------------------------------------------------------------

    @abstractmethod
    def look(self) -> None:
        """Raise for what would go wrong, before any weight moves; once per step, as the forward begins."""

    @abstractmethod
    def look_in_turns(self, param: Any) -> None:
        """Do the same where a working set decides what requires grad."""

    @abstractmethod
    def segment_ended(self, segment: Segment) -> None:
        """Step what has waited for a segment that has run now."""

    @abstractmethod
    def enter(self, task: int, param: Any = None) -> Backward:
        """Return the backward of a graph task; one that reaches the fold for the first time is examined.

        Args:
            task: the graph task.
            param: the parameter that it has reached, if that is known.
        """

    @abstractmethod
    def new_step(self) -> None:
        """Forget the open step."""

    @property
    @abstractmethod
    def deferring(self) -> bool:
        """Whether the terms of a backward that began now would wait for ``optimizer.step()``."""

    @property
    @abstractmethod
    def weight_storages(self) -> frozenset[int]:
        """The keys of all parameters' storages, whose values change while backward runs."""

    @abstractmethod
    def companion(self, bias: Tensor) -> Any | None:
        """Return the ``FoldParam`` of a bias that may step in its weight's kernel; None if it may not."""
