"""A plan: what one way to train takes, what else would take, and what fits a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from os import PathLike
from typing import Any

from .allocator import CONTEXT_BYTES, Allocated
from .bytes import format_bytes
from .predict import Predicted
from .settings import Settings
from .speed import Rates, StreamTimes, stream_times
from .step import StepMemory


@dataclasses.dataclass(frozen=True)
class Plan:
    """The memory of one training step, predicted; ``gradfold.plan`` makes it. All sizes are in bytes.

    Attributes:
        model: Name of the model.
        settings: The way to train that was planned.
        dtype: Dtype of weights and arithmetic, by its name in torch.
        device: "cuda": as an accelerator runs the step; "cpu": as this processor does.
        predicted: Live bytes over the step, parameters, host and disk bytes, and ``moved_bytes_per_step``, an average.
        allocated: What torch's caching allocator makes of the same events, simulated.
        baselines: The same step of plain AdamW, and of others that were asked for.
        seconds: Time that making the plan took.
        rates: What the device computes and the link moves per second, for the times of weights that stream.
        subject: The model that was planned.

    Example:
        >>> plan = gradfold.plan(model, batch=1, tokens=16, states="int8")
        >>> plan.peak_bytes, plan.moment, plan.memory.at_peak()["states"]
        >>> plan.fits(24 * 2**30)
    """

    model: str
    settings: Settings
    dtype: str
    device: str  # "cuda": as an accelerator runs it; "cpu": as this processor does
    predicted: Predicted
    allocated: Allocated
    baselines: tuple[StepMemory, ...] = ()
    seconds: float = 0.0  # that making it took
    rates: Rates = dataclasses.field(default_factory=Rates)
    subject: Any = dataclasses.field(default=None, repr=False, compare=False)  # the model

    @property
    def stream_times(self) -> StreamTimes | None:
        """What the link takes beside what is computed; None where nothing streams."""
        streamed = self.predicted.streamed
        if streamed is None:
            return None
        return stream_times(self.subject, self.predicted.parameters, self.settings, streamed, self.rates)

    @property
    def memory(self) -> StepMemory:
        """The step with the highest peak: its timeline, and what its bytes were for."""
        return self.predicted.memory

    @property
    def peak_bytes(self) -> int:
        """The most bytes of live tensors on the device."""
        return self.memory.peak_bytes

    @property
    def device_bytes(self) -> int:
        """What the card must have: the peak as the allocator rounds it, and the CUDA context."""
        return self.allocated.allocated_bytes + CONTEXT_BYTES if self.device == "cuda" else self.peak_bytes

    @property
    def moment(self) -> str:
        """When the peak occurs: "backward, model.layers.31.mlp, aten.mm"."""
        memory = self.memory
        return f"{memory.peak_phase}, {memory.peak_place or 'loss'}, {memory.peak_op.removesuffix('.default')}"

    def fits(self, budget_bytes: int, margin: float = 0.0) -> bool:
        """Whether the card has enough, and `margin` of it to spare.

        `allocated.reserved_bytes` may be more where the allocator fragments; `gradfold plan` leaves `search.MARGIN`.

        Args:
            budget_bytes: Memory of the card.
            margin: Part of it that must stay free, 0 to 1.
        """
        return self.device_bytes <= budget_bytes * (1 - margin)

    def as_dict(self) -> dict[str, Any]:
        """Return what ``gradfold plan --json`` prints."""
        return {
            "model": self.model,
            "parameters": self.predicted.parameters,
            "dtype": self.dtype,
            "device": self.device,
            "settings": settings_dict(self.settings),
            **self.memory.as_dict(),
            "label": self.settings.describe(),
            "allocator_peak_bytes": self.allocated.allocated_bytes,
            "reserved_bytes": self.allocated.reserved_bytes,
            "context_bytes": CONTEXT_BYTES if self.device == "cuda" else 0,
            "device_bytes": self.device_bytes,
            "host_bytes": self.predicted.host_bytes,
            "disk_bytes": self.predicted.disk_bytes,
            "moved_bytes_per_step": self.predicted.moved_bytes_per_step,
            "chunks": self.predicted.chunks,
            "streamed": self._streamed(),
            "compared_with": [baseline.as_dict() for baseline in self.baselines],
            "seconds": self.seconds,
        }

    def _streamed(self) -> dict[str, Any] | None:
        streamed, times = self.predicted.streamed, self.stream_times
        if streamed is None or times is None:
            return None
        rates = {"tflops": self.rates.flops / 1e12, "link_gbps": self.rates.link_bytes / 1e9}
        return {
            **streamed.as_dict(),
            **dataclasses.asdict(times),
            **rates,
            "disk_gbps": self.rates.disk_bytes / 1e9,
        }

    def describe_stream(self) -> str:
        """Say what streams, what that moves and how long it takes.

        Returns:
            Two sentences; an empty string where nothing streams.
        """
        streamed, times = self.predicted.streamed, self.stream_times
        if streamed is None or times is None:
            return ""
        moved, at = streamed.traffic, self.rates
        homes = [
            f"{format_bytes(size)} of {where}"
            for size, where in ((self.predicted.host_bytes, "host memory"), (self.predicted.disk_bytes, "disk"))
            if size
        ]
        link = f"{at.link_bytes / 1e9:g} GB/s each way"
        link = f"{at.disk_bytes / 1e9:g} GB/s of the disk" if times.by == "disk" else link
        tokens = self.settings.tokens * self.settings.sequences * self.settings.accumulate
        hides = f"the link hides, from {times.tokens:,} tokens a step"
        if not times.hides:
            hides = f"the link decides, and would hide behind {times.tokens:,} tokens a step"
        return (
            f"streamed: {streamed.blocks} blocks; {' and '.join(homes)}; a step moves {format_bytes(moved.to_device)} "
            f"to the device and {format_bytes(moved.to_host)} back. At {link} that takes {times.link_s:.3g} s, "
            f"products at {at.flops / 1e12:.3g} TFLOP/s and steps {times.compute_s:.3g} s: {hides} "
            f"(this one has {tokens:,})"
        )

    def plot(
        self, path: str | PathLike[str], budget_bytes: int | None = None, *, more: Sequence[StepMemory] = ()
    ) -> None:
        """Draw the step of plain AdamW above this one's, on one scale.

        Args:
            path: File to write, .png, .svg or .pdf.
            budget_bytes: Draw a line at this size. None: no line.
            more: Steps to draw below, with their labels.

        Raises:
            ValueError: there is no baseline.
        """
        from .plot import draw_step_memory

        if not self.baselines:
            raise ValueError("plot() draws plain AdamW above the plan: make it with baselines=True")
        tokens = self.settings.tokens * self.settings.batch
        title = f"Predicted memory over one training step: {self.model}, {tokens:,} tokens, {self.dtype}"
        ours = dataclasses.replace(self.memory, label=f"gradfold: {self.memory.label}")
        draw_step_memory(self.baselines[0], ours, path, title=title, budget_bytes=budget_bytes, more=more)

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {self.predicted.parameters:,} parameters, {self.dtype}; "
            f"{self.settings.batch} x {self.settings.tokens} tokens",
            f"{self.settings.describe()}",
            f"peak {format_bytes(self.peak_bytes)} ({self.moment})",
        ]
        lines += [f"  {name:<12} {format_bytes(size):>9}" for name, size in self.memory.at_peak().items() if size]
        lines += [said] if (said := self.describe_stream()) else []
        lines += [f"{baseline.label}: peak {format_bytes(baseline.peak_bytes)}" for baseline in self.baselines]
        return "\n".join(lines)


def settings_dict(settings: Settings) -> dict[str, Any]:
    """Settings as JSON takes them."""
    made = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    turns, stream = settings.working_set, settings.stream
    return made | {
        "options": dict(settings.options),
        "working_set": None if turns is None else _plain(turns),
        "stream": None if stream is None else _plain_stream(stream),
    }


def _plain(turns: Any) -> dict[str, Any]:
    made = {f.name: getattr(turns, f.name) for f in dataclasses.fields(turns)}
    made["offload"] = turns.offload if turns.offload is None or isinstance(turns.offload, str) else "a store of its own"
    made["folder"] = None if turns.folder is None else str(turns.folder)
    made["always"] = list(turns.always)
    made["by"] = turns.by if isinstance(turns.by, str) else "by hand"
    return made


def _plain_stream(stream: Any) -> dict[str, Any]:
    made = dataclasses.asdict(stream)
    made["folder"] = None if stream.folder is None else str(stream.folder)
    made["layers"] = None if stream.layers is None else list(stream.layers)
    return made
