"""Schedule-free AdamW, running ``gradfold.rules.ScheduleFreeRule``, and its two weights: to train and to use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.nn import Parameter

from gradfold import _torch
from gradfold._options import OptimizerOptions
from gradfold.codecs import Split, export_master, import_master
from gradfold.engine import Demand
from gradfold.engine.storage import storage_of
from gradfold.errors import FoldError
from gradfold.rules import ScheduleFreeRule, warmed

from .base import RuleOptimizer
from .convert import PANE_ELEMENTS
from .ranges import at_least_zero, two_betas
from .slices import view

RESIDUAL = "weight.residual"
COUNTS = {"k": "step", "lr_max": "lr_max", "weight_sum": "weight_sum"}  # the field's groups -> our counters


class AdamWScheduleFree(RuleOptimizer):
    """Schedule-free AdamW, with the arguments and defaults of the package ``schedulefree``.

    Formula: ``gradfold/rules/schedule_free.py``, after Defazio et al., arXiv 2405.15682.

    The model trains with other weights than it is used with. ``eval()`` puts the average of the weights in their place,
    which is what to evaluate and to save; ``train()`` puts back the weights to go on with. A new optimizer is in train
    mode. In eval mode a step, and a backward that would step, is an error.

    It differs from the package in what a parameter that has no gradient in a step does: here each parameter, and each
    slice of a working set, counts its own steps. ``load_state_dict`` takes the package's state_dict, and
    ``torch_state_dict()`` makes one.

    Args:
        params: Parameters, ``named_parameters()``, or param_groups, as in torch.
        lr: Learning rate, a float or a one-element tensor; no schedule is needed.
        betas: The share of the average in the weights that train, above 0; and the decay rate of ``exp_avg_sq``.
        eps: Added to the denominator for numerical stability.
        weight_decay: Decoupled weight decay, of the weights that train.
        warmup_steps: Steps over which the learning rate grows linearly to ``lr``.
        r: Power of the step in the weights of the average.
        weight_lr_power: Power of the largest learning rate so far in the weights of the average.
        **storage: How weights and states are stored: ``states`` (of ``exp_avg_sq``; ``z`` is fp32 at least),
            ``rounding``, ``master``, ``small_size`` and ``seed``, see ``StorageOptions``; ``foreach``, see
            ``TorchOptions``.

    Raises:
        ValueError: A hyper-parameter is out of range.
        TypeError: An unknown keyword argument.

    Example:
        >>> optimizer = gradfold.AdamWScheduleFree(model.parameters(), lr=2.5e-3)
        >>> fold = gradfold.fold(model, optimizer)
        >>> optimizer.eval()
        >>> evaluate(model)
        >>> optimizer.train()
    """

    rule = ScheduleFreeRule()
    torch_only = ("foreach",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **storage: Unpack[OptimizerOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "warmup_steps": warmup_steps,
                "r": r,
                "weight_lr_power": weight_lr_power,
                "train_mode": True,
            },
            storage,
        )

    @staticmethod
    def validate(group: dict[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter of the group is out of range."""
        at_least_zero(group, "lr", "eps", "weight_decay", "warmup_steps", "r", "weight_lr_power")
        two_betas(group)
        if not group["betas"][0] > 0.0:
            raise ValueError(f"betas={group['betas']}: the first must be above 0, or the average cannot be found again")
        if group.get("maximize"):
            raise ValueError("maximize=True: AdamWScheduleFree has no such option; negate the loss")
        if group.get("capturable"):
            raise ValueError(
                "capturable=True: AdamWScheduleFree counts on the host; leave it out, or use gradfold.AdamW"
            )

    # the two weights --------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Put the weights to train with into the model, in place; nothing if they are there.

        Raises:
            FoldError: in the middle of a step.
        """
        self._switch(True)

    def eval(self) -> None:
        """Put the average of the weights into the model, in place: to evaluate or save it. Nothing if it is there.

        It reaches all weights, those of a working set's sleeping slices too.

        Raises:
            FoldError: in the middle of a step.
        """
        self._switch(False)

    @torch.no_grad()
    def _switch(self, train: bool) -> None:
        groups = [group for group in self.groups if group["train_mode"] is not train]
        if not groups:
            return
        if self._fold is not None:
            self._fold.require_closed(f"optimizer.{'train' if train else 'eval'}()")
        params = [(param, group) for group in groups for param in group["params"]]
        if self._turns is None:
            self._refuse_slices(param for param, _ in params)
        for param, _ in params:  # what cannot be read raises here, before a weight has changed
            self.slices_of(param)
        with self._at_home():
            for param, group in params:
                self._move(param, group, 1 - group["betas"][0] if train else 1 - 1 / group["betas"][0])
        for group in groups:
            group["train_mode"] = train

    def _move(self, param: Parameter, group: dict[str, Any], rate: float) -> None:
        """Move every slice of a weight towards its z, or away from it; one that has not stepped is all three."""
        split = storage_of(param, self.rule, group).weight if param.is_floating_point() else None
        for region, states in self.slices_of(param):
            if "z" not in states or not float(states["step"]):
                continue
            weight = view(param, region)
            z = states["z"].to(weight.device)
            if isinstance(split, Split):
                master = export_master(split, weight, states[RESIDUAL])
                import_master(split, master.lerp_(z, float(rate)), weight, states[RESIDUAL])
            else:
                _lerp(weight, z, float(rate))
            _torch.increment_version((param,))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param_group, in the mode that the others are in.

        Raises:
            ValueError: a hyper-parameter is out of range.
            FoldError: a parameter is not in the folded model, or cannot be folded. The group is not added then.
        """
        if self.__dict__.get("param_groups"):
            param_group = {"train_mode": self.groups[0]["train_mode"], **param_group}
        super().add_param_group(param_group)

    def refuse_step(self, what: str) -> None:
        """Raise in eval mode, where the weights are not those to train, if ``what`` would step one of them."""
        for group in self.groups:
            if not group["train_mode"] and (what == "optimizer.step()" or self._reached(group)):
                raise FoldError(
                    f"{what} in eval mode: the weights are the average of AdamWScheduleFree, which no gradient may "
                    "step; call optimizer.train() before the forward"
                )

    def _reached(self, group: Mapping[str, Any]) -> bool:
        """Return whether the running backward wants to step a parameter of the group."""
        params = {} if self._fold is None else self._fold.params
        return any(params[id(p)].demand() is Demand.STEP for p in group["params"] if id(p) in params)

    # the field's state_dict -------------------------------------------------------------------------------------------

    def torch_state_dict(self) -> dict[str, Any]:
        """Return a state_dict for ``schedulefree.AdamWScheduleFree``, which counts steps by param_group.

        Raises:
            FoldError: in the middle of a step; parameters of a group have stepped unequally often.
        """
        packed = super().torch_state_dict()
        for index, group in enumerate(packed["param_groups"]):
            found = {key: packed["state"][key] for key in group["params"] if key in packed["state"]}
            counts = [tuple(float(states.pop(name)) for name in COUNTS.values()) for states in found.values()]
            if any(count != counts[0] for count in counts):
                steps = sorted({count[0] for count in counts})
                raise FoldError(
                    f"torch_state_dict(): parameters of param_groups[{index}] have stepped {steps[0]:g} to "
                    f"{steps[-1]:g} times, and the package schedulefree keeps one count for a group; save state_dict()"
                )
            start = (0.0, -1.0, 0.0) if not counts else counts[0]
            group.update(zip(COUNTS, (int(start[0]), *start[1:]), strict=True))
            group["scheduled_lr"] = float(group["lr"]) * warmed(start[0], group) if start[0] else 0.0
            if not start[0]:
                for key in found:
                    del packed["state"][key]
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this optimizer, or of ``schedulefree.AdamWScheduleFree``.

        The mode is loaded with it: load the model's weights that were saved in the same mode.

        Raises:
            ValueError: the groups differ, or a state does not fit its parameter. Nothing is changed then.
            FoldError: in the middle of a step.
        """
        super().load_state_dict(_with_counters(state_dict))


def _with_counters(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a state_dict in which each parameter has the counters that the package keeps in its group."""
    groups, states = [], dict(saved["state"])
    for group in saved["param_groups"]:
        if "k" in group:
            counters = {ours: float(group[theirs]) for theirs, ours in COUNTS.items()}
            for key in group["params"]:
                if key in states and "step" not in states[key]:
                    states[key] = {**counters, **states[key]}
        groups.append({key: value for key, value in group.items() if key not in (*COUNTS, "scheduled_lr")})
    return {**saved, "state": states, "param_groups": groups}


def _lerp(weight: Tensor, z: Tensor, rate: float) -> None:
    """Move a weight by ``rate`` of its distance to z, in place; computed in the dtype of z."""
    if weight.dtype == z.dtype or not weight.numel():
        weight.lerp_(z.to(weight.dtype), rate)
        return
    rows, ends = (weight, z) if weight.dim() else (weight.view(1), z.view(1))
    each = max(1, PANE_ELEMENTS // max(1, rows[0].numel()))
    for start in range(0, rows.shape[0], each):
        part, end = rows[start : start + each], ends[start : start + each]
        part.copy_(torch.lerp(part.to(z.dtype), end, rate))
