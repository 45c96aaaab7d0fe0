"""About how long a step takes, to put settings in order.

It is an estimate for ordering, not a promise: products at 40% of an H100's 989 TFLOP/s, weights
and states read and written at 75% of its 3.35 TB/s, 5.6 ps more for each parameter whose states are coded (155.0
against 110.2 ms a step of 8 billion, FORGE's own table), what moves to and from the host at 50 GB/s or a disk at 5.

Where weights stream, `stream_times` says what the link takes beside the products, at rates that can be given.
"""

from __future__ import annotations

import dataclasses

from gradfold.head.loss import default_keep_bytes

from .models import Subject
from .settings import Settings
from .streaming import StreamMemory

FLOPS, BANDWIDTH, LINK, DISK = 0.4 * 989e12, 0.75 * 3.35e12, 50e9, 5e9
CODED_S = 5.6e-12  # for each parameter
STATE_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclasses.dataclass(frozen=True)
class Rates:
    """How fast a card multiplies, and what it is fed by.

    Attributes:
        flops: operations a second that matrix products reach.
        link_bytes: a second in each direction, between device and host memory.
        disk_bytes: a second in both directions together.
    """

    flops: float = FLOPS
    link_bytes: float = LINK / 2
    disk_bytes: float = DISK


@dataclasses.dataclass(frozen=True)
class StreamTimes:
    """What a step takes that streams, computing and over the link, which run beside each other.

    Attributes:
        compute_s: products and steps alone.
        link_s: the copies alone.
        tokens: how many tokens a step needs for the link to hide behind the products.
        by: which of the two links is the slower one, "link" or "disk".
    """

    compute_s: float
    link_s: float
    tokens: int
    by: str

    @property
    def hides(self) -> bool:
        """Whether the link takes no longer than what is computed."""
        return self.link_s <= self.compute_s

    @property
    def step_s(self) -> float:
        """What a step takes at least."""
        return max(self.compute_s, self.link_s)


def stream_times(
    subject: Subject, parameters: int, one: Settings, streamed: StreamMemory, rates: Rates | None = None
) -> StreamTimes:
    """Return what a step takes over the link, and beside it."""
    rates = rates or Rates()
    moved = streamed.traffic
    link_s, by = max(moved.to_device, moved.to_host) / rates.link_bytes, "link"
    if one.stream is not None and one.stream.offload == "disk":
        disk_s = (moved.to_device + moved.to_host) / rates.disk_bytes
        link_s, by = (disk_s, "disk") if disk_s > link_s else (link_s, by)
    flops, _, stepping_s = _work(subject, parameters, one)
    tokens = one.tokens * one.sequences * one.accumulate
    needed = max(0.0, link_s - stepping_s) * rates.flops * tokens / (flops * one.accumulate)
    return StreamTimes(flops * one.accumulate / rates.flops + stepping_s, link_s, int(needed), by)


def expected_s(subject: Subject, parameters: int, one: Settings, moved_bytes: float = 0.0) -> float:
    """Seconds of one step of a model of so many parameters."""
    flops, reads_s, stepping_s = _work(subject, parameters, one)
    forwards = one.accumulate * max(flops / FLOPS, reads_s)
    on_disk = any(kept is not None and kept.offload == "disk" for kept in (one.working_set, one.stream))
    return max(forwards + stepping_s, moved_bytes / (DISK if on_disk else LINK))


def _work(subject: Subject, parameters: int, one: Settings) -> tuple[float, float, float]:
    """Return the operations of a micro-batch, the seconds of reading its weights, and those of stepping all weights."""
    width = one.torch_dtype(subject.dtype).itemsize
    tokens = one.tokens * one.sequences
    turns = one.working_set
    share = 1.0 if turns is None or not turns.chunks else 1 / turns.chunks
    # forward 2; backward 2 for inputs (of half the layers, on average, where one chunk is awake) and 2 for weights
    products = 2 + (2 if turns is None else 1) + 2 * share
    again = 2 if one.checkpointing or one.stream is not None else 0
    products += again
    products += 4 + again if one.clip == "two_pass" and one.clip_norm is not None else 0
    products += 2 if one.preference == "frozen" else 0
    reads = 3 * width * parameters / BANDWIDTH
    flops = products * parameters * tokens + 2 * _recomputed(subject, one)
    state = max(1.0, STATE_BYTES[one.states]) if one.states else width  # int4 is no faster than int8
    each = 2 * width + 4 * state
    stepping = share * parameters * each / BANDWIDTH
    if one.states in ("int8", "int4") or one.master:
        stepping += share * parameters * CODED_S
    return flops, reads, stepping


def _recomputed(subject: Subject, one: Settings) -> float:
    """Multiplications that a folded head does twice: those of the logits it does not keep."""
    config = subject.config
    vocabulary, hidden = getattr(config, "vocab_size", 0), getattr(config, "hidden_size", 0)
    logits = one.tokens * one.sequences * vocabulary
    if one.head == "plain" or not isinstance(hidden, int) or not logits:
        return 0.0
    kept = default_keep_bytes(vocabulary * hidden) if one.head_keep_bytes is None else one.head_keep_bytes
    width = max(2, one.torch_dtype(subject.dtype).itemsize)
    return hidden * max(0.0, logits - kept / width)
