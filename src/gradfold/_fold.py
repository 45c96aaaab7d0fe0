"""``fold``: train every weight and never store a gradient."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ._fold_checks import (
    refuse_data,
    refuse_folded,
    refuse_head,
    refuse_parameters,
    refuse_parts,
    refuse_several,
    refuse_stream,
    refuse_working_set,
)
from ._options import Clip, Data, FoldOptions, Head, OnNonfinite, TapePlace, TimingMode
from .backends import DEFAULT_SCRATCH_BYTES, Backend, Reference, choose
from .dist import Ranks, Replicas, Sharding, ranks_of, replicas_of, shard_reducer, sharding_of
from .engine import (
    FoldState,
    clip_norm_at_step,
    enlist,
    survive_group_norms,
    take_back,
    unwatch_clipping,
    watch_clipping,
    watch_zero_grad,
    way_out_of,
    wrapper_of,
    write_zeros,
)
from .errors import FoldError
from .head import FoldedCausalHead, fold_heads
from .modules import restore, swap
from .optim import RuleOptimizer
from .optim.accept import accepted
from .report import Report, report_of
from .streaming import Stream, Streamer, Traffic
from .workset import Rotation, Turn, WorkingSet


def fold(
    model: nn.Module,
    optimizer: RuleOptimizer | Sequence[RuleOptimizer],
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
    joint: bool = False,
    head: Head = "fold",
    head_keep_bytes: int | None = None,
    backend: str | Backend = "auto",
    scratch_bytes: int = DEFAULT_SCRATCH_BYTES,
    group: Any = None,
    data: Data = "hook",
    stream: Stream | None = None,
) -> Fold:
    """Fold the optimizer step into ``model``'s backward, in place.

    The classes of foldable modules are swapped; names, parameters, ids and state_dict keys stay. Optimizer states are
    allocated now, so that you know whether they fit. Afterwards train as usual: ``loss.backward()``,
    ``optimizer.step()``, ``optimizer.zero_grad()``.

    Args:
        model: Any module on one device, or spread over ranks by torch (DTensor, FSDP2). Its trainable parameters must
            be those of ``optimizer``.
        optimizer: One of gradfold's optimizers, also as Accelerate or Lightning has wrapped it; or a list of them, each
            with parameters of its own. The first ``step()`` closes the step of all, and each needs one ``step()`` for
            every step; ``clip_norm`` is the norm over all of them.
        accumulate: Backwards that one ``optimizer.step()`` sums, exactly. All but the last keep the terms of their
            gradients, or the summed gradient where that is smaller; parameters step during the last one.
        clip_norm: Clip the norm of all gradients together to this, exactly as ``torch.nn.utils.clip_grad_norm_``, which
            itself raises for folded parameters. Every weight then steps in ``optimizer.step()``. A param_group's own
            key ``clip_norm`` clips the group by its own norm, or not at all if it is None.
        clip_value: Clip every element of a gradient to plus or minus this, after ``clip_norm``. Also a key of
            param_groups.
        norm_type: Order of the norm: 2.0, another number above 0, or ``inf``.
        clip: How ``clip_norm`` gets the norm. "exact" defers the steps until it is known. "two_pass" defers nothing and
            runs backward twice, by ``fold.backward(loss)``. "delayed" uses the norm of the step before, an
            approximation: a sudden large gradient is clipped one step too late, and the next one too much.
        error_if_nonfinite: Raise if the norm is not finite, as ``clip_grad_norm_`` does.
        on_nonfinite: What happens to a gradient that is not finite. With "raise" and "skip" its parameter does not
            step, and where all parameters wait for ``optimizer.step()`` none of them does; "raise" then raises in
            ``optimizer.step()``, "skip" goes on. "ignore" does not look.
        timing: "auto" lets every weight step inside backward, unless clipping makes it wait. "deferred" lets all of
            them wait for ``optimizer.step()``, which ``Fold.clip_grad_norm_`` needs, and a ``GradScaler``: it skips
            that call after an overflow.
        tape: Where gradients that wait are kept: "device" (that of the weights) or "host" (pinned memory, with one
            parameter's gradient at a time on the device).
        working_set: Train one chunk of the model at a time: see ``WorkingSet``.
        joint: A backward may step these weights although it reaches another fold, too: for a loss that trains two
            folded models on purpose. Otherwise it is refused before any weight moves, unless they wait for
            ``optimizer.step()`` anyway: a GAN's generator must not step the discriminator it passes through.
        head: "fold" lets transformers' causal models, given labels, compute their loss by ``linear_cross_entropy``, if
            it is transformers' own loss and the head is a plain Linear (``Fold.report()`` shows it). Logits are then
            computed only if something reads them, which raises after the head has stepped. "plain" leaves these
            models as they are.
        head_keep_bytes: Bytes of the head's softmax that are kept for backward instead of computed twice: the
            ``keep_bytes`` of ``linear_cross_entropy``.
        backend: "triton" (GPUs; gradients stay in registers), "reference" (any device), or "auto", which takes
            whichever should be faster for each weight; or an object (``gradfold.backends.Backend``).
        scratch_bytes: The most bytes of gradient and temporary memory that one parameter's step may use on a device.
            Another value may sum a gradient in another order, and so change its last bits.
        group: On many ranks, the process group (``torch.distributed``) whose ranks hold parts of this model and step
            together: their gradients have one norm, and they raise or skip a step together. None means all processes
            if the model has DTensors, the ranks of ``gradfold.replicate`` if that was called, and is refused otherwise;
            "alone" says that this process trains a model of its own.
        data: Under FSDP2 (``fully_shard``), who averages the gradients of folded weights over the ranks. "hook" leaves
            it to FSDP2, which keeps the gradients of a group until backward has left it. "tile" forms and averages a
            weight's gradient a few MiB at a time, and steps the shards at once: no more than that is ever kept.
            "tokens" sends the weight's owners what they need of all ranks' tokens instead, from the second step on;
            "auto" takes, for each weight, which of the two sends less.
        stream: Keep weights and states in host memory or on disk, with a few blocks of the model on the device at a
            time: see ``Stream``. Gradients that wait for ``optimizer.step()`` are kept in host memory then.

    Returns:
        A ``Fold``: reports, contexts and ``remove()``.

    Raises:
        FoldError: An option is out of range; an optimizer is none of gradfold's; a trainable parameter is not
            in the optimizer, or the other way round; a module or parameter cannot be folded; a data-parallel wrapper is
            around the model. Nothing has been changed then.

    Example:
        >>> optimizer = gradfold.AdamW(model.parameters(), lr=2e-5)
        >>> fold = gradfold.fold(model, optimizer, accumulate=4, clip_norm=1.0)
        >>> for number, batch in enumerate(loader, 1):
        ...     (model(**batch).loss / 4).backward()
        ...     if number % 4 == 0:
        ...         optimizer.step()
        ...         optimizer.zero_grad()
    """
    if wrapper := wrapper_of(model):
        raise FoldError(f"{wrapper}: fold the plain model, and {way_out_of(wrapper)}")
    sharding = sharding_of(model)
    replicas = replicas_of(model)
    ranks = ranks_of(model, group) if replicas is None else replicas.ranks(group)

    def make() -> tuple[Fold, Callable[[], None]]:
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
        return _fold(
            model,
            optimizer,
            options,
            working_set,
            joint,
            head,
            head_keep_bytes,
            backend,
            scratch_bytes,
            sharding,
            ranks,
            replicas,
            data,
            stream,
        )

    if ranks is None:
        return make()[0]
    return _fold_together(ranks, make, {"joint": joint, "head": head, "data": data})


def _fold_together(ranks: Ranks, make: Callable[[], tuple[Fold, Callable[[], None]]], words: Mapping[str, Any]) -> Fold:
    """Fold the model on all ranks, or on none of them.

    Args:
        ranks: those that step together.
        make: folds this rank's; ``_fold`` says what it returns.
        words: arguments of ``fold()`` that must be equal on all ranks, beside its ``FoldOptions``.
    """
    undo: Callable[[], None] | None = None
    try:
        with ranks.together("fold()"):
            made, undo = make()
        state = made._state
        turns = None if not isinstance(state.turns, Rotation) else state.turns.settings()
        options = {**dataclasses.asdict(state.options), **words, "working_set": turns}
        options["optimizer"] = type(state.optimizer).__name__
        ranks.enroll(list(state.params.values()), len(state.optimizer.groups), options)
    except BaseException:
        if undo is not None:
            undo()
        raise
    state.ranks = ranks
    return made


def _fold(
    model: nn.Module,
    optimizer: RuleOptimizer | Sequence[RuleOptimizer],
    options: FoldOptions,
    working_set: WorkingSet | None,
    joint: bool,
    head: Head,
    head_keep_bytes: int | None,
    backend: str | Backend,
    scratch_bytes: int,
    sharding: Sharding | None,
    ranks: Ranks | None,
    replicas: Replicas | None,
    data: Data,
    stream: Stream | None,
) -> tuple[Fold, Callable[[], None]]:
    """Fold one process's model; also return what undoes it, with the optimizer's states, before the first step."""
    refuse_head(head, head_keep_bytes)
    refuse_data(data)
    mine = accepted(optimizer)
    refuse_folded(model)
    named = dict(model.named_parameters())
    refuse_several(mine, named, working_set, ranks)
    in_optimizer = {id(param) for group in mine.param_groups for param in group["params"]}
    refuse_parameters(named, in_optimizer, mine)
    if sharding is not None:
        sharding.refuse_unmanaged({name: param for name, param in named.items() if id(param) in in_optimizer})
    refuse_working_set(working_set, options.clip, replicas)
    refuse_parts(mine, working_set, ranks, sharding)
    refuse_stream(stream, mine, ranks, sharding)
    if stream is not None:
        options = dataclasses.replace(options, tape="host")
    with contextlib.ExitStack() as begun:
        streamer = None
        if stream is not None:
            streamer = Streamer(stream, model)
            begun.callback(streamer.end)
            streamer.begin()
        devices = {param.device for param in named.values() if id(param) in in_optimizer}
        if any(device.type == "cpu" for device in devices):
            survive_group_norms()
        chosen = choose(backend, scratch_bytes, devices)
        if sharding is not None and data == "hook" and isinstance(chosen, Reference):
            # FSDP2 brings gradients that are there; only to scale them they are copied
            chosen.ahead = options.clip_norm is not None or options.clip_value is not None
        state = FoldState(model, mine, chosen, options, joint, sharding)
        if replicas is not None and ranks is not None and data == "hook":
            state.reducer = replicas.reducer(state, ranks)
        else:
            state.reducer = shard_reducer(state, ranks, data, scratch_bytes, working_set is not None)
        params = {id(param): state.claim(name, param) for name, param in named.items() if id(param) in in_optimizer}
        rotation = None if working_set is None else Rotation(working_set, state, None if ranks is None else ranks.rank)
        kept = {param: dict(states) for param, states in mine.state.items()}
        place = mine._rotation
        made = Fold(state, [])

        def undo() -> None:
            with contextlib.suppress(FoldError):  # of a store that has already failed
                made.remove()
            if rotation is not None:
                rotation.close()
            mine.state.clear()
            mine.state.update(kept)
            mine._rotation = place

        try:
            made._modules = swap(model, params)
            changed, made._heads = fold_heads(model, head, head_keep_bytes)
            made._modules = [*changed, *made._modules]
            mine._fold = state
            with contextlib.nullcontext() if streamer is None else streamer.moving(state):
                if rotation is None:
                    for param in params.values():
                        param.arm()
                else:
                    rotation.begin()
            enlist(state)
            watch_clipping(state)
            watch_zero_grad()
        except BaseException as error:  # out of memory, too: what is half folded would step without being seen
            undo()
            if isinstance(error, ValueError):
                raise FoldError(f"working_set=: {error}") from None
            raise
        begun.pop_all()  # the fold ends it from now on
    return made, undo


class Fold:
    """A folded model and its optimizer; ``fold()`` returns it.

    Example:
        >>> fold = gradfold.fold(model, optimizer)
        >>> print(fold.report())  # each parameter's route and bytes
        >>> fold.grad_norm  # after a step
        >>> fold.remove()  # plain modules and an ordinary optimizer again
    """

    def __init__(self, state: FoldState, modules: list[nn.Module]):
        self._state = state
        self._modules = modules
        self._heads: Sequence[FoldedCausalHead] = ()

    @property
    def options(self) -> FoldOptions:
        """What ``fold()`` was asked for, of accumulation, clipping and timing."""
        return self._state.options

    @property
    def model(self) -> nn.Module:
        """The folded model."""
        return self._state.model

    @property
    def active(self) -> bool:
        """Whether the model is folded: False after ``remove()``."""
        return self._state.optimizer._fold is self._state

    @property
    def grad_norm(self) -> float | None:
        """The norm of the last step's gradient over all parameters, before clipping; None before the first step.

        Its order is ``norm_type`` where ``clip_norm`` is exact, else 2. NaN if a gradient was not finite. On a GPU,
        reading it waits for the step.
        """
        norm = self._state.grad_norm
        return float(norm) if isinstance(norm, Tensor) else norm

    @property
    def working_set(self) -> Turn | None:
        """The active chunk of the working set, and how long it has been active; None without a working set."""
        turns = self._state.turns
        return turns.turn() if isinstance(turns, Rotation) else None

    @property
    def traffic(self) -> Traffic | None:
        """What crossed the link between host and device in the last step; None without ``stream=``."""
        streamer = self._state.streamer
        return streamer.last if isinstance(streamer, Streamer) else None

    def describe_working_set(self) -> str:
        """Return the cut and its settings in one line; empty without a working set."""
        turns = self._state.turns
        return turns.describe() if isinstance(turns, Rotation) else ""

    def trained_per_turn(self) -> list[int]:
        """Return how many elements train in each turn of the working set; empty without one."""
        turns = self._state.turns
        return turns.trained_per_turn() if isinstance(turns, Rotation) else []

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step needs of the last one, beside weights and optimizer states.

        Returns:
            With ``clip="delayed"``, the factor by which gradients are scaled: under ``following``, by the index of each
            param_group that is clipped by its own norm, and by -1 for all others. Otherwise ``following`` is empty.

        Raises:
            FoldError: in the middle of a step.
        """
        self._state.require_closed("fold.state_dict()")
        return {"following": {str(pool): float(factor) for pool, factor in self._state.following.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue as the fold that returned this would have.

        Args:
            state_dict: what ``state_dict()`` returned.

        Raises:
            FoldError: in the middle of a step, or a param_group that the optimizer does not have. Nothing has changed
                then.
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
        """A context whose backwards only add to the gradient: any number of micro-batches before the last one."""
        self._state.contexts += 1
        try:
            yield
        finally:
            self._state.contexts -= 1

    def accumulate_while(self, predicate: Callable[[], bool] | None) -> None:
        """Take every backward that begins while ``predicate()`` is true as if it ran inside ``accumulating()``.

        For loops that know by themselves which micro-batch is the last of its step, as a framework's does. A step whose
        backwards all were such ones ends in ``optimizer.step()``, as any other.

        Args:
            predicate: is asked as a forward, and as a backward, begins and ends. None: only ``accumulating()`` counts.

        Example:
            >>> fold.accumulate_while(lambda: not accelerator.sync_gradients)
        """
        self._state.accumulate_while = predicate

    def backward(self, loss: Tensor) -> None:
        """Call ``loss.backward()``; with ``clip="two_pass"`` twice: for the norm, and to step, clipped by it.

        With a working set, a loss that uses no active parameter is ignored, where torch would raise. Two passes add the
        gradient of a leaf that is not a parameter (an input that requires grad) to its ``.grad`` twice, and recompute a
        checkpoint twice, of which a BatchNorm inside counts each.

        Args:
            loss: 0-d.

        Raises:
            FoldError: what ``loss.backward()`` raises in a fold.
        """
        state = self._state
        if state.turns is not None and not loss.requires_grad:
            state.ignore()
            return
        if state.options.clip != "two_pass":
            loss.backward()
            return
        with state.first_pass():
            loss.backward(retain_graph=True)
        if not state.step.nonfinite or not state.step.guarded:  # else this step is left out as a whole
            loss.backward()

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False) -> Tensor:
        """Clip the norm of all gradients together, as ``torch.nn.utils.clip_grad_norm_`` does, after the last backward.

        It needs ``timing="deferred"``: the gradients of all weights wait then. They are measured at once, over all that
        the step's backwards have brought, and clipped in ``optimizer.step()``. With a ``GradScaler`` call
        ``scaler.unscale_(optimizer)`` before, as in torch. Inside ``paused()`` it clips ``.grad``.

        Args:
            max_norm: The largest norm; ``float("inf")`` clips nothing and only measures, in any timing.
            norm_type: Order of the norm: 2.0, another number above 0, or ``inf``.
            error_if_nonfinite: Raise if the norm is not finite.

        Returns:
            The norm before clipping, 0-d, of the dtype that torch would return (fp32 for 16-bit gradients).

        Raises:
            FoldError: the weights do not wait for ``optimizer.step()``; the fold clips by ``clip_norm=`` to another
                norm. Nothing has changed then.

        Example:
            >>> fold = gradfold.fold(model, optimizer, timing="deferred")
            >>> model(**batch).loss.backward()
            >>> norm = fold.clip_grad_norm_(1.0)
            >>> optimizer.step()
        """
        state = self._state
        if not self.active:
            raise FoldError("fold.clip_grad_norm_() after fold.remove(): call torch.nn.utils.clip_grad_norm_")
        if state.paused:
            params = [param.param for param in state.params.values()]
            return nn.utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite)
        return clip_norm_at_step(state, float(max_norm), float(norm_type), error_if_nonfinite)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which backward and ``optimizer.step()`` are plain PyTorch's: ``.grad`` is written and read.

        Raises:
            FoldError: entered in the middle of a step.
        """
        state = self._state
        state.require_closed("fold.paused()")
        zeros = write_zeros(state)
        state.paused += 1
        try:
            yield
        finally:
            state.paused -= 1
            if state.streamer is not None:
                state.streamer.rest()
            take_back(state, zeros)

    def remove(self) -> None:
        """Undo the fold: plain modules and an ordinary optimizer again, with the states it has.

        Raises:
            FoldError: in the middle of a step.
        """
        self._state.require_closed("fold.remove()")
        for param in self._state.params.values():
            param.disarm()
        restore(self._modules)
        self._modules = []
        self._state.release()
        unwatch_clipping()

    def scratch_tensors(self) -> Sequence[Tensor]:
        """Return the temporary memory that the fold holds between steps."""
        reducer = self._state.reducer
        return [*self._state.backend.scratch_tensors(), *(() if reducer is None else reducer.scratch_tensors())]

    def tape_tensors(self, parameter: nn.Parameter | None = None) -> list[Tensor]:
        """Return the tensors of gradients that wait for ``optimizer.step()``.

        Args:
            parameter: only those of this parameter; None: of all.
        """
        params = self._state.params
        chosen = params.values() if parameter is None else filter(None, [params.get(id(parameter))])
        kept = [kept for param in chosen for one in param.slices if (kept := one.deferred)]
        return [tensor for one in kept for term in one.held for tensor in term.tensors]

    def waiting_tensors(self) -> list[Tensor]:
        """Return states that are allocated, and become the optimizer's when their parameters first step."""
        return [t for param in self._state.params.values() for one in param.slices for t in one.lazy.values()]

    def report(self) -> Report:
        """Return every parameter's route and bytes, and which heads of causal models are folded: ``print`` it.

        Once backwards have run, routes and heads are what has happened in them, not what was meant to.
        """
        return report_of(self._state, [head.row() for head in self._heads])
