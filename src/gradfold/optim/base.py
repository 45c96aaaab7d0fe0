"""A torch optimizer made of a rule: ordinary until it is folded, and with torch's own state_dict either way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from gradfold.backends import DenseUse, Reference, Scratch
from gradfold.engine import Ledger, apply, refuse_parameter
from gradfold.errors import FoldError
from gradfold.rules import Rule

# Keys torch's optimizers keep in their groups that choose an implementation, not a formula. They stand in the groups
# here with torch's defaults, so that a state_dict loads into the torch optimizer of the same name.
TORCH_ONLY = {"foreach": None, "capturable": False, "differentiable": False, "fused": None}


class RuleOptimizer(torch.optim.Optimizer):
    """Base of gradfold's optimizers: ``torch.optim.Optimizer`` semantics for one element-wise rule.

    Unfolded, ``step()`` reads ``.grad`` like any optimizer. Once ``gradfold.fold`` has adopted it, each parameter steps
    inside backward, and ``step()`` audits and closes the step.
    """

    rule: ClassVar[Rule]
    torch_only: ClassVar[tuple[str, ...]] = ("foreach", "capturable", "differentiable")

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]):
        self._ledger: Ledger | None = None
        self._groups: dict[int, dict[str, Any]] = {}
        self._backend: Reference | None = None
        super().__init__(params, {**defaults, **{key: TORCH_ONLY[key] for key in self.torch_only}})

    @staticmethod
    def validate(group: dict[str, Any]) -> None:
        """Raise ValueError for a group's hyper-parameter out of range."""

    # stepping ---------------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Folded: close the step that backward made. Unfolded: step every parameter that has a ``.grad``.

        Raises:
            FoldError: the audit found a parameter that did not, or could not, step as it should.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._ledger is None or self._ledger.paused:
            if self._ledger is not None:
                self._ledger.require_closed("optimizer.step() inside fold.paused()")
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        self.apply(param)
        else:
            self._ledger.close()
        self._groups.clear()  # a parameter may move to another group between steps
        return loss

    def apply(self, param: Parameter) -> None:
        """Step one parameter from its ``.grad``, which stays as it is."""
        grad = param.grad
        if grad is None:
            raise FoldError("apply() needs a parameter with a .grad")
        if param.is_complex():
            raise FoldError(
                f"a complex parameter of shape {tuple(param.shape)}: the rules are for real numbers; view it as real"
            )
        if grad.layout != torch.strided:
            raise FoldError(f"a {grad.layout} gradient for a parameter of shape {tuple(param.shape)}: use sparse=False")
        if self._backend is None:
            self._backend = Reference(Scratch())
        backend = self._ledger.backend if self._ledger else self._backend
        waiting = self._ledger.slots[id(param)].waiting if self._ledger else {}
        apply(param, [DenseUse(grad.detach())], self.state[param], self.rule, self.group_of(param), backend, waiting)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients; folded, also drop what a backward that raised left behind, and open a new step."""
        super().zero_grad(set_to_none)
        if self._ledger is not None and not self._ledger.paused:
            self._ledger.drop()

    def group_of(self, param: Parameter) -> dict[str, Any]:
        """The live param_group this parameter belongs to."""
        group = self._groups.get(id(param))
        if group is None or not any(group is g for g in self.param_groups):
            self._groups = {id(p): g for g in self.param_groups for p in g["params"]}
            group = self._groups[id(param)]
        return group

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; folded, the new parameters join the fold."""
        super().add_param_group(param_group)
        self._groups.clear()
        try:
            self.validate(self.param_groups[-1])
            self._join_fold(self.param_groups[-1]["params"])
        except (ValueError, FoldError):
            self.param_groups.pop()
            raise

    def _join_fold(self, added: list[Parameter]) -> None:
        if self._ledger is None:
            return
        names = {id(param): name for name, param in self._ledger.model.named_parameters()}
        for param in added:
            if id(param) not in names:
                raise FoldError("add_param_group: a parameter that is not in the folded model could never step")
            if param.requires_grad:
                refuse_parameter(names[id(param)], param)
        for param in added:
            self._ledger.claim(names[id(param)], param).arm()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What GradScaler asks before it steps an optimizer."""
        if self._ledger is not None:
            raise FoldError(
                "GradScaler: the folded backward has stepped the weights with gradients that were still scaled; "
                "train in bfloat16, which needs no scaler, or without fold"
            )
        return False

    # state_dict -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's own layout: states by parameter index, groups with torch's keys."""
        if self._ledger is not None:
            self._ledger.require_closed("state_dict()")
        for param in [param for param, states in self.state.items() if not states]:
            del self.state[param]  # torch has no entry for a parameter that keeps nothing
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this optimizer or of the torch optimizer of the same name.

        torch casts every state to its parameter's dtype; here a state keeps the dtype it was saved in, and moves to
        its parameter's device.

        Raises:
            ValueError: other groups, or a state whose shape is not its parameter's; nothing is changed then.
        """
        if self._ledger is not None:
            self._ledger.require_closed("load_state_dict()")
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            if (replaced := hook(self, state_dict)) is not None:
                state_dict = replaced
        state = self._placed_states(state_dict)
        saved = deepcopy(state_dict["param_groups"])
        for group, own in zip(saved, self.param_groups, strict=True):
            self.validate({**own, **group})
        groups = [
            {**own, **group, "params": own["params"]} for group, own in zip(saved, self.param_groups, strict=True)
        ]
        self.state.clear()
        self.state.update(state)
        self.param_groups[:] = groups
        self._groups.clear()
        if self._ledger is not None:
            for slot in self._ledger.slots.values():
                slot.waiting.clear()
                slot.rearm()
                slot.allocate()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _placed_states(self, state_dict: dict[str, Any]) -> dict[Any, dict[str, Any]]:
        saved, own = state_dict["param_groups"], self.param_groups
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in own]:
            raise ValueError(
                f"state_dict has groups of {[len(g['params']) for g in saved]} parameters, this optimizer of "
                f"{[len(g['params']) for g in own]}; build it from the same parameters in the same groups"
            )
        ids = [key for group in saved for key in group["params"]]
        params = [param for group in own for param in group["params"]]
        placed = {}
        for key, param in zip(ids, params, strict=True):
            if key not in state_dict["state"]:
                continue
            states = {name: value for name, value in state_dict["state"][key].items() if value is not None}
            self._refuse_foreign(states)
            placed[param] = {name: self._placed(name, value, param) for name, value in states.items()}
        return placed

    def _refuse_foreign(self, states: dict[str, Any]) -> None:
        """Raise if these states are another optimizer's: they would start again from zero without a word."""
        needed = self.rule.kept | self.rule.counters.keys()
        if states and not needed <= states.keys() <= needed | self.rule.optional:
            raise ValueError(
                f"state_dict has states {sorted(states)}, {type(self).__name__} keeps "
                f"{sorted(needed | self.rule.optional)}; it was saved by another optimizer"
            )

    def _placed(self, name: str, value: Any, param: Parameter) -> Any:
        if not isinstance(value, Tensor):
            return torch.tensor(float(value)) if name in self.rule.counters else deepcopy(value)
        if name in self.rule.counters:
            return value.detach().to("cpu", copy=True)
        if value.shape != param.shape:
            raise ValueError(
                f"state {name!r} has shape {tuple(value.shape)} for a parameter of shape {tuple(param.shape)}; "
                "the parameters are in another order, or the state_dict is of another model"
            )
        return torch.empty_like(param, dtype=value.dtype, requires_grad=False).copy_(value.detach())

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__()  # defaults, state, param_groups: a copy is an ordinary optimizer

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._ledger, self._backend, self._groups = None, None, {}
