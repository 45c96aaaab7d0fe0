"""Steps whose weights stream, in a plan: what is on the device, what lies elsewhere, and what crosses the link.

Fake tensors of the CPU stand for device and host, and a meter tells them apart: homes of weights and states, and
gradients that wait, are counted as in another memory.
"""

from __future__ import annotations

import dataclasses
import functools

from torch import Tensor, nn

from gradfold._fold import Fold
from gradfold.engine.offload import Host
from gradfold.streaming import Streamer, Traffic
from gradfold.workset.store import bytes_of

from .repeat_layers import repeated
from .step import StepMemory, record_step
from .trace import LiveBytes
from .workload import Workload, trainable


@dataclasses.dataclass(frozen=True)
class StreamMemory:
    """What streaming takes beside the device's memory.

    Attributes:
        blocks: how many come and go.
        slot_bytes: memory of the device that blocks come to.
        page_bytes: memory of the device that states come to.
        home_bytes: weights and states that live in host memory or on disk.
        waiting_bytes: the most gradients that wait in host memory for the step.
        traffic: what crosses the link in a step.
    """

    blocks: int
    slot_bytes: int
    page_bytes: int
    home_bytes: int
    waiting_bytes: int
    traffic: Traffic

    def as_dict(self) -> dict[str, int]:
        """What a plan's JSON holds."""
        made = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "traffic"}
        return made | {"to_device_bytes": self.traffic.to_device, "to_host_bytes": self.traffic.to_host}

    def deeper(self, other: StreamMemory, more: int) -> StreamMemory:
        """Return that of a model so many periods deeper, where ``other`` is one period deeper."""

        def of(name: str) -> int:
            return getattr(self, name) + (getattr(other, name) - getattr(self, name)) * more

        one, next_one = dataclasses.asdict(self.traffic), dataclasses.asdict(other.traffic)
        return StreamMemory(
            blocks=of("blocks"),
            slot_bytes=other.slot_bytes,
            page_bytes=other.page_bytes,
            home_bytes=of("home_bytes"),
            waiting_bytes=of("waiting_bytes"),
            traffic=Traffic(**{name: one[name] + (next_one[name] - one[name]) * more for name in one}),
        )


class HostTape(Host):
    """Gradients that wait in host memory: copies that the meter counts elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.meter: LiveBytes | None = None

    def to_host(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to where it waits."""
        if self.meter is None:
            return tensor.clone()
        with self.meter.elsewhere():
            return tensor.clone()

    def from_host(self, tensor: Tensor, device: object) -> Tensor:
        """Copy a tensor to the device."""
        return tensor.clone()


class StreamWatch:
    """The streaming of one fold, as a meter is told of it.

    Args:
        fold: streams.
        device: of the plan; on a processor only the disk is another memory.
    """

    def __init__(self, fold: Fold, device: str):
        streamer = fold._state.streamer
        assert isinstance(streamer, Streamer)
        self.fold, self.streamer = fold, streamer
        streamer.reserve()
        self.away = device != "cpu" or streamer.config.offload == "disk"
        self._tape = HostTape() if device != "cpu" else None
        if self._tape is not None:
            fold._state.host = self._tape
        self._live: LiveBytes | None = None

    def elsewhere(self) -> list[Tensor]:
        """Return what lives in another memory."""
        return self.streamer.host_tensors() if self.away else []

    def meet(self, live: LiveBytes) -> None:
        """Tell the meter of the memory that blocks and states come to."""
        pages = self.streamer.pages.tensors()
        known = set(map(id, pages))
        live.track([t for t in self.streamer.device_tensors() if id(t) not in known], category="weights")
        live.track(pages, category="staging")
        self._live = live
        if self._tape is not None:
            self._tape.meter = live

    def measured(self) -> StreamMemory:
        """Return what the step has shown."""
        homes = bytes_of(self.streamer.host_tensors())
        most = 0 if self._live is None or self._tape is None else self._live.peak_elsewhere_bytes - homes
        pages = bytes_of(self.streamer.pages.tensors())
        if self._tape is not None:
            self._tape.meter = None
        return StreamMemory(
            blocks=len(self.streamer.blocks),
            slot_bytes=bytes_of(self.streamer.device_tensors()) - pages,
            page_bytes=pages,
            home_bytes=homes,
            waiting_bytes=most,
            traffic=dataclasses.replace(self.streamer.last, seconds_waited=0.0),
        )


def trace_stream(workload: Workload) -> tuple[StepMemory, StreamMemory]:
    """Run the step of a workload whose weights stream: of the whole model, or of two depths where layers are alike."""
    config = workload.settings.stream
    assert config is not None
    named = config.layers is not None and not all("*" in name for name in config.layers)
    depths = None if named else workload.depths(least=config.blocks + 1)
    if depths is not None:
        first, second, period, more = depths
        found = []
        for layers in (first, second):
            with workload.model(layers) as model:
                found.append(step_of(workload, model))
        (one, beside), (other, beside_other) = found
        timeline = repeated(one.timeline, other.timeline, more, period)
        if timeline is not None:
            return StepMemory.of(one.label, timeline), beside.deeper(beside_other, more)
    with workload.model() as model:
        return step_of(workload, model)


def step_of(workload: Workload, model: nn.Module, warm_up: bool = False) -> tuple[StepMemory, StreamMemory]:
    """Fold a model, run a step, and count.

    Args:
        workload: what is trained.
        model: of fake tensors, or of real ones.
        warm_up: take a step before, which finds out what follows what.
    """
    settings = workload.settings
    optimizer = settings.make_optimizer(trainable(model))
    fold = settings.make_fold(model, optimizer, None)
    try:
        record = functools.partial(
            record_step,
            model,
            optimizer,
            workload.batch(),
            fold,
            loss=workload.loss,
            label=settings.describe(),
            micro_batches=settings.accumulate,
        )
        # States go where states live once their parameters have stepped. Weights that wait for the end of a step leave
        # scratch memory behind, which the next one's backward finds.
        waits = settings.clip_norm is not None and settings.clip == "exact"
        if warm_up or waits or fold.waiting_tensors():
            record()
        watch = StreamWatch(fold, workload.device)

        def meet(live: LiveBytes) -> None:
            watch.meet(live)
            workload.meet(model, live)

        memory = record(meet=meet, elsewhere=watch.elsewhere())
        return memory, watch.measured()
    finally:
        fold.remove()
