"""The memory of a step that was never taken: a model of fake tensors, folded and stepped by the code that would."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gradfold.backends import as_accelerator
from gradfold.fold import Fold
from gradfold.plan.errors import PlanError
from gradfold.plan.fake import SkipWrites
from gradfold.plan.layers import repeated
from gradfold.plan.masks import packing_known
from gradfold.plan.models import Subject
from gradfold.plan.played import PlayedHost
from gradfold.plan.settings import Settings
from gradfold.plan.step import StepMemory, record_step, run_step
from gradfold.plan.trace import LiveBytes
from gradfold.workset import Rotation, WorkingSet


@dataclasses.dataclass(frozen=True)
class Predicted:
    """One step, and what lies or goes elsewhere."""

    memory: StepMemory
    parameters: int
    host_bytes: int = 0  # sleeping states in host memory, once every chunk has had its turn
    disk_bytes: int = 0  # ... on disk
    moved_bytes_per_step: float = 0.0  # between the device and there, both ways, on average
    chunks: int = 0


@dataclasses.dataclass
class _Scene:
    """What it takes to run steps of one model."""

    subject: Subject
    settings: Settings
    device: str  # "cuda": as an accelerator would; "cpu": as this processor does

    def batch(self) -> dict[str, Tensor]:
        ids = torch.zeros(self.settings.batch, self.settings.tokens, dtype=torch.int64)
        return {"input_ids": ids, "labels": ids}

    @contextlib.contextmanager
    def model(self, layers: int | None = None) -> Iterator[nn.Module]:
        """A fake model, with fake tensors on."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        playing = as_accelerator() if self.device != "cpu" else contextlib.nullcontext()
        made = self.subject.build(self.settings.torch_dtype(self.subject.dtype), mode, layers)
        checkpoint(made, self.settings)
        with playing, packing_known(self.batch()), mode, SkipWrites():
            yield made

    def over_layers(self, run: Callable[[nn.Module], StepMemory]) -> StepMemory:
        """A step of the whole model; of two shallow ones, where its layers are alike."""
        depths = self.subject.depths
        if depths is not None:
            first, second, period = depths
            found = []
            for layers in (first, second):
                with self.model(layers) as model:
                    found.append(run(model))
            whole = self.subject.layers
            assert whole is not None
            timeline = repeated(found[0].timeline, found[1].timeline, (whole - first) // period, period)
            if timeline is not None:
                return StepMemory.of(found[0].label, timeline)
        with self.model() as model:
            return run(model)


def predict(subject: Subject, settings: Settings, device: str = "cuda") -> Predicted:
    """Run the step that `settings` describe. Raises PlanError or FoldError for what cannot be done."""
    scene = _Scene(subject, settings, device)
    if settings.working_set is not None:
        with scene.model() as model:
            return _in_turns(scene, model, settings.working_set)

    def run(model: nn.Module) -> StepMemory:
        optimizer = settings.make_optimizer(_trainable(model))
        made = settings.make_fold(model, optimizer, None) if settings.fold else None
        if made is None:
            _begin(optimizer)
        try:
            return _second_step(scene, model, optimizer, made, settings.describe())
        finally:
            if made is not None:
                made.remove()

    return Predicted(scene.over_layers(run), subject.parameters())


def predict_peer(
    subject: Subject, settings: Settings, make_optimizer: Callable[..., Any], label: str, device: str = "cuda"
) -> StepMemory:
    """The same batches trained with another optimizer, and without a fold."""
    scene = _Scene(subject, settings, device)

    def run(model: nn.Module) -> StepMemory:
        optimizer = make_optimizer(_trainable(model))
        _begin(optimizer)
        return _second_step(scene, model, optimizer, None, label)

    return scene.over_layers(run)


def resting_of(subject: Subject, settings: Settings) -> tuple[int, int, int]:
    """Bytes of the weights, how many parameters there are, and bytes of the states, without a step."""
    scene = _Scene(subject, settings, "cuda")
    found: list[tuple[int, int, int]] = []
    depths = subject.depths
    for layers in depths[:2] if depths else (None,):
        with scene.model(layers) as model:
            weights = _bytes([*model.parameters(), *model.buffers()])
            optimizer = settings.make_optimizer(_trainable(model))
            made = settings.make_fold(model, optimizer, None)
            held = [state for states in optimizer.state.values() for state in states.values()]
            found.append((weights, _count(model), _bytes([*held, *made.waiting_tensors()])))
            made.remove()
    if depths is None or subject.layers is None:
        return found[0]
    first, second, _ = depths
    more = (subject.layers - first) // (second - first)
    weights, count, states = (a + (b - a) * more for a, b in zip(*found, strict=True))
    return weights, count, states


def _second_step(scene: _Scene, model: nn.Module, optimizer: Any, made: Fold | None, label: str) -> StepMemory:
    batch, parts = scene.batch(), scene.settings.accumulate
    with _tracing(scene):
        run_step(model, optimizer, batch, made, micro_batches=parts)
        return record_step(model, optimizer, batch, made, label=label, micro_batches=parts)


def _in_turns(scene: _Scene, model: nn.Module, config: WorkingSet) -> Predicted:
    """A step of the first chunk's turn and one of the last's, each with the change to the next chunk after it.

    In the first turn backward goes all the way down; the last one's is short, and next to the loss head's memory.
    """
    settings, batch = scene.settings, scene.batch()
    host = PlayedHost() if config.offload is not None and scene.device != "cpu" else None
    # Every step changes chunks, and both chunks of a change have had a turn before.
    watched = dataclasses.replace(config, interval=1, order="forward", offload=host, folder=None)
    optimizer = settings.make_optimizer(_trainable(model))
    made = settings.make_fold(model, optimizer, watched)
    rotation = made._ledger.turns
    assert isinstance(rotation, Rotation)
    chunks = len(rotation.chunks)
    weight_bytes = sum(slot.param.numel() * slot.param.element_size() for slot in rotation.turning)
    stored_bytes = int(sum(rotation.chunk_bytes(index) for index in range(chunks))) - weight_bytes

    def go(index: int) -> None:
        """Make this chunk's turn the next."""
        rotation.schedule.next = index % chunks
        run_step(model, optimizer, batch, made, loss=_of_awake, micro_batches=settings.accumulate)

    found: list[StepMemory] = []
    kept = 1.0
    try:
        for turn in dict.fromkeys((0, chunks - 1)):
            if chunks > 1:
                for index in (turn + 1, turn):
                    if rotation.schedule.index != index % chunks:
                        go(index)
            rotation.schedule.next = (turn + 1) % chunks
            before = 0 if host is None else host.left_bytes
            here = sum(_bytes(states.values()) for states in optimizer.state.values())
            asleep = _sleeping_bytes(rotation) if host is None else 0
            resting: list[Tensor] = []

            def meet(live: LiveBytes) -> None:
                if host is not None:
                    host.meter = live
                    live.set_aside(*host.host_tensors())
                elif config.states == "keep" and stored_bytes > here + asleep:  # of chunks that had no turn here
                    resting.append(torch.empty(stored_bytes - here - asleep, dtype=torch.uint8))
                    live.track(resting, category="states")
                if host is None:
                    live.track([t for slot in rotation.turning for _, held in rotation._sleeping(slot) for t in held.values()], category="states")

            with _tracing(scene):
                found.append(
                    record_step(
                        model, optimizer, batch, made, label=settings.describe(), micro_batches=settings.accumulate, meet=meet
                    )
                )
            if host is not None:
                host.meter = None
                kept = (host.left_bytes - before) / here if here else 0.0
    finally:
        if host is not None:
            host.meter = None
        made.remove()
    highest = max(found, key=lambda memory: memory.peak_bytes)
    slept = int(stored_bytes * kept * (chunks - 1) / chunks)
    away = config.offload is not None
    return Predicted(
        memory=highest,
        parameters=scene.subject.parameters(),
        host_bytes=slept if away and config.offload != "disk" else 0,
        disk_bytes=slept if config.offload == "disk" else 0,
        moved_bytes_per_step=2 * kept * stored_bytes / chunks / config.interval if away and chunks > 1 else 0.0,
        chunks=chunks,
    )


def _of_awake(model: nn.Module, batch: Any) -> Tensor:
    """A loss that reaches all that is awake, and is nothing to compute."""
    return sum((p.sum() for p in model.parameters() if p.requires_grad), torch.zeros(()))  # type: ignore[return-value]


def _sleeping_bytes(rotation: Rotation) -> int:
    return sum(_bytes(held.values()) for slot in rotation.turning for _, held in rotation._sleeping(slot))


def checkpoint(model: nn.Module, settings: Settings) -> None:
    """Let a model compute its activations again in backward, if it shall. Raises PlanError if it cannot."""
    if not settings.checkpointing:
        return
    how = {"use_reentrant": False}
    made: Any = model
    if not getattr(made, "supports_gradient_checkpointing", False):
        raise PlanError(f"checkpointing=True: {type(model).__name__} has none; leave it out")
    if hasattr(made, "activation_checkpointing_enable"):  # its name since transformers 5.2x
        made.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


@contextlib.contextmanager
def _tracing(scene: _Scene) -> Iterator[None]:
    """What models raise on fake tensors, as an error of ours."""
    try:
        yield
    except (NotImplementedError, torch._subclasses.fake_tensor.DynamicOutputShapeException) as error:
        raise _untraceable(scene, error) from error
    except RuntimeError as error:
        if "DataDependent" in type(error).__name__:
            raise _untraceable(scene, error) from error
        raise


def _untraceable(scene: _Scene, error: BaseException) -> PlanError:
    return PlanError(
        f"model {scene.subject.name}: looks at the values of its tensors, and a plan has none ({type(error).__name__})"
    )


def _begin(optimizer: Any) -> None:
    """Let a (fake) step bring an optimizer's states into being."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
