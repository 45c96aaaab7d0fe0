"""The open optimizer step: norms, clipping, and what waits for its end. A new object is made for each step."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from gradfold._options import FoldOptions
from gradfold.backends import BiasTerm, Change, GradTerm, PowerSum
from gradfold.errors import FoldError

from .backward import Backward
from .clipping import change_for
from .deferred import DeferredGrads, StorageHolders
from .owned import Copies
from .protocols import Optimizer, Turns
from .segments import Segment
from .stepper import GroupStep


class Step:
    """One optimizer step, from its first backward to ``optimizer.step()``.

    Attributes:
        optimizer: the folded optimizer.
        options: what ``fold()`` was asked for.
        backwards: the backwards that have reached the fold, inner ones too, by autograd's graph task.
        counts: how many outermost backwards have completed, outside of ``accumulating()``, for each part of the model
            that has backwards of its own: the stages of a pipeline on this rank.
        part: the part whose backward was the last to begin.
        looked: whether the model was examined as the step's first forward began.
        surveyed: when autograd was asked which segments and weights the outermost backward will reach, as
            ``segments.now`` tells it; None while none is known to run.
        segments: the segments that it reaches.
        cautious: whether all of its terms wait for its end, since a segment may reach what has stepped already.
        torch_norms: whether norms decide something in later steps, and must be rounded as torch's.
        last: whether the running backward is the last that this step sums.
        defers: whether its terms wait for ``optimizer.step()``.
        measuring: whether this is the first pass of ``clip="two_pass"``, which only takes the norm.
        measured: whether that pass is over, so that the second may begin.
        agreed: these sums for each pool, over all ranks that step together; None before their vote, and for one rank.
        power_sums: the sum of squares of each slice's gradient (with another ``norm_type``, of powers).
        nonfinite: names of parameters whose gradient was not finite.
        coefficients: what clipping multiplies gradients by, for each pool (``pool``).
        unscale: what gradients are multiplied by before clipping: the fold's own scale, and the inverse of the loss
            scale where a GradScaler has looked.
        guarded: whether gradients that are not finite must stay out of weights and states.
        together: small parameters that step together when backward ends.
        biases: biases that may step along with their weight, by that weight.
        deferred: gradients that wait for ``optimizer.step()``, by slice.
        holders: which of them hold which storage.
        copies: copies of what the caller may change while they wait.
        waiting: terms of parameters for which reentrant checkpoints will bring more.
        outer_due: parameters that the outermost backward has yet to reach outside of those checkpoints.
        moved: whether some parameter has stepped.
        root: the tensor at which the last backward began, where several folds are alive.
        stamps: which values all parameters had at the end of a backward that has stepped some (``Auditor.stamps``).
        loop: the framework's loop that trains the model, if any; ``loop_looked``: whether it was looked for.
        known: deferred gradients whose norm was asked for before ``optimizer.step()``, with its order.
        clipped: what calls between backward and ``optimizer.step()`` have scaled gradients by, as their caller sees it.
        asked: the last of these calls that clips what the fold does not clip by itself; empty if there is none.
        follows: whether the step before was closed, and nothing has cleared its gradients yet, where there are any.
        told: whether all ranks know that one of them has failed in it.
        bounded: whether the caller takes the elements of gradients for clipped.
        turns: the working set, which may hold hyper-parameters for a round.
        resting_sums: the sum of squares of the gradient of slices that rest; no part of any norm.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        options: FoldOptions,
        parts: int = 1,
        scale: float = 1.0,
        turns: Turns | None = None,
    ):
        self.optimizer = optimizer
        self.options = options
        self.turns = turns
        self.backwards: dict[int, Backward] = {}
        self.counts = [0] * parts
        self.part = 0
        self.looked = False
        self.surveyed: int | None = None
        self.segments: list[Segment] = []
        self.cautious = False
        self.last = True
        self.torch_norms = False
        self.defers = False
        self.measuring = False
        self.measured = False
        self.power_sums: dict[Any, PowerSum] = {}
        self.resting_sums: dict[Any, PowerSum] = {}
        self.agreed: dict[int, float] | None = None
        self.nonfinite: list[str] = []
        self.coefficients: dict[int, float | Tensor] = {}
        self.unscale = scale
        self.guarded = options.on_nonfinite != "ignore"
        self.together: list[tuple[Any, list[GradTerm], Change]] = []
        self.biases: dict[Any, tuple[Any, list[BiasTerm]]] = {}
        self.deferred: dict[Any, DeferredGrads] = {}
        self.holders = StorageHolders()
        self.copies = Copies()
        self.waiting: dict[Any, list[GradTerm | BiasTerm]] = {}
        self.outer_due: set[Any] = set()
        self.moved = False
        self.root: weakref.ref[Tensor] | None = None
        self.stamps: list[int] = []
        self.loop: Any = None
        self.loop_looked = False
        self.known: dict[Any, float] = {}
        self.clipped: float | Tensor = 1.0
        self.asked = ""
        self.bounded = False
        self.follows = False
        self.told = False
        self._groups: dict[int, GroupStep] = {}  # id of a parameter -> its group

    # what param_groups say ------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Read the param_groups again: users may have changed them since the last backward."""
        self._groups.clear()

    def forget_norms(self) -> None:
        """Forget the norms that were asked for: a backward begins, which changes them.

        Raises:
            FoldError: gradients were to be clipped by such a norm.
        """
        if self.asked:
            raise FoldError(
                f"a backward after {self.asked}, which measured the gradients without it: call clip_grad_norm_ after "
                "the last backward of the step (to drop the step: optimizer.zero_grad())"
            )
        for one in self.known:
            self.power_sums.pop(one, None)
        self.known.clear()
        self.clipped, self.bounded = 1.0, False

    def group_of(self, param: Parameter) -> GroupStep:
        """Return a parameter's param_group, with what its parameters share in this step."""
        found = self._groups.get(id(param))
        if found is None:
            groups = self.optimizer.groups
            held = groups if self.turns is None else self.turns.rates_of(groups)
            for group, hyper in zip(groups, held, strict=True):
                shared = GroupStep(group, self.optimizer.rule_of(group), hyper)
                self._groups.update((id(member), shared) for member in group["params"])
            found = self._groups.get(id(param))
            if found is None:
                raise FoldError(
                    f"a folded parameter of shape {tuple(param.shape)} is in no param_group of the "
                    "optimizer any more, so it has no learning rate; put it back with "
                    "optimizer.add_param_group, or freeze it"
                )
        return found

    def change(self, group: GroupStep, guarded: bool) -> Change:
        """Return what happens to this group's gradients before the rule."""
        found = group.changes.get(guarded)
        if found is None:
            scale = self.unscale * self.coefficients.get(self.pool(group.group), 1.0)
            found = group.changes[guarded] = change_for(group.group, self.options, scale, guarded, self.torch_norms)
        return found

    def pool(self, group: dict[str, Any]) -> int:
        """Return which norm clips a group: that of all groups together (-1), or its own if it has ``clip_norm``."""
        if "clip_norm" not in group:
            return -1
        return next(index for index, other in enumerate(self.optimizer.groups) if other is group)

    @property
    def clips(self) -> bool:
        """Whether gradients are clipped by a norm in this step."""
        return self.options.clip_norm is not None or any(group.get("clip_norm") for group in self.optimizer.groups)

    @property
    def waits(self) -> bool:
        """Whether every parameter waits for ``optimizer.step()``."""
        return self.options.timing == "deferred" or (self.options.clip == "exact" and self.clips)

    @property
    def power_type(self) -> float:
        """The order of the norms; 2 where parameters step inside backward."""
        return self.options.norm_type if self.clips and self.options.clip == "exact" else 2.0

    @property
    def open(self) -> bool:
        """Whether some parameter has stepped, or waits to, and ``optimizer.step()`` has not closed the step."""
        return self.moved or bool(self.waiting) or any(self.deferred.values())

    @property
    def running(self) -> bool:
        """Whether some backward has begun and not ended."""
        return any(backward.running for backward in self.backwards.values())
