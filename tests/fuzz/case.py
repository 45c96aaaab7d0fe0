"""A case: a small model, an optimizer, fold's options and a loop's habits, drawn from one seed.

Every field has a plain default, so that a failing case shrinks to the few fields that matter, and prints as those.
"""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Any

from tests.cases import RULE_ROWS
from tests.oracle import RULES

Op = tuple[Any, ...]
Segment = tuple[int, int, str]  # first op, the op after the last, kind of checkpointing

CHECKPOINTS = ("non_reentrant", "reentrant", "nested", "reentrant_in_non_reentrant", "late_stop")
REENTRANT = ("reentrant", "reentrant_in_non_reentrant")
STORAGES: dict[str, tuple[dict[str, Any], ...]] = {
    "float64": ({},),
    "float32": (
        {},
        {"states": "fp32"},
        {"states": "bf16"},
        {"states": "int8"},
        {"states": "int4"},
        {"states": "int8", "rounding": "stochastic"},
    ),
    "bfloat16": (
        {},
        {"rounding": "stochastic"},
        {"master": "split8"},
        {"master": "split16", "states": "fp32"},
        {"states": "int8", "rounding": "stochastic"},
        {"states": "int8", "master": "split8"},
    ),
}
IN_FP32 = ("ASGD", "Rprop")  # rules that keep their states in fp32, and refuse other ones
# what a loop may do beside forward, backward and step
HABITS = (
    "eval_pass",  # a forward under no_grad before the step
    "dropped_forward",  # a forward whose loss is never used
    "probe",  # a backward inside fold.paused() whose gradients are thrown away
    "paused_step",  # one whole step inside fold.paused()
    "input_grad",  # autograd.grad of the loss by the input, first
    "leaf_input",  # the input requires grad, and its .grad is compared
    "retain_graph",
    "closure",
    "zeros",  # zero_grad(set_to_none=False)
    "model_zero_grad",
    "schedule",  # learning rates that change with every step
    "tensor_lr",
    "resume",  # saved after the second step, and loaded into a new model and fold
    "refold",  # fold.remove(), and folded again
    "through_torch",  # states into torch's optimizer, and back
    "freeze",  # a parameter is frozen in odd steps
    "two_losses",  # the sum of two forwards
    "forward_hook",
    "backward_hook",  # module.register_full_backward_hook
    "tensor_hook",  # on an activation; doubles its gradient
    "param_hook",  # on a parameter that is not folded; halves its gradient
    "folded_hook",  # on a folded weight: refused
    "second_backward",  # refused
    "new_group",  # the last parameter joins by add_param_group after a step
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One case. `describe` prints what differs from these defaults."""

    seed: int = 0
    ops: tuple[Op, ...] = (("linear", 3, True),)
    segments: tuple[Segment, ...] = ()
    first: str = "floats"  # or "ids": the model begins with an embedding
    width: int = 3
    batch: int = 2
    tokens: int = 3
    loss: str = "square"  # "cross_entropy", "head" (linear_cross_entropy), "tied_head"
    loss_scale: float = 1.0
    penalties: tuple[int, ...] = ()  # parameters that the loss reads directly
    frozen: tuple[int, ...] = ()
    rule: str = "SGD"
    hyper: tuple[tuple[str, Any], ...] = (("lr", 0.05),)  # with an lr
    groups: int = 1
    group_clip: bool = False  # the second group is clipped by its own norm
    steps: int = 2
    accumulate: int = 1
    by_context: bool = False  # accumulate with fold.accumulating()
    clip_norm: float | None = None
    clip_value: float | None = None
    norm_type: float = 2.0
    clip: str = "exact"
    timing: str = "auto"
    tape: str = "device"
    scratch_bytes: int | None = None
    poison: int | None = None  # the step whose loss is not finite, and is skipped
    working_set: tuple[tuple[str, Any], ...] = ()
    dtype: str = "float64"
    storage: tuple[tuple[str, Any], ...] = ()
    habits: tuple[str, ...] = ()

    def describe(self) -> str:
        """The case in one line: what it has beside the defaults."""
        plain = Case()
        told = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(plain, field.name)
        ]
        return f"Case({', '.join(told)})"

    def has(self, habit: str) -> bool:
        return habit in self.habits

    @property
    def reentrant(self) -> bool:
        return any(kind in REENTRANT for *_, kind in self.segments)

    @property
    def coded(self) -> bool:
        """Whether weights or states are stored otherwise than as the weight's own plain numbers."""
        return bool(self.storage)

    @property
    def waits(self) -> bool:
        """Whether all weights step in `optimizer.step()`."""
        clips = self.clip_norm is not None or self.group_clip
        return self.timing == "deferred" or (clips and self.clip == "exact")

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `fold`, without the working set."""
        names = ("clip_norm", "clip_value", "norm_type", "clip", "timing", "tape")
        found = {name: getattr(self, name) for name in names}
        found["accumulate"] = 1 if self.by_context else self.accumulate
        found["head"] = "plain"
        if self.scratch_bytes is not None:
            found["scratch_bytes"] = self.scratch_bytes
        if self.poison is not None or self.dtype != "float64":  # which may overflow
            found["on_nonfinite"] = "skip"
        return found


def draw(seed: int, dtypes: tuple[str, ...] = ("float64",) * 4 + ("float32", "bfloat16")) -> Case:
    """Return the case of a seed."""
    rng = Random(seed)
    width = rng.choice([1, 2, 3, 4, 5, 7, 8, 13])
    ops = _ops(rng, width)
    row = rng.choice(RULE_ROWS)
    hyper = tuple(({"lr": RULES[row.name][1]["lr"]} | row.plain()).items())
    dtype = rng.choice(dtypes)
    storage = rng.choice(STORAGES[dtype])
    if (row.hyper.get("centered") or row.name in IN_FP32) and storage.get("states") not in (None, "fp32"):
        storage = {}
    case = Case(
        seed=seed,
        ops=ops,
        segments=_segments(rng, len(ops)),
        first=rng.choice(["ids", "ids", "floats"]),
        width=width,
        batch=rng.choice([0, 1, 1, 2, 3]),
        tokens=rng.choice([1, 2, 3, 5]),
        loss=rng.choice(["square", "cross_entropy", "head", "tied_head"]),
        loss_scale=rng.choice([1.0, 1.0, 1e-3, 300.0]),
        penalties=tuple(rng.randrange(100) for _ in range(rng.choice([0, 0, 0, 1, 2]))),
        frozen=tuple(rng.randrange(100) for _ in range(rng.choice([0, 0, 0, 1, 2]))),
        rule=row.name,
        hyper=hyper,
        groups=rng.choice([1, 1, 2]),
        steps=rng.choice([2, 3, 3, 4]),
        accumulate=rng.choice([1, 1, 1, 2, 3]),
        by_context=rng.random() < 0.3,
        clip_norm=rng.choice([None, None, 0.05, 1.0, 1e3]),
        clip_value=rng.choice([None, None, None, 0.01, 1.0]),
        clip=rng.choice(["exact", "exact", "two_pass", "delayed"]),
        norm_type=rng.choice([2.0, 2.0, 2.0, 1.0, 3.0, float("inf")]),
        timing=rng.choice(["auto", "auto", "auto", "deferred"]),
        tape=rng.choice(["device", "device", "device", "host"]),
        scratch_bytes=rng.choice([None, None, 1, 64, 300]),
        poison=rng.choice([None] * 9 + [1]),
        working_set=_working_set(rng) if rng.random() < 0.35 else (),
        dtype=dtype,
        storage=tuple(storage.items()),
        habits=tuple(habit for habit in HABITS if rng.random() < 0.06),
        group_clip=rng.random() < 0.1,
    )
    return consistent(case)


def consistent(case: Case) -> Case:
    """Return the case without combinations that fold's documentation excludes, or that torch cannot do either."""
    change = dataclasses.replace
    habits = set(case.habits)
    if case.clip != "exact":
        case = change(case, accumulate=1, by_context=False, norm_type=2.0, timing="auto", group_clip=False)
        if case.clip_norm is None or (case.clip == "delayed" and case.working_set):
            case = change(case, clip="exact")
    if case.groups == 1:
        case = change(case, group_clip=False)
    if case.group_clip:
        habits -= {"new_group"}  # which would be clipped by a norm of its own
    if case.storage:
        habits -= {"through_torch"}  # rounded
    if case.reentrant:
        habits -= {"input_grad"}  # torch's checkpoint refuses autograd.grad
    if case.first == "ids":
        habits -= {"input_grad", "leaf_input"}
    if case.clip == "two_pass":
        habits -= {"leaf_input", "input_grad", "retain_graph", "second_backward"}  # both passes add to the input
    if case.working_set:
        if len(case.segments) and case.reentrant and case.seed % 8:  # refused; tried now and then
            kinds = [(a, b, "non_reentrant" if kind in REENTRANT else kind) for a, b, kind in case.segments]
            case = change(case, segments=tuple(kinds))
        habits -= {"freeze", "refold", "through_torch", "new_group", "input_grad"}
        habits -= {"leaf_input"} if case.reentrant else set()
    if case.accumulate > 1 or case.waits or case.poison is not None:
        habits -= {"second_backward"}
    if case.poison is not None:
        habits -= {"resume"} if case.clip == "delayed" else set()
    if habits & {"folded_hook", "second_backward"}:
        habits -= {"paused_step", "resume", "refold"}
    if "resume" in habits and case.dtype != "float64":
        habits -= {"new_group"}  # a Linear that joins later is not folded until the model is folded again
    if case.clip != "exact" or (case.working_set and case.clip_norm is not None):
        habits -= {"paused_step"}  # torch would clip whole gradients, a working set clips what is awake
    return change(case, habits=tuple(sorted(habits)))


def _ops(rng: Random, width: int) -> tuple[Op, ...]:
    """A few layers; those that name another one take the nearest that fits, or do nothing."""
    made: list[Op] = []
    for index in range(rng.choice([1, 2, 3, 4, 6])):
        kind = rng.choice(KINDS)
        if kind in ("linear", "conv1d"):
            wide = rng.choice([width, width, width, 1, 2, 5])
            made.append((kind, wide, rng.random() < 0.6))
        elif kind in ("shared", "tied", "direct"):
            made.append((kind, rng.randrange(index + 1)))
        elif kind == "activation":
            made.append((kind, rng.choice(["tanh", "gelu", "relu", "relu_", "silu", "sigmoid"])))
        elif kind == "norm":
            made.append((kind, rng.choice(["layer", "rms", "group", "layer_plain"])))
        elif kind == "rows":
            made.append((kind, rng.choice([0, 1, 2, 9]), rng.random() < 0.5))
        elif kind == "sometimes":
            made.append((kind, rng.choice([2, 3])))
        else:
            made.append((kind,))
    return tuple(made)


KINDS = (
    *["linear"] * 6,
    *["shared", "tied", "direct"] * 2,
    *["activation"] * 3,
    *["norm"] * 2,
    "conv1d",
    "rows",
    "sometimes",
    "scale",
    "scalar",
    "convolution",
    "attention",
    "multihead",
    "gru",
    "bilinear",
    "positions",
    "adapter",
    "weight_norm",
    "dropout",
    "batch_norm",
    "experts",
    "empty",
    "skip",
)


def _segments(rng: Random, count: int) -> tuple[Segment, ...]:
    found, at = [], 0
    while rng.random() < 0.5 and at < count:
        start = rng.randrange(at, count)
        stop = rng.randrange(start + 1, count + 1)
        found.append((start, stop, rng.choice(CHECKPOINTS)))
        at = stop
    return tuple(found)


def _working_set(rng: Random) -> tuple[tuple[str, Any], ...]:
    by = rng.choice(["bytes", "bytes", "layer"])
    made = {
        "chunks": rng.choice([1, 2, 3, 4] if by == "bytes" else [2, 3, None]),
        "interval": rng.choice([1, 1, 2]),
        "by": by,
        "order": rng.choice(["forward", "backward", "random", "importance"]),
        "offload": rng.choice([None, None, "cpu", "disk"]),
        "prefetch": rng.choice([0, 1]),
    }
    if by == "bytes":
        made["axis"] = rng.choice(["out", "in"])
    if rng.random() < 0.3 and made["chunks"] != 1:
        made["states"] = "reset"
    if rng.random() < 0.3:
        made["always"] = rng.choice([("ops.0",), ("bias",)])
    return tuple(made.items())
