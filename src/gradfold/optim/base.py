"""A torch optimizer made of a rule: ordinary until it is folded, and with torch's own state_dict either way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from gradfold._options import OptimizerOptions
from gradfold.backends import DenseTerm, Reference, Scratch
from gradfold.engine import (
    FoldParam,
    FoldState,
    GroupStep,
    ParamStepper,
    Shard,
    drop,
    is_spread,
    note_zeros,
    refuse_drop,
)
from gradfold.engine.storage import OPTIONS
from gradfold.errors import FoldError
from gradfold.rules import Rule

from .slices import sliced
from .state_dict import StateDicts

# Keys of torch's groups that choose an implementation, not a formula. Groups here have them with torch's defaults, so
# that a state_dict loads into the torch optimizer of the same name.
TORCH_ONLY = {"foreach": None, "capturable": False, "differentiable": False, "fused": None}


class RuleOptimizer(StateDicts):
    """Base of gradfold's optimizers: ``torch.optim.Optimizer`` semantics for one rule, or one for each param_group.

    Unfolded, ``step()`` reads ``.grad`` like any optimizer. In a fold, each parameter steps inside backward, and
    ``step()`` audits and closes the step.

    Args:
        params: Parameters, ``named_parameters()``, or param_groups, as in torch.
        defaults: Hyper-parameters of groups that do not give them.
        storage: How weights and states are stored, and torch's implementation options: ``StorageOptions``,
            ``TorchOptions``.

    Raises:
        TypeError: An unknown keyword argument.

    Example:
        >>> class Momentum(gradfold.optim.RuleOptimizer):
        ...     rule = gradfold.rules.SGDRule()
        ...     torch_only = ()
        ...
        ...     def __init__(self, params, lr=0.1, momentum=0.9, **storage):
        ...         defaults = {"lr": lr, "momentum": momentum, "dampening": 0.0, "nesterov": False}
        ...         super().__init__(params, defaults | {"weight_decay": 0.0, "maximize": False}, storage)
        >>> optimizer = Momentum(model.parameters())
        >>> fold = gradfold.fold(model, optimizer)
    """

    rule: ClassVar[Rule]
    torch_only: ClassVar[tuple[str, ...]] = ("foreach", "capturable", "differentiable")

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], storage: OptimizerOptions | None = None):
        self._fold: FoldState | None = None
        self._groups: dict[int, dict[str, Any]] = {}
        self._streams: dict[int, str] = {}
        self._backend: Reference | None = None
        self._steppers: dict[Parameter, ParamStepper] = {}  # for steps without a fold
        self._rotation: Any = None  # of a working set, loaded before folding: the fold with working_set= goes on there
        storage = storage or {}
        implementations = self.torch_only or TORCH_ONLY.keys()  # Lion, which torch does not have, takes any
        if unknown := storage.keys() - OPTIONS.keys() - {"capturable", *implementations}:
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {sorted(unknown)[0]!r}")
        # options that are not given are not added to the groups, so that their keys are torch's own
        super().__init__(params, {**defaults, **{key: TORCH_ONLY[key] for key in self.torch_only}, **storage})
        self._refuse_idle_masters()

    def _refuse_idle_masters(self) -> None:
        """Raise ValueError if masters are asked for, and no weight is of the 16 bits that have one."""
        asking = [group for group in self.groups if group.get("master") is not None]
        dtypes = {param.dtype for group in asking for param in group["params"] if param.is_floating_point()}
        if asking and dtypes and torch.bfloat16 not in dtypes:
            named = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise ValueError(
                f"master={asking[0]['master']!r} with {named} weights does nothing: a master is kept beside a bfloat16 "
                "weight, and a wider weight is its own; leave master= out, or make the weights bfloat16 before the "
                "optimizer"
            )

    # stepping ---------------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Close the step that backward made; without a fold, step every parameter that has a ``.grad``.

        Args:
            closure: computes the loss and calls backward; called first, as by torch's optimizers.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            FoldError: the audit found a parameter that did not, or could not, step as it should.
        """
        self.refuse_step("optimizer.step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._fold is None or self._fold.paused:
            if self._fold is not None:
                self._fold.require_closed("optimizer.step() inside fold.paused()")
                if self._fold.reducer is not None:
                    self._fold.reducer.refuse_paused_step()
            stepping = [param for param in self._params if param.grad is not None]
            if self._fold is None:
                self._refuse_slices(stepping)
                self._prepare_shards(stepping)
            shared: dict[int, GroupStep] = {}
            for param in stepping:
                group = self.group_of(param)
                if id(group) not in shared:
                    shared[id(group)] = GroupStep(group, self.rule_of(group))
                self.apply(param, shared[id(group)])
        else:
            self._fold.close(self)
        self._groups.clear()  # a parameter may move to another group between steps
        return loss

    def apply(self, param: Parameter, shared: GroupStep | None = None) -> None:
        """Step one parameter from its ``.grad``, which stays as it is.

        Args:
            param: a parameter of this optimizer that has a ``.grad``.
            shared: its group in this step; None reads the group now.

        Raises:
            FoldError: the gradient is missing or sparse, or the parameter is complex.
        """
        grad = param.grad
        if grad is None:
            raise FoldError("apply() needs a parameter with a .grad")
        if param.is_complex():
            raise FoldError(
                f"a complex parameter of shape {tuple(param.shape)}: the rules are for real numbers; view it as real"
            )
        if grad.layout != torch.strided:
            raise FoldError(f"a {grad.layout} gradient for a parameter of shape {tuple(param.shape)}: use sparse=False")
        if shared is None:
            self.refuse_step("optimizer.step()")
            group = self.group_of(param)
            shared = GroupStep(group, self.rule_of(group))
        if self._fold is not None:
            for one in self._fold.params[id(param)].slices:
                one.step_gradient(grad.detach(), shared)
            return
        stepper, grad = self._stepper(param), grad.detach()
        if isinstance(stepper.shard, Shard):
            grad = stepper.shard.gradient(grad)
        stepper.step([DenseTerm(grad)], shared)

    def _stepper(self, param: Parameter) -> ParamStepper:
        """Return what steps a parameter without a fold."""
        if self._backend is None:
            self._backend = Reference(Scratch())
        if param not in self._steppers:
            shard = Shard(f"parameter {self.stream_of(param)}", param) if is_spread(param) else None
            self._steppers[param] = ParamStepper(param, self, self._backend, shard=shard)
        return self._steppers[param]

    def _prepare_shards(self, params: Iterable[Parameter]) -> None:
        """Refuse what a rank's part cannot have before any of them steps."""
        for param in params:
            if is_spread(param) and param not in self._steppers:
                try:
                    self.allocate(param)
                except ValueError as error:
                    raise FoldError(f"parameter {self.stream_of(param)}: {error}") from None

    def allocate(self, param: Parameter) -> None:
        """Create the missing states of a parameter that steps without a fold.

        Args:
            param: One of the optimizer's parameters.

        Raises:
            ValueError: its group has options that it cannot have.
        """
        self._stepper(param).allocate(self.group_of(param))

    def forget_params(self) -> None:
        """Forget what was found out about parameters: others were put into the groups, as Accelerate does for FSDP2."""
        self._groups.clear()
        self._streams.clear()
        self._steppers.clear()

    def scratch_tensors(self) -> Sequence[Tensor]:
        """Return the scratch memory of ordinary steps; a fold has its own."""
        return () if self._backend is None else self._backend.scratch_tensors()

    def _at_home(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which all weights show their values, also those that stream."""
        streamer = None if self._fold is None else self._fold.streamer
        return contextlib.nullcontext() if streamer is None else streamer.at_home()

    def _refuse_slices(self, params: Iterable[Parameter]) -> None:
        for param in params:
            if sliced(self.state.get(param, {})):
                raise FoldError(
                    f"a parameter of shape {tuple(param.shape)} has states of slices, each with its own count of "
                    "steps: fold with the same working_set= again, or start anew with optimizer.state.clear()"
                )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, in a fold also those that wait for ``step()`` and what a backward that raised left behind.

        Args:
            set_to_none: as in torch. False: parameters that the next backward does not reach step with zeros.

        Raises:
            FoldError: weights have stepped inside a backward that ``step()`` has not closed, so that no gradient is
                left to throw away. Nothing is cleared then.
        """
        fold = self._fold
        if fold is not None and not fold.paused:
            several = len(fold.optimizer.members) > 1
            mine: Collection[FoldParam] = fold.params.values()
            if several:
                mine = [one for one in mine if fold.optimizer.optimizer_of(one.param) is self]
            refuse_drop(fold, mine, "optimizer.zero_grad()")
            note_zeros(fold, mine, set_to_none)
            drop(fold, mine if several else None)
        super().zero_grad(set_to_none)
