"""``TrainingArguments.optim`` and ``optim_args`` in gradfold's words."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from gradfold.errors import FoldError
from gradfold.optim import RuleOptimizer


@dataclasses.dataclass(frozen=True)
class Named:
    """What a name of ``TrainingArguments.optim`` means here.

    Attributes:
        kind: gradfold's optimizer.
        asked: the name that Trainer is asked for in its place, whose package is installed.
        storage: options of gradfold's optimizer.
    """

    kind: str
    asked: str
    storage: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_INT8, _INT4 = {"states": "int8"}, {"states": "int4"}

OPTIMIZERS: Mapping[str, Named] = {
    "adamw_torch": Named("AdamW", "adamw_torch"),
    "adamw_torch_fused": Named("AdamW", "adamw_torch"),
    "adamw_bnb_8bit": Named("AdamW", "adamw_torch", _INT8),
    "adamw_8bit": Named("AdamW", "adamw_torch", _INT8),
    "adamw_torch_8bit": Named("AdamW", "adamw_torch", _INT8),
    "adamw_torch_4bit": Named("AdamW", "adamw_torch", _INT4),
    "paged_adamw_32bit": Named("AdamW", "adamw_torch"),
    "paged_adamw_8bit": Named("AdamW", "adamw_torch", _INT8),
    "lion_32bit": Named("Lion", "adamw_torch"),
    "lion_8bit": Named("Lion", "adamw_torch", _INT8),
    "paged_lion_32bit": Named("Lion", "adamw_torch"),
    "paged_lion_8bit": Named("Lion", "adamw_torch", _INT8),
    "rmsprop": Named("RMSprop", "rmsprop"),
    "rmsprop_bnb": Named("RMSprop", "rmsprop"),
    "rmsprop_bnb_8bit": Named("RMSprop", "rmsprop", _INT8),
    "rmsprop_bnb_32bit": Named("RMSprop", "rmsprop"),
    "sgd": Named("SGD", "sgd"),
    "adagrad": Named("Adagrad", "adagrad"),
}
"""The names that can be folded. Nothing is paged: a working set keeps states in host memory."""


def named(name: str) -> Named:
    """Return what a name of ``TrainingArguments.optim`` means.

    Raises:
        FoldError: it cannot be folded; the message lists those that can.
    """
    if (found := OPTIMIZERS.get(name)) is None:
        raise FoldError(
            f"optim={name!r} cannot be folded; these can: {', '.join(sorted(OPTIMIZERS))}. Another one of torch's "
            "may be given as optimizers=(optimizer, None), another one of gradfold's too"
        )
    return found


def read_arguments(text: str | None) -> dict[str, Any]:
    """Return ``TrainingArguments.optim_args`` ("states=int8,rounding=stochastic") as keyword arguments.

    Raises:
        FoldError: a part is no ``key=value``.
    """
    found: dict[str, Any] = {}
    for pair in (text or "").replace(" ", "").split(","):
        if not pair:
            continue
        key, equals, value = pair.partition("=")
        if not (key and equals and value):
            raise FoldError(f"optim_args={text!r}: {pair!r} is not key=value")
        found[key] = _value(value)
    return found


def hyper_parameters(kind: type[RuleOptimizer]) -> frozenset[str]:
    """Return the hyper-parameters that an optimizer of gradfold's takes."""
    return frozenset(inspect.signature(kind.__init__).parameters) - {"self", "params", "storage"}


def _value(text: str) -> Any:
    for read in (int, float):
        with contextlib.suppress(ValueError):
            return read(text)
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)
