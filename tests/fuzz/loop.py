"""The loop of a case: the same training of a folded model and of its plain twin, a step of each in turn."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import Tensor, nn

import gradfold
from tests.fuzz.case import Case
from tests.fuzz.model import Net, batches
from tests.fuzz.reference import Reference, Slice, rate, split_groups

Weights = dict[str, Tensor]
Seen = dict[str, tuple[Tensor, Tensor]]  # what is compared -> the folded model's, torch's


def snapshot(model: nn.Module) -> Weights:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


class Folded:
    """The folded side of a case: model, optimizer, fold."""

    def __init__(self, case: Case, folder: str):
        self.case, self.folder = case, folder
        self.model = Net(case)
        self.before = snapshot(self.model)  # the weights that a refusal must find unmoved
        groups = split_groups(case, self.model)
        self.late: dict[str, Any] | None = None  # a group that joins after a step
        if case.has("new_group") and len(groups[-1]["params"]) > 1 and groups[-1]["params"][-1].requires_grad:
            param = groups[-1]["params"].pop()
            param.requires_grad_(False)
            self.late = {**groups[-1], "params": [param]}
        self.optimizer = self._optimizer(groups)
        self.fold = self._fold()

    def _optimizer(self, groups: list[dict[str, Any]]) -> gradfold.optim.RuleOptimizer:
        hyper, storage = dict(self.case.hyper), dict(self.case.storage)
        if self.case.has("tensor_lr"):
            hyper["lr"] = torch.tensor(hyper["lr"], dtype=torch.float64)
        if storage.get("states"):
            storage["small_size"] = 0
        return getattr(gradfold, self.case.rule)(groups, **hyper, **storage)

    def _fold(self) -> gradfold.Fold:
        options = self.case.options
        if self.case.working_set:
            settings = dict(self.case.working_set)
            if settings.get("offload") == "disk":
                settings["folder"] = self.folder
            options["working_set"] = gradfold.WorkingSet(**({"schedule": "step"} | settings))
        return gradfold.fold(self.model, self.optimizer, **options)

    def not_yet(self) -> list[str]:
        """Names of parameters that join the optimizer later."""
        ids = {id(param) for param in self.late["params"]} if self.late is not None else set()
        return [name for name, param in self.model.named_parameters() if id(param) in ids]

    def awake(self) -> list[Slice] | None:
        """The active slices; None without a working set: all parameters."""
        turns: Any = self.fold._state.turns
        if turns is None:
            return None
        always = [(member.name, 0, 0, member.param.shape[0] if member.param.dim() else 1) for member in turns.always]
        return always + [tuple(part) for part in turns.chunks[turns.schedule.index]]

    def between_steps(self, step: int) -> None:
        """What happens to the folded side alone, and must change nothing."""
        case = self.case
        if step == 2 and case.has("resume"):
            self.resume()
        if step == 1 and case.has("refold"):
            kept = self.fold.state_dict()
            self.fold.remove()
            self.fold = self._fold()
            self.fold.load_state_dict(kept)
        if step == 1 and case.has("through_torch"):
            self.through_torch()
        if step == 1 and self.late is not None:
            self.late["params"][0].requires_grad_(True)
            self.optimizer.add_param_group(self.late)
            self.late = None

    def resume(self) -> None:
        """Save everything as a user would, and load it into a new model, optimizer and fold."""
        file = io.BytesIO()
        torch.save((self.model.state_dict(), self.optimizer.state_dict(), self.fold.state_dict()), file)
        frozen = {name for name, p in self.model.named_parameters() if not p.requires_grad}
        self.fold.remove()  # which releases the folder of a working set on disk
        file.seek(0)
        weights, states, rest = torch.load(file, weights_only=True)
        self.model = Net(self.case)
        with torch.no_grad():
            for param in self.model.parameters():
                param.mul_(0.5)  # what is not loaded shows
        if not self.case.working_set:
            for name, param in self.model.named_parameters():
                param.requires_grad_(name not in frozen)
        groups = split_groups(self.case, self.model)
        if len(states["param_groups"]) > len(groups):
            groups.append({**groups[-1], "params": [groups[-1]["params"].pop()]})
        self.optimizer = self._optimizer(groups)
        self.fold = self._fold()
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(states)
        self.fold.load_state_dict(rest)

    def through_torch(self) -> None:
        """Load the optimizer's state into torch's optimizer of the same name, and its state back."""
        if self.case.rule == "Lion":
            return
        groups = [{"params": group["params"]} for group in self.optimizer.groups]
        theirs = getattr(torch.optim, self.case.rule)(groups, foreach=False)
        theirs.load_state_dict(copy.deepcopy(self.optimizer.torch_state_dict()))
        self.optimizer.load_state_dict(theirs.state_dict())


def lockstep(case: Case, plain: Net, folded: Folded, noise: float = 0.0, noise_seed: int = 0) -> Seen:
    """Train both models, a step of each in turn; return all that can be compared."""
    reference = Reference(case, plain, noise, noise_seed)
    awake: list[Slice] | None = None
    seen: Seen = {}
    for step, micros in enumerate(batches(case)):
        folded.before = snapshot(folded.model)
        folded.between_steps(step)
        _freeze(case, step, plain, folded.model)
        was, awake = awake, folded.awake()
        if awake is not None and dict(case.working_set).get("states") == "reset" and was not in (None, awake):
            reference.keep_only(awake)
        _set_rates(case, step, folded, reference)
        paused = case.has("paused_step") and step == 1
        _beside(case, step, plain, folded, micros)
        handles = [handle for model in (plain, folded.model) for handle in _hooks(case, model, step)]
        theirs = _plain_backward(case, plain, step, micros)
        ours = _folded_step(case, folded, step, micros, paused)
        for handle in handles:
            handle.remove()
        missing = folded.not_yet()
        norm = reference.step([key for key in (awake or reference.whole()) if key[0] not in missing], step)
        seen[f"number of input gradients of step {step}"] = torch.tensor(len(ours)), torch.tensor(len(theirs))
        for index, (a, b) in enumerate(zip(ours, theirs)):
            seen[f"input gradient {index} of step {step}"] = a.double(), b.double()
        if norm is not None and not paused:
            got = folded.fold.grad_norm
            assert got is not None
            seen[f"norm of step {step}"] = torch.tensor(got).double(), torch.tensor(norm).double()
    for name, param in folded.model.named_parameters():
        seen[name] = param.detach().double(), reference.named[name].detach().double()
    buffers = dict(plain.named_buffers())
    # BatchNorm counts every run of its forward: checkpoints of sleeping layers run once, those of two passes thrice
    counted = not (case.segments and (case.working_set or case.clip == "two_pass"))
    for name, buffer in folded.model.named_buffers() if counted else ():
        seen[name] = buffer.detach().double(), buffers[name].detach().double()
    return seen | ({} if case.working_set or case.storage else _states(folded, reference))


def _states(folded: Folded, reference: Reference) -> Seen:
    """The optimizer states of all parameters that have stepped."""
    names = {id(p): name for name, p in folded.model.named_parameters()}
    ours = {names[id(p)]: states for p, states in folded.optimizer.state.items()}
    seen: Seen = {}
    for name, states in reference.states().items():
        for key, value in states.items():
            if isinstance(value, Tensor):
                got = ours.get(name, {}).get(key, torch.empty(0))
                seen[f"state {key} of {name}"] = got.double(), value.double()
    return seen


def _set_rates(case: Case, step: int, folded: Folded, reference: Reference) -> None:
    names = {id(p): name for name, p in folded.model.named_parameters()}
    for group in folded.optimizer.param_groups:
        own = reference.owner[names[id(group["params"][0])]]
        new = rate(case, own.get("lr", dict(case.hyper)["lr"]), step)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(new)
        else:
            group["lr"] = new


def _freeze(case: Case, step: int, *models: Net) -> None:
    if case.has("freeze"):
        for model in models:
            first = next(iter(model.ops[0].parameters()), None)
            if first is not None and len(list(model.parameters())) > 1:
                first.requires_grad_(step % 2 == 0)


def _loss(case: Case, model: Net, step: int, index: int, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss of a micro-batch and the model's input; the same random numbers for both models."""
    torch.default_generator.manual_seed(1000 * step + index)
    x, labels = batch
    if x.is_floating_point():
        x = x.to(getattr(torch, case.dtype), copy=True)
        x.requires_grad_(case.has("leaf_input") or case.has("input_grad"))
    model.step = step
    loss = model(x, labels) / case.accumulate
    if case.has("two_losses"):
        loss = loss + model(x * 0.5 if x.is_floating_point() else x.flip(-1), labels) / case.accumulate
    return (loss * float("nan") if case.poison == step else loss), x


def _plain_backward(case: Case, model: Net, step: int, micros: list) -> list[Tensor]:
    """Backward of all micro-batches; returns the gradients of inputs."""
    found = []
    for index, batch in enumerate(micros):
        loss, x = _loss(case, model, step, index, batch)
        if loss.requires_grad:
            if case.has("input_grad"):
                found.append(torch.autograd.grad(loss, x, retain_graph=True)[0])
            loss.backward()
            found += [] if x.grad is None else [x.grad.clone()]
    return found


def _folded_step(case: Case, folded: Folded, step: int, micros: list, paused: bool) -> list[Tensor]:
    """Backward and step of the folded model; returns the gradients of inputs."""
    fold, optimizer = folded.fold, folded.optimizer
    found: list[Tensor] = []

    def backward(index: int) -> Tensor | None:
        loss, x = _loss(case, folded.model, step, index, micros[index])
        if not loss.requires_grad:
            if case.working_set:
                fold.backward(loss)
            return None
        if case.has("input_grad"):
            found.append(torch.autograd.grad(loss, x, retain_graph=True)[0])
        if case.has("retain_graph"):
            loss.backward(retain_graph=True)
        else:
            fold.backward(loss)
        found.extend([] if x.grad is None else [x.grad.clone()])
        if case.has("second_backward"):
            folded.before = snapshot(folded.model)
            _loss(case, folded.model, step, index, micros[index])[0].backward()
        return loss

    last = len(micros) - 1
    if paused:
        with fold.paused():
            for index in range(last + 1):
                backward(index)
            _clip_as_torch(case, folded)
            optimizer.step()
            optimizer.zero_grad()
        return found
    for index in range(last):
        if case.by_context:
            with fold.accumulating():
                backward(index)
        else:
            backward(index)
    if case.has("closure"):
        optimizer.step(lambda: backward(last))
    else:
        backward(last)
        left = [name for name, p in folded.model.named_parameters() if p.grad is not None and p.grad.any()]
        assert not left, f"{left[0]} has a gradient left"
        optimizer.step()
    (folded.model if case.has("model_zero_grad") else optimizer).zero_grad(set_to_none=not case.has("zeros"))
    return found


def _clip_as_torch(case: Case, folded: Folded) -> None:
    """What a user writes in a paused step."""
    groups = folded.optimizer.groups
    pooled = [p for group in groups if "clip_norm" not in group for p in group["params"]]
    limits = [(pooled, case.clip_norm), *((g["params"], g["clip_norm"]) for g in groups if "clip_norm" in g)]
    for params, limit in limits:
        if limit is not None:
            full = [p for p in params if p.numel()]
            torch.nn.utils.clip_grad_norm_(full, limit, case.norm_type)
    if case.clip_value is not None:
        torch.nn.utils.clip_grad_value_(folded.model.parameters(), case.clip_value)
    bad = [p for p in folded.model.parameters() if p.grad is not None and not p.grad.isfinite().all()]
    for param in folded.model.parameters() if bad and case.waits else bad:
        param.grad = None


def _beside(case: Case, step: int, plain: Net, folded: Folded, micros: list) -> None:
    """What a loop does beside its step; both models do it, for their buffers."""
    if case.has("eval_pass"):
        with torch.no_grad():
            for model in (plain, folded.model):
                model.eval()
                _loss(case, model, step, 50, micros[0])
                model.train()
    if case.has("dropped_forward"):
        for model in (plain, folded.model):
            _loss(case, model, step, 51, micros[0])
    if case.has("probe"):
        loss, _ = _loss(case, plain, step, 52, micros[0])
        if loss.requires_grad:
            loss.backward()
        plain.zero_grad()
        with folded.fold.paused():
            loss, _ = _loss(case, folded.model, step, 52, micros[0])
            if loss.requires_grad:
                loss.backward()
            folded.model.zero_grad()


def _hooks(case: Case, model: Net, step: int) -> list[Any]:
    """Hooks of a user, set before the forward."""
    handles: list[Any] = []
    layer = model.ops[-1]
    if case.has("forward_hook"):
        handles.append(layer.register_forward_hook(lambda module, args, out: out * 1.5))
    if case.has("backward_hook"):
        twice = lambda module, grads, _: tuple(None if g is None else 2 * g for g in grads)  # noqa: E731
        handles.append(layer.register_full_backward_hook(twice))
    if case.has("tensor_hook"):

        def on_output(module: nn.Module, args: Any, out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(lambda grad: 2 * grad)

        handles.append(layer.register_forward_hook(on_output))
    if case.has("param_hook"):
        kinds = (nn.LayerNorm, nn.RMSNorm, nn.Conv1d, nn.Bilinear)
        found = [m.weight for m in model.modules() if isinstance(m, kinds) and m.weight.requires_grad]
        handles += [weight.register_hook(lambda grad: 0.5 * grad) for weight in found[:1]]
    if case.has("folded_hook") and step == 1:
        found = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and "_gradfold_param" in vars(m)]
        handles += [weight.register_hook(lambda grad: grad) for weight in found[:1] if weight.requires_grad]
    return handles
