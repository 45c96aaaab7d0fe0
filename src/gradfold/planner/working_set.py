"""Steps of a working set: of all turns, or of those that can differ, each with the change of chunks after it.

In the first turns backward goes all the way down; the embedding's own needs little for that, a layer's keeps its
inputs; the last ones are short, and next to the loss head. Every change is between chunks that have had a turn before,
as all but a run's first round are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from gradfold.engine import is_spread
from gradfold.workset import Rotation, WorkingSet
from gradfold.workset.store import bytes_of

from .fake_host import FakeHost
from .step import StepMemory, record_step, run_step
from .streaming import StreamMemory, StreamWatch
from .trace import LiveBytes
from .workload import Workload, trainable

ALL_TURNS = 6  # of so many chunks every turn is traced


@dataclasses.dataclass(frozen=True)
class WorkingSetMemory:
    """What a round of the working set takes."""

    memory: StepMemory  # of the turn with the higher peak
    chunks: int
    asleep_bytes: int  # states of sleeping chunks, once all have had a turn
    moved_bytes_per_turn: float  # in and out; nothing moves where it sleeps on the device
    streamed: StreamMemory | None = None  # of weights that stream


def trace_working_set(workload: Workload, model: nn.Module, config: WorkingSet) -> WorkingSetMemory:
    """Run both steps. With `offload` what sleeps is elsewhere; on a processor only the disk is."""
    return _Round(workload, model, config).run()


class _Round:
    def __init__(self, workload: Workload, model: nn.Module, config: WorkingSet):
        self.model, self.config, self.settings, self.batch = model, config, workload.settings, workload.batch()
        self.loss, self.beside = workload.loss, workload.meet
        away = config.offload == "disk" or (config.offload is not None and workload.device != "cpu")
        self.host = FakeHost() if away else None
        # Every step changes chunks, in an order that is set here.
        watched = dataclasses.replace(config, interval=1, order="forward", offload=self.host, folder=None)
        self.optimizer = self.settings.make_optimizer(trainable(model))
        self.fold = self.settings.make_fold(model, self.optimizer, watched)
        self.watch = None if self.settings.stream is None else StreamWatch(self.fold, workload.device)
        self.streamed: StreamMemory | None = None
        rotation = self.fold._state.turns
        assert isinstance(rotation, Rotation)
        self.rotation = rotation
        self.chunks = len(rotation.chunks)
        weights = bytes_of(member.param for member in rotation.turning)
        self.state_bytes = int(sum(rotation.chunk_bytes(index) for index in range(self.chunks))) - weights

    def run(self) -> WorkingSetMemory:
        try:
            steps = [self._step_of(turn) for turn in self._turns()]
        finally:
            if self.host is not None:
                self.host.meter = None
            self.fold.remove()
        memory = max((step for step, _ in steps), key=lambda step: step.peak_bytes)
        kept = max(share for _, share in steps)  # of a chunk's states: none but masters with states="reset"
        a_chunk = self.state_bytes / self.chunks * kept
        moves = self.host is not None and self.chunks > 1
        return WorkingSetMemory(
            memory, self.chunks, int(a_chunk * (self.chunks - 1)), 2 * a_chunk if moves else 0.0, self.streamed
        )

    def _turns(self) -> list[int]:
        """All of a few; of many those in which the embedding, the first layer and the head begin, and the last."""
        if self.chunks <= ALL_TURNS:
            return list(range(self.chunks))
        slices = [self.rotation.slices[member] for member in self.rotation.turning if member.param.dim() > 1]
        begins = [min(index for index, _ in regions) for regions in slices if regions] or [0]
        layer = begins[min(1, len(begins) - 1)]
        return sorted({0, layer, min(layer + 1, self.chunks - 1), begins[-1], self.chunks - 1})

    def _step_of(self, turn: int) -> tuple[StepMemory, float]:
        """A step of this turn, and which share of its states was kept."""
        following = (turn + 1) % self.chunks
        for index in (following, turn):
            self._go_to(index)
        self.rotation.schedule.next = following
        awake = bytes_of(self._awake())
        left = 0 if self.host is None else self.host.left_bytes
        missing: list[Tensor] = []  # states of chunks that have had no turn here

        def meet(live: LiveBytes) -> None:
            self.beside(self.model, live)
            if self.watch is not None:
                self.watch.meet(live)
            asleep = self._asleep()
            if self.host is not None:
                self.host.meter = live
                live.set_aside(*asleep)
                return
            live.track(asleep, category="states")
            if self.config.states == "keep":
                rest_bytes = self.state_bytes - awake - bytes_of(asleep)
                missing.append(torch.empty(max(0, rest_bytes), dtype=torch.uint8))
                live.track(missing, category="states")

        step = record_step(
            self.model,
            self.optimizer,
            self.batch,
            self.fold,
            loss=self.loss,
            label=self.settings.describe(),
            micro_batches=self.settings.accumulate,
            meet=meet,
            elsewhere=[] if self.watch is None else self.watch.elsewhere(),
        )
        if self.watch is not None:
            found = self.watch.measured()
            if self.streamed is None or found.waiting_bytes > self.streamed.waiting_bytes:
                self.streamed = found
        if self.host is None:
            return step, 1.0 if self.config.states == "keep" else 0.0
        self.host.meter = None
        return step, (self.host.left_bytes - left) / awake if awake else 0.0

    def _go_to(self, index: int) -> None:
        """Make it this chunk's turn, by a step that costs nothing to compute."""
        if self.rotation.schedule.index != index:
            self.rotation.schedule.next = index
            parts = self.settings.accumulate
            run_step(self.model, self.optimizer, self.batch, self.fold, loss=self._sum_of_awake, micro_batches=parts)

    def _sum_of_awake(self, model: nn.Module, batch: Any) -> Tensor:
        """A loss that reaches all that is awake, and of what rests only the rest of a tensor that is cut."""
        awake = {id(one.param) for one in self.fold._state.slices() if not one.rests}
        wanted = [p for p in model.parameters() if p.requires_grad and id(p) in awake]
        return torch.stack([_here(p).sum() for p in wanted]).sum()

    def _awake(self) -> list[Tensor]:
        awake = (one for one in self.fold._state.slices() if not one.rests)  # masters that rest are with the optimizer
        return [t for one in awake for t in one.states.values() if isinstance(t, Tensor)]

    def _asleep(self) -> list[Tensor]:
        turning = self.rotation.turning
        return [t for member in turning for _, held in self.rotation._sleeping(member) for t in held.values()]


def _here(param: torch.Tensor) -> torch.Tensor:
    """What one rank holds of a parameter, with its history."""
    spread: Any = param
    return spread.to_local() if is_spread(param) else param
