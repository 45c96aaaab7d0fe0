"""``fold``: train every weight and never store a gradient."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from torch import Tensor, nn

from . import _torch
from ._options import OPTIMIZERS, Clip, FoldOptions, Head, OnNonfinite, TapePlace, TimingMode
from .backends import DEFAULT_SCRATCH_BYTES, Backend, choose
from .engine import FoldState, outside, refuse_parameter, wrapper_of
from .errors import FoldError
from .head import HeadRow, fold_heads
from .modules import FOLD_PARAM, restore, swap
from .optim import RuleOptimizer
from .report import Report, report_of
from .workset import Rotation, Turn, WorkingSet

# why a torch optimizer's update cannot run inside backward, for those that have no counterpart here
_UNFOLDABLE = {
    "LBFGS": "it evaluates the loss many times per step and looks at all parameters together",
    "SparseAdam": "it needs sparse gradients",
    "Adafactor": "it looks at whole rows and columns of a gradient, not at single elements",
    "Muon": "it orthogonalises a whole gradient matrix, not single elements",
    "ASGD": "gradfold has no rule for it yet",
    "Adadelta": "gradfold has no rule for it yet",
    "Adamax": "gradfold has no rule for it yet",
    "Rprop": "gradfold has no rule for it yet",
}


def fold(
    model: nn.Module,
    optimizer: RuleOptimizer,
    *,
    accumulate: int = 1,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    norm_type: float = 2.0,
    clip: Clip = "exact",
    error_if_nonfinite: bool = False,
    on_nonfinite: OnNonfinite = "raise",
    timing: TimingMode = "auto",
    tape: TapePlace = "device",
    working_set: WorkingSet | None = None,
    head: Head = "fold",
    head_keep_bytes: int | None = None,
    backend: str | Backend = "auto",
    scratch_bytes: int = DEFAULT_SCRATCH_BYTES,
) -> Fold:
    """Fold the optimizer step into ``model``'s backward, in place.

    Classes of foldable modules are swapped; names, parameters, ids and state_dict keys stay. Optimizer states are
    allocated now. Afterwards train as usual: ``loss.backward(); optimizer.step(); optimizer.zero_grad()``.

    Args:
        model: any module; its trainable parameters must be those of ``optimizer``.
        optimizer: one of gradfold's.
        accumulate: how many backwards one ``optimizer.step()`` sums, exactly. All but the last leave the inputs of
            their gradients on a tape, which is never larger than the gradients would be; the last steps as it goes.
        clip_norm: the gradients of all parameters together are scaled down to this norm, exactly as
            ``torch.nn.utils.clip_grad_norm_`` does it; every weight then steps in ``optimizer.step()``. A param_group's
            own ``clip_norm`` clips it by its own norm, or not at all if None.
        clip_value: every element of a gradient is brought within +-this, after ``clip_norm``; also by param_group.
        norm_type: 2.0, ``inf``, or another order of the norm.
        clip: "exact" keeps a tape; "two_pass" keeps none and runs backward twice, by ``fold.backward(loss)``; "delayed"
            scales by the norm of the step before: an approximation, which after a sudden large gradient clips one step
            too late, and the step after it too much.
        error_if_nonfinite: raise if the norm is not finite, as ``clip_grad_norm_``.
        on_nonfinite: what to do about a gradient that is not finite. Its parameter does not step in any case, and
            where all wait for ``optimizer.step()`` none does; "raise" then raises there, "skip" goes on. "ignore"
            does not look.
        timing: "auto" lets every weight step inside backward unless clipping makes it wait; "deferred" makes them all
            wait for ``optimizer.step()``, which a ``GradScaler`` needs: it skips that call after an overflow.
        tape: where the tape lies, the weights' device or (pinned) host memory; on the device there is then one
            weight's part of it at a time.
        working_set: train a chunk of the model at a time, see ``WorkingSet``.
        head: "fold" lets transformers' causal models, given labels, take their loss from ``linear_cross_entropy``,
            wherever that loss is transformers' own and the head a plain Linear (``Fold.report()`` says it); their
            logits are computed only if something reads them, which after the head's step is too late and raises.
            "plain" leaves them as they are.
        head_keep_bytes: how much of the head's softmax is kept for backward, and not computed twice: the ``keep_bytes``
            of ``linear_cross_entropy``.
        backend: ``"triton"`` (GPUs: gradients stay in registers), ``"reference"`` (any device), ``"auto"``: for each
            weight whichever should be faster here; or an object that steps parameters (``gradfold.backends.Backend``).
        scratch_bytes: the most gradient and temporary memory one parameter's step may use on a device, in bytes.

    Raises:
        FoldError: an option is out of range; the optimizer has no element-wise rule; a trainable parameter has no
            optimizer, or the other way round; a module or parameter cannot be routed; a data-parallel wrapper is around
            the model. Nothing has been changed then.
    """
    options = FoldOptions(
        accumulate=accumulate,
        clip_norm=clip_norm,
        clip_value=clip_value,
        norm_type=norm_type,
        clip=clip,
        error_if_nonfinite=error_if_nonfinite,
        on_nonfinite=on_nonfinite,
        timing=timing,
        tape=tape,
    )
    if head not in get_args(Head):
        raise FoldError(f"head={head!r}: give 'fold' or 'plain'")
    _check_keep_bytes(head_keep_bytes, head)
    _check_optimizer(optimizer)
    if wrapper := wrapper_of(model):
        raise FoldError(f"{wrapper}: fold the plain model; gradfold does not train under {wrapper} yet")
    for name, module in model.named_modules():
        if vars(module).get(FOLD_PARAM) is not None:
            raise FoldError(f"{name or 'the model'}: is folded already; call remove() on that fold first")
    named = dict(model.named_parameters())
    in_optimizer = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for name, param in named.items():
        if param.requires_grad and id(param) not in in_optimizer:
            raise FoldError(outside(name))
        if param.requires_grad:
            refuse_parameter(name, param)
    _check_overlap(named)
    in_model = {id(param) for param in named.values()}
    for index, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            if id(param) not in in_model:
                raise FoldError(
                    f"optimizer.param_groups[{index}] has a parameter of shape {tuple(param.shape)} that is not in the "
                    "model, so no folded backward would step it; give it an optimizer of its own"
                )
    if working_set is not None and not isinstance(working_set, WorkingSet):
        raise FoldError(f"working_set={working_set!r}: give a gradfold.WorkingSet, e.g. WorkingSet(chunks=8)")
    if working_set is not None and clip == "delayed":
        raise FoldError(
            "clip='delayed' with working_set=: the last step's norm may be another chunk's; use clip='exact' or "
            "'two_pass'"
        )
    devices = {param.device for param in named.values() if id(param) in in_optimizer}
    state = FoldState(model, optimizer, choose(backend, scratch_bytes, devices), options)
    params = {id(param): state.claim(name, param) for name, param in named.items() if id(param) in in_optimizer}
    rotation = None if working_set is None else Rotation(working_set, state)
    kept = {param: dict(states) for param, states in optimizer.state.items()}
    made = Fold(state, [])
    try:
        made._modules = swap(model, params)
        changed, made._heads = fold_heads(model, head, head_keep_bytes)
        made._modules = [*changed, *made._modules]
        optimizer._fold = state
        if rotation is None:
            for param in params.values():
                param.arm()
        else:
            rotation.begin()
    except BaseException as error:  # out of memory, too: what is half folded would step without being seen
        with contextlib.suppress(FoldError):  # of a store that has already failed
            made.remove()
        if rotation is not None:
            rotation.close()
        optimizer.state.clear()
        optimizer.state.update(kept)
        if isinstance(error, ValueError):
            raise FoldError(f"working_set=: {error}") from None
        raise
    return made


def _check_keep_bytes(keep_bytes: object, head: str) -> None:
    if keep_bytes is None:
        return
    if not isinstance(keep_bytes, int) or isinstance(keep_bytes, bool) or keep_bytes < 0:
        raise FoldError(f"head_keep_bytes={keep_bytes!r}: how many bytes of the softmax to keep, 0 or more")
    if head == "plain":
        raise FoldError(f"head_keep_bytes={keep_bytes} with head='plain', which keeps all logits: give one of them")


def _check_optimizer(optimizer: object) -> None:
    if isinstance(optimizer, RuleOptimizer):
        if optimizer._fold is not None:
            raise FoldError("this optimizer is folded into a model already; call remove() on that fold first")
        return
    name = type(optimizer).__name__
    if name in _UNFOLDABLE:
        raise FoldError(f"{name} cannot be folded: {_UNFOLDABLE[name]}; use gradfold.AdamW or another of gradfold's")
    raise FoldError(
        f"optimizer={name} is not one of gradfold's; use gradfold.{name if name in OPTIMIZERS else 'AdamW'} "
        "(its load_state_dict takes torch's state_dict)"
    )


def _check_overlap(named: Mapping[str, nn.Parameter]) -> None:
    """Two parameters on the same memory: the first to step would change the other under its own backward."""
    spans: dict[int, list[tuple[int, int, str, bool]]] = {}
    for name, param in named.items():
        if param.numel():
            first = int(param.storage_offset())
            last = first + sum((int(n) - 1) * int(k) for n, k in zip(param.shape, param.stride(), strict=True))
            spans.setdefault(_torch.storage_key(param), []).append((first, last, name, param.requires_grad))
    for shared in spans.values():
        shared.sort()
        for (_, end, a, trained), (start, _, b, also) in itertools.pairwise(shared):
            if start <= end and (trained or also):
                raise FoldError(
                    f"{b}: shares its memory with {a} but is another Parameter, so each would step the other's values; "
                    "tie them by assigning the same Parameter to both"
                )


class Fold:
    """A folded model and optimizer."""

    def __init__(self, state: FoldState, modules: list[nn.Module]):
        self._state = state
        self._modules = modules
        self._heads: Sequence[HeadRow] = ()

    @property
    def grad_norm(self) -> float | None:
        """The norm of the last step's gradient over all parameters, before clipping; None before the first step.

        Of order ``norm_type`` where ``clip_norm`` is exact, else 2. NaN if some gradient was not finite. On a GPU,
        reading it waits for the step.
        """
        norm = self._state.grad_norm
        return float(norm) if isinstance(norm, Tensor) else norm

    @property
    def working_set(self) -> Turn | None:
        """Which chunk of the working set is awake; None without one."""
        turns = self._state.turns
        return turns.turn() if isinstance(turns, Rotation) else None

    def describe_working_set(self) -> str:
        """The cut and its settings, in one line; empty without a working set."""
        turns = self._state.turns
        return turns.describe() if isinstance(turns, Rotation) else ""

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step takes from the last one beside weights and optimizer states.

        With ``clip="delayed"`` that is the factor by which gradients are scaled: of each param_group that is clipped
        by its own norm, and under -1 of all others. Else it is empty.
        """
        self._state.require_closed("fold.state_dict()")
        return {"following": {str(pool): float(factor) for pool, factor in self._state.following.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue as the fold that gave this would have.

        Raises:
            FoldError: in the middle of a step; a param_group that the optimizer has not. Nothing has changed then.
        """
        self._state.require_closed("fold.load_state_dict()")
        following: dict[int, float | Tensor] = {
            int(pool): float(factor) for pool, factor in state_dict["following"].items()
        }
        groups = len(self._state.optimizer.groups)
        if unknown := [pool for pool in following if not -1 <= pool < groups]:
            raise FoldError(f"state_dict has param_group {unknown[0]}, and the optimizer has {groups} groups")
        self._state.following = dict(following)

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """A context whose backwards leave their uses on the tape, for any number of them before the last."""
        self._state.accumulating += 1
        try:
            yield
        finally:
            self._state.accumulating -= 1

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()``; with ``clip="two_pass"`` the norm first, then the step, clipped by it.

        With a working set it passes over a loss that uses nothing of what is awake, where torch would raise.

        Two passes add the gradient of a leaf that is no parameter (an input that requires grad) to its ``.grad`` twice.
        """
        state = self._state
        if state.turns is not None and not loss.requires_grad:
            return
        if state.options.clip != "two_pass":
            loss.backward()
            return
        with state.first_pass():
            loss.backward(retain_graph=True)
        if not state.step.nonfinite or not state.step.guarded:  # else this step is left out as a whole
            loss.backward()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which backward and ``optimizer.step()`` are plain PyTorch's: ``.grad`` is written and read.

        Raises:
            FoldError: entered in the middle of a step.
        """
        self._state.require_closed("fold.paused()")
        self._state.paused += 1
        try:
            yield
        finally:
            self._state.paused -= 1

    def remove(self) -> None:
        """Plain modules and an ordinary optimizer again, with the states it has.

        Raises:
            FoldError: in the middle of a step.
        """
        self._state.require_closed("fold.remove()")
        for param in self._state.params.values():
            param.disarm()
        restore(self._modules)
        self._modules = []
        self._state.release()

    def scratch_tensors(self) -> Sequence[Tensor]:
        """The temporary memory the fold holds between steps."""
        return self._state.backend.scratch_tensors()

    def tape_tensors(self, parameter: nn.Parameter | None = None) -> list[Tensor]:
        """What waits for ``optimizer.step()``, of all parameters or of one."""
        params = self._state.params
        chosen = params.values() if parameter is None else filter(None, [params.get(id(parameter))])
        kept = [kept for param in chosen for one in param.slices if (kept := one.deferred)]
        return [tensor for one in kept for term in one.held for tensor in term.tensors]

    def waiting_tensors(self) -> list[Tensor]:
        """States that are allocated and become the optimizer's when their parameters first step."""
        return [t for param in self._state.params.values() for one in param.slices for t in one.lazy.values()]

    def report(self) -> Report:
        """Print and return every parameter's route and bytes, and which heads of causal models are folded."""
        report = report_of(self._state, self._heads)
        print(report)
        return report
