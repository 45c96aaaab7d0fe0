"""The options of ``fold`` and of the optimizers, declared and checked once.

``fold()``, the planner's settings, the trainer's recipes and the flags of the command line use these declarations.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, TypedDict, get_args

from .errors import FoldError

OptimizerName = Literal[
    "AdamW",
    "Adam",
    "SGD",
    "Lion",
    "RMSprop",
    "Adagrad",
    "NAdam",
    "RAdam",
    "Adafactor",
    "Adadelta",
    "Adamax",
    "ASGD",
    "Rprop",
    "Muon",
    "AdamWScheduleFree",
    "AdamMini",
    "LAMB",
    "LARS",
]
Dtype = Literal["float32", "bfloat16", "float64"]
Clip = Literal["exact", "two_pass", "delayed"]
Head = Literal["fold", "plain"]
Data = Literal["hook", "tile", "tokens", "auto"]
OnNonfinite = Literal["raise", "skip", "ignore"]
TimingMode = Literal["auto", "deferred"]
TapePlace = Literal["device", "host"]
StateFormat = Literal["fp32", "bf16", "int8", "int4"]
Rounding = Literal["nearest", "stochastic"]
Master = Literal["split8", "split16"]
Axis = Literal["out", "in"]
Cut = Literal["bytes", "bands", "layer", "module"]
Order = Literal["forward", "backward", "random", "importance", "sampled"]
WakingStates = Literal["keep", "reset"]
RateSchedule = Literal["round", "step"]
RestBy = Literal["sgd", "sign"]
Offload = Literal["cpu", "disk"]
Activations = Literal["device", "host"]

OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)
"""The names of gradfold's optimizers."""
DTYPES: tuple[str, ...] = get_args(Dtype)
"""The dtypes that weights may train in."""
BATCH_SIZE, SEQUENCE_LENGTH = 8, 512
"""Sequences per micro-batch, and tokens per sequence, of a training run and of a plan, where neither is given."""
MAX_WHOLE = 2**31 - 1
"""Limit of every whole number that has no limit of its own."""
MAX_BATCH, MAX_TOKENS, MAX_ACCUMULATE = 2**20, 2**24, 2**20
"""Limits of sequences per micro-batch, tokens per sequence, and micro-batches per step: beyond, it is a slip."""
INTERVAL = 4
"""Steps before the next chunk of a working set wakes."""
TILE_BYTES = 64 * 2**20
"""Bytes of states that come to the device at a time, where weights stream."""
REST_SCALE = 0.1
"""What the learning rate is multiplied by for weights that rest."""


@dataclasses.dataclass(frozen=True)
class GradientFields:
    """Options of accumulation and clipping: fields of `fold()`, of plans and of recipes."""

    accumulate: int = 1
    """Gradient accumulation: micro-batches per optimizer step. The step is that of one larger batch."""
    clip_norm: float | None = None
    """Clip the norm of all gradients together to this, as clip_grad_norm_ does. None: no clipping."""
    clip_value: float | None = None
    """Clip every element of the gradients to plus or minus this, after clip_norm. None: no clipping."""
    clip: Clip = "exact"
    """How clip_norm gets the norm. exact: weights step once it is known. two_pass: backward runs twice, in less memory.
    delayed: use the last step's norm, an approximation."""

    def gradient_options(self) -> dict[str, Any]:
        """Return these fields as keyword arguments of `gradfold.fold`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(GradientFields)}


@dataclasses.dataclass(frozen=True)
class FoldOptions(GradientFields):
    """The options of ``fold()``, which describes them.

    Raises:
        FoldError: an option is out of range, or does not go with another one.
    """

    norm_type: float = 2.0
    error_if_nonfinite: bool = False
    on_nonfinite: OnNonfinite = "raise"
    timing: TimingMode = "auto"
    tape: TapePlace = "device"

    def __post_init__(self) -> None:
        if not isinstance(self.accumulate, int) or isinstance(self.accumulate, bool) or self.accumulate < 1:
            raise FoldError(f"accumulate={self.accumulate!r}: how many backwards one step sums, 1 or more")
        for name in ("clip_norm", "clip_value"):
            refuse_limit(name, getattr(self, name))
        if not isinstance(self.norm_type, int | float) or not self.norm_type > 0:
            raise FoldError(f"norm_type={self.norm_type!r}: 2.0, another number above 0, or float('inf')")
        for name, kind in (("clip", Clip), ("on_nonfinite", OnNonfinite), ("tape", TapePlace), ("timing", TimingMode)):
            if getattr(self, name) not in get_args(kind):
                raise FoldError(f"{name}={getattr(self, name)!r}: one of {', '.join(map(repr, get_args(kind)))}")
        if self.clip != "exact" and self.timing == "deferred":
            raise FoldError(
                f"timing='deferred' with clip={self.clip!r}, which steps inside backward: use clip='exact', whose "
                "weights wait for optimizer.step()"
            )
        if self.clip != "exact" and self.clip_norm is None:
            raise FoldError(f"clip={self.clip!r} without clip_norm: say how far to clip")
        if self.clip != "exact" and self.accumulate > 1:
            raise FoldError(
                f"clip={self.clip!r} with accumulate={self.accumulate}: the norm of a sum is known when its last part "
                "is; use clip='exact'"
            )
        if self.clip == "delayed" and self.error_if_nonfinite:
            raise FoldError(
                "error_if_nonfinite=True with clip='delayed': the norm is known when the weights have moved; use "
                "on_nonfinite='raise', or clip='exact'"
            )
        if self.clip != "exact" and self.norm_type != 2:
            raise FoldError(
                f"clip={self.clip!r} with norm_type={self.norm_type}: these count squares; use clip='exact'"
            )


Parallel = Literal["fsdp", "tp", "replicas"]
"""How a model is spread over ranks: shards of every weight, gathered when they are used (FSDP2); shards that stay where
they are (tensor parallelism); or a copy on every rank."""


def refuse_limit(name: str, value: Any) -> None:
    """Raise FoldError unless a clipping limit is None or a number above 0."""
    if value is not None and (not isinstance(value, int | float) or not value > 0 or math.isnan(value)):
        raise FoldError(f"{name}={value!r}: a number above 0, or None")


class StorageOptions(TypedDict, total=False):
    """Storage options: keyword arguments of every optimizer, and keys of its param_groups.

    Attributes:
        states: How optimizer states are stored: "fp32", "bf16", or quantized to "int8" or "int4" in blocks of 128
            elements along a row, with an fp32 scale each. None keeps them in the weight's dtype, as torch does; beside
            fp16 weights it means "fp32" for rules with second moments (all but SGD and Lion), since squares of
            gradients below 2.4e-4 are 0 in fp16.
        rounding: How values are rounded to fewer bits than fp32: "nearest" or "stochastic". None rounds states and
            masters stochastically where they need it (see `gradfold/codecs/README.md`), and a weight without master to
            nearest.
        master: Keep more bits of a bf16 weight: "split8" adds one byte per element (a 24-bit master weight), "split16"
            two bytes (an fp32 master weight). None keeps the bf16 weight only.
        small_size: Parameters with fewer elements, and all vectors (norms, biases), keep fp32 states; 0 gives every
            parameter the states of ``states``.
        seed: Seed of the random bits for stochastic rounding; two runs with the same seed round alike.
        capturable: As in torch: step counters live on the device of the weights, and a learning rate that is a tensor
            is read there, so that a CUDA graph can capture folded steps.

    Example:
        >>> options: gradfold.optim.StorageOptions = {"states": "int8", "rounding": "stochastic"}
        >>> optimizer = gradfold.AdamW(model.parameters(), lr=1e-5, **options)
    """

    states: StateFormat | None
    rounding: Rounding | None
    master: Master | None
    small_size: int
    seed: int
    capturable: bool


class TorchOptions(TypedDict, total=False):
    """Keyword arguments that choose among torch's implementations of a formula; each optimizer takes torch's.

    Attributes:
        foreach: One of torch's implementations. It changes nothing here; a state_dict hands it on to torch.
        fused: The same. RMSprop, NAdam and RAdam have no such implementation in torch, and refuse it as torch does.
        differentiable: Only False: the rules run without grad.

    Example:
        >>> optimizer = gradfold.AdamW(model.parameters(), lr=1e-5, fused=True)  # accepted, and changes nothing
    """

    foreach: bool | None
    fused: bool | None
    differentiable: bool


class OptimizerOptions(StorageOptions, TorchOptions, total=False):
    """What every optimizer takes beside its hyper-parameters."""


@dataclasses.dataclass(frozen=True)
class StorageFields:
    """The storage options that decide memory, as fields of plans and recipes. None: not given."""

    states: StateFormat | None = None
    """Storage of optimizer states; int8 and int4 are block-quantized. None: the weights' dtype, as torch does;
    but fp32 beside fp16 weights, except for SGD and Lion."""
    rounding: Rounding | None = None
    """Rounding of 16-bit weights and states. None: states stochastically where that helps, weights to nearest."""
    master: Master | None = None
    """Master weights of bf16 weights, stored as the 8 or 16 bits that bf16 drops. None: no masters."""
    small_size: int | None = None
    """Weights with fewer elements than this, norms and biases keep fp32 states. None: 4,096."""

    def storage_options(self) -> dict[str, Any]:
        """Return the options that are given, as keyword arguments of an optimizer."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(StorageFields)}
        return {name: value for name, value in given.items() if value is not None}
