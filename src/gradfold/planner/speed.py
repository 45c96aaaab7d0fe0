"""About how long a step takes, to put settings in order.

It is an estimate for ordering, not a promise: products at 40% of an H100's 989 TFLOP/s, weights
and states read and written at 75% of its 3.35 TB/s, 5.6 ps more for each parameter whose states are coded (155.0
against 110.2 ms a step of 8 billion, FORGE's own table), what moves to and from the host at 50 GB/s or a disk at 5.
"""

from __future__ import annotations

from gradfold.head.loss import default_keep_bytes

from .models import Subject
from .settings import Settings

FLOPS, BANDWIDTH, LINK, DISK = 0.4 * 989e12, 0.75 * 3.35e12, 50e9, 5e9
CODED_S = 5.6e-12  # for each parameter
STATE_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}


def expected_s(subject: Subject, parameters: int, one: Settings, moved_bytes: float = 0.0) -> float:
    """Seconds of one step of a model of so many parameters."""
    width = one.torch_dtype(subject.dtype).itemsize
    tokens = one.tokens * one.sequences
    turns = one.working_set
    share = 1.0 if turns is None or not turns.chunks else 1 / turns.chunks
    # forward 2; backward 2 for inputs (of half the layers, on average, where one chunk is awake) and 2 for weights
    products = 2 + (2 if turns is None else 1) + 2 * share + (2 if one.checkpointing else 0)
    products += 2 if one.preference == "frozen" else 0
    reads = 3 * width * parameters / BANDWIDTH
    flops = products * parameters * tokens + 2 * _recomputed(subject, one)
    forwards = one.accumulate * max(flops / FLOPS, reads)
    state = max(1.0, STATE_BYTES[one.states]) if one.states else width  # int4 is no faster than int8
    each = 2 * width + 4 * state
    stepping = share * parameters * each / BANDWIDTH
    if one.states in ("int8", "int4") or one.master:
        stepping += share * parameters * CODED_S
    link = DISK if turns is not None and turns.offload == "disk" else LINK
    return max(forwards + stepping, moved_bytes / link)


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
