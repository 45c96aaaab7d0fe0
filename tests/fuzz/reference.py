"""What a case's loop does in plain torch: whole gradients, clipping by torch's formula, an optimizer for each slice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.fuzz.case import Case

Slice = tuple[str, int, int, int]  # name of a parameter, dimension, start, stop


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, algorithm 2; torch has none."""

    def __init__(self, params: Any, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, maximize=False, foreach=False):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in [p for p in group["params"] if p.grad is not None]:
                g = -p.grad if group["maximize"] else p.grad
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                update = (beta1 * m + (1 - beta1) * g).sign()
                p.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr)
                m.mul_(beta2).add_(g, alpha=1 - beta2)


def split_groups(case: Case, model: nn.Module) -> list[dict[str, Any]]:
    """The param_groups of a case: every parameter, in turn; the second group has options of its own."""
    hyper = dict(case.hyper)
    params = list(model.parameters())
    groups: list[dict[str, Any]] = [{"params": params[i :: case.groups]} for i in range(case.groups)]
    groups = [group for group in groups if group["params"]]
    if len(groups) > 1:
        groups[1]["lr"] = 0.5 * hyper.get("lr", 1e-2)
        if case.rule != "Rprop":  # which has none
            groups[1]["weight_decay"] = 0.03
        if case.group_clip:
            groups[1]["clip_norm"] = 0.02
    return groups


def rate(case: Case, base: float, step: int) -> float:
    """The learning rate of a step."""
    return base / (1 + step) if case.has("schedule") else base


class Reference:
    """The plain model's optimizers: one for every slice that has stepped, or for every whole parameter."""

    def __init__(self, case: Case, model: nn.Module, noise: float = 0.0, noise_seed: int = 0):
        self.case, self.noise = case, noise
        self.model = model
        self.named = dict(model.named_parameters())
        self.generator = torch.Generator().manual_seed(noise_seed)
        for module in model.modules() if noise else ():
            if not list(module.children()):
                module.register_forward_hook(self._shake_output)
        self.owner: dict[str, dict[str, Any]] = {}
        ids = {id(p): name for name, p in self.named.items()}
        self.groups = split_groups(case, model)
        for group in self.groups:
            for param in group["params"]:
                self.owner[ids[id(param)]] = group
        self.slices: dict[Slice, tuple[nn.Parameter, torch.optim.Optimizer]] = {}
        self.following: dict[int, float] = {}  # what ``clip="delayed"`` multiplies by in the next step

    def _shake(self, x: Tensor) -> Tensor:
        """Every element off by a rounding."""
        return x * (1 + self.noise * torch.randn(x.shape, generator=self.generator, dtype=torch.float64)).to(x.dtype)

    def _shake_output(self, module: nn.Module, args: Any, out: Any) -> Any:
        if not isinstance(out, Tensor):
            return out
        if out.requires_grad:
            out.register_hook(self._shake)
        return self._shake(out)

    def _optimizer(self, leaf: nn.Parameter, group: dict[str, Any]) -> torch.optim.Optimizer:
        hyper = dict(self.case.hyper) | {k: v for k, v in group.items() if k not in ("params", "clip_norm")}
        kind = Lion if self.case.rule == "Lion" else getattr(torch.optim, self.case.rule)
        return kind([leaf], foreach=False, **hyper)

    def whole(self) -> list[Slice]:
        """Every parameter as one slice."""
        return [(name, 0, 0, p.shape[0] if p.dim() else 1) for name, p in self.named.items()]

    def step(self, active: Sequence[Slice], step: int) -> float | None:
        """Step the active slices from ``.grad``; return the norm of their gradients before clipping."""
        case = self.case
        grads: dict[Slice, Tensor] = {}
        for key in active:
            grad = self.named[key[0]].grad
            if grad is not None and (self.named[key[0]].requires_grad or self._steps_frozen):
                grads[key] = _part(grad, key).clone()
        if self.noise and grads:
            size = max((float(g.abs().max()) for g in grads.values() if g.numel()), default=0.0)
            for grad in grads.values():
                grad.add_(torch.randn(grad.shape, generator=self.generator, dtype=grad.dtype), alpha=self.noise * size)
        bad = [key for key, grad in grads.items() if not grad.isfinite().all()]
        norm_type = case.norm_type if case.clip == "exact" and case.waits and self._clips else 2.0
        norm = _norm(grads.values(), norm_type) if grads else None
        if bad and (case.waits or case.clip == "two_pass"):
            grads = {}
        factors = self._factors(grads, norm_type)
        if case.clip == "delayed":
            factors, self.following = self.following, {} if bad else factors
        for key, grad in grads.items():
            if key not in bad:
                self._step_one(key, grad.mul_(factors.get(self._pool(key), 1.0)), step)
        names = {key[0] for key in active}
        for name, param in self.named.items():
            zeros = case.has("zeros") and param.grad is not None and name in names
            param.grad = torch.zeros_like(param) if zeros else None
        return float("nan") if bad else norm

    @property
    def _steps_frozen(self) -> bool:
        """Whether frozen parameters step with their zeros, as in torch; those of a working set do not."""
        return self.case.has("zeros") and not self.case.working_set

    @property
    def _clips(self) -> bool:
        return self.case.clip_norm is not None or any("clip_norm" in group for group in self.groups)

    def _pool(self, key: Slice) -> int:
        group = self.owner[key[0]]
        return 1 if "clip_norm" in group else -1

    def _factors(self, grads: dict[Slice, Tensor], norm_type: float) -> dict[int, float]:
        found = {}
        for pool in {self._pool(key) for key in grads}:
            limit = self.groups[1]["clip_norm"] if pool == 1 else self.case.clip_norm
            members = [grad for key, grad in grads.items() if self._pool(key) == pool]
            norm = _norm(members, norm_type)
            found[pool] = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
        return found

    def _step_one(self, key: Slice, grad: Tensor, step: int) -> None:
        case, view, group = self.case, _part(self.named[key[0]].detach(), key), self.owner[key[0]]
        if case.clip_value is not None:
            grad.clamp_(-case.clip_value, case.clip_value)
        if key not in self.slices:
            leaf = nn.Parameter(view.clone())
            self.slices[key] = leaf, self._optimizer(leaf, group)
        leaf, optimizer = self.slices[key]
        for own in optimizer.param_groups:
            own["lr"] = rate(case, float(optimizer.defaults["lr"]), step)
        leaf.data.copy_(view)  # where the model is: others may have moved it
        leaf.grad = grad
        optimizer.step()
        view.copy_(leaf.data)

    def keep_only(self, awake: Sequence[Slice]) -> None:
        """What ``states="reset"`` does when a chunk goes to sleep."""
        self.slices = {key: value for key, value in self.slices.items() if key in awake}

    def states(self) -> dict[str, dict[str, Tensor]]:
        """The states of whole parameters that have stepped, by name."""
        return {key[0]: optimizer.state[leaf] for key, (leaf, optimizer) in self.slices.items()}


def _norm(grads: Iterable[Tensor], norm_type: float) -> float:
    """torch's total norm; of weights without elements it has none of order infinity."""
    full = [grad for grad in grads if grad.numel()]
    return float(torch.nn.utils.get_total_norm(full, norm_type)) if full else 0.0


def _part(tensor: Tensor, key: Slice) -> Tensor:
    _, dim, start, stop = key
    return tensor if not tensor.dim() else tensor.narrow(dim, start, stop - start)
