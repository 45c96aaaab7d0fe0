"""Run a case folded and in plain torch, and judge it."""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import gradfold
from tests.fuzz.case import Case
from tests.fuzz.loop import Folded, Seen, Weights, lockstep, snapshot
from tests.fuzz.model import Net

LIMITS = {"float64": 1e-9, "float32": 1e-3}  # how far weights may be off, of their movement
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24}

# What a fold may refuse: words of the message, and the cases that it is an answer to.
REFUSALS: dict[str, tuple[str, Callable[[Case], bool]]] = {
    "reentrant checkpoint in a working set": (
        "a reentrant checkpoint with working_set=",
        lambda case: bool(case.working_set) and case.reentrant,
    ),
    "hook on a folded weight": (
        "a hook registered on this tensor",
        lambda case: case.has("folded_hook") or case.has("param_hook"),  # a module that reads its own weight folds too
    ),
    "second backward": (r"a \w+ backward reached|read again inside", lambda case: case.has("second_backward")),
    "more chunks than the model has rows or layers": (
        "a chunk would have .* bytes|layers to train; at most|nothing to cut|takes turns",
        lambda case: bool(case.working_set),
    ),
    "no such parameter to keep awake": (
        "no trainable parameter's name contains it",
        lambda case: bool(case.working_set),
    ),
}


class Result(NamedTuple):
    """How a case ended."""

    kind: str  # "ok", "refused", "noise", "wrong", "crashed"
    said: str = ""
    distance: float = 0.0  # of the weights, relative to their movement

    @property
    def good(self) -> bool:
        return self.kind in ("ok", "refused", "noise")


def run(case: Case) -> Result:
    """Run and judge one case."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        try:
            return _run(case, folder)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
            return Result("crashed", f"{type(error).__name__} in {where}: {str(error)[:300]}")


def _run(case: Case, folder: str) -> Result:
    plain, folded = Net(case), None
    start = snapshot(plain)
    try:
        folded = Folded(case, folder)
        seen = lockstep(case, plain, folded)
    except gradfold.FoldError as error:
        kind = next(
            (kind for kind, (words, fits) in REFUSALS.items() if fits(case) and re.search(words, str(error))), ""
        )
        if not kind:
            return Result("wrong", f"refused: {str(error)[:400]}")
        if folded is not None and not same(folded.before, snapshot(folded.model)):
            return Result("wrong", f"weights have moved before it refused ({kind})")
        return Result("refused", kind)
    if case.coded or case.dtype == "bfloat16":
        return _judge_bits(case, folded)
    found = judge(case, start, seen)
    if found.kind != "wrong":
        return found
    # Is torch itself as far off if it rounds otherwise? Then SGD must be exact.
    again = judge(case, start, seen, [_noise(case, seed) for seed in range(3)])
    if again.kind == "wrong" or (calm := calmed(case)) == case:
        return again
    result = run(calm)
    return again if result.good else Result("wrong", f"{found.said}, and {result.kind} in {calm.describe()}")


def refusal(case: Case, message: str) -> str | None:
    """Return the kind of a refusal; None for one that is not an answer to this case."""
    return next((kind for kind, (words, fits) in REFUSALS.items() if fits(case) and re.search(words, message)), None)


def calmed(case: Case) -> Case:
    """The same loop by plain SGD, which does not magnify gradients that are rounding errors."""
    return dataclasses.replace(case, rule="SGD", hyper=(("lr", dict(case.hyper)["lr"]),))


def same(one: Weights, other: Weights) -> bool:
    """Whether these weights have the same bits, NaN among them."""
    return all(torch.equal(one[name].nan_to_num(7e7), other[name].nan_to_num(7e7)) for name in one)


def judge(case: Case, start: Weights, seen: Seen, noise: list[Seen] | None = None) -> Result:
    """Compare what was seen; ``noise``: the same of runs whose gradients were rounded otherwise."""
    limit = LIMITS[case.dtype]
    names = list(start)
    moved = gap([seen[name][1] for name in names], [start[name] for name in names])
    off = gap(*zip(*(seen[name] for name in names)))
    relative = off / moved if moved else (0.0 if not off else math.inf)
    kind, said = "ok", ""
    if not relative <= limit:
        kind, said = "wrong", f"weights are off by {relative:.1e} of their movement"
        if noise is not None:
            own = max(gap([other[name][1] for name in names], [seen[name][1] for name in names]) for other in noise)
            if off <= 10 * own:
                kind, said = (
                    "noise",
                    f"weights are off by {relative:.1e}, torch's own by {own / max(moved, 1e-300):.1e}",
                )
    sizes: dict[str, float] = {}  # the largest of each kind: the last gradients of a loss near 0 are differences
    for name, (_, theirs) in seen.items():
        size = float(theirs.abs().nan_to_num(0.0).max()) if theirs.numel() else 0.0
        sizes[_kind(name)] = max(size, sizes.get(_kind(name), 0.0))
    for name, (ours, theirs) in seen.items():
        if name in start:
            continue
        if ours.shape != theirs.shape:
            return Result("wrong", f"{name} has shape {tuple(ours.shape)}, torch's {tuple(theirs.shape)}", relative)
        if not theirs.numel() or _close(ours, theirs, 10 * limit * sizes[_kind(name)]):
            continue
        if noise is not None:
            spread = max(float((other[name][1] - theirs).abs().nan_to_num(0.0).max()) for other in noise)
            if _close(ours, theirs, 10 * limit * sizes[_kind(name)] + 10 * spread):
                kind, said = ("noise", f"{name} is noise") if kind == "ok" else (kind, said)
                continue
        return Result("wrong", said or f"{name} is off by {float((ours - theirs).abs().max()):.1e}", relative)
    return Result(kind, said, relative)


def gap(one: list[Tensor], other: list[Tensor]) -> float:
    """The L2 distance of lists of tensors; NaN if one of them is."""
    return sum(float((a.double() - b.double()).pow(2).sum()) for a, b in zip(one, other, strict=True)) ** 0.5


def _kind(name: str) -> str:
    """The name of what was seen, without its step."""
    return name.partition(" of step ")[0]


def _close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    return torch.allclose(ours, theirs, rtol=0.0, atol=tolerance + 1e-12, equal_nan=True)


def _noise(case: Case, seed: int) -> Seen:
    """What is seen if torch's activations and gradients are off by a rounding."""
    with tempfile.TemporaryDirectory() as folder:
        return lockstep(case, Net(case), Folded(case, folder), ROUNDING[case.dtype], seed)


def _judge_bits(case: Case, folded: Folded) -> Result:
    """Stored in fewer bits: all is finite, and a second run, in other tiles and without a stop, has the same bits."""
    ours = snapshot(folded.model)
    if not all(bool(param.isfinite().all()) for param in ours.values()):
        return Result("wrong", "weights are not finite")
    habits = tuple(habit for habit in case.habits if habit not in ("resume", "refold"))
    # with less than 32 KiB of scratch memory compiled kernels do not run, whose sums are rounded otherwise
    tiles = 40_000 if case.scratch_bytes is None else case.scratch_bytes
    other = dataclasses.replace(case, habits=habits, scratch_bytes=tiles)
    with tempfile.TemporaryDirectory() as folder:
        again = Folded(other, folder)
        lockstep(other, Net(other), again)
    return Result("ok") if same(ours, snapshot(again.model)) else Result("wrong", "a second run has other bits")
