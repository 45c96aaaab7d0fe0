"""The class of a block's module: it asks for its weights before it runs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from gradfold.modules import Folded

PLACE = "_gradfold_stream"  # attribute of a block's module: its streamer, and which block it is


class Streamed(Folded):
    """Base of these classes; copies and pickles of a block are plain modules."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward with its weights on the device."""
        place = self.__dict__.get(PLACE)
        if place is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        streamer, block = place
        return streamer.run(block, super().forward, args, kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        constructor, arguments, state = super().__reduce_ex__(protocol)
        state.pop(PLACE, None)
        return constructor, arguments, state


@functools.cache
def _class_of(kind: type) -> type:
    """Return the class of streamed modules of a kind, with its name."""
    plain = vars(kind).get("plain_class", kind)
    members = {"plain_class": plain, "unstreamed_class": kind, "__doc__": kind.__doc__, "__module__": kind.__module__}
    return type(kind.__name__, (Streamed, kind), members)


def stream_class(module: nn.Module, streamer: Any, block: Any) -> None:
    """Let a module ask for its weights."""
    module.__dict__[PLACE] = streamer, block
    module.__class__ = _class_of(type(module))


def give_class_back(module: nn.Module) -> None:
    """Undo ``stream_class``."""
    module.__dict__.pop(PLACE, None)
    kind = vars(type(module)).get("unstreamed_class")
    if kind is not None:
        module.__class__ = kind


CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")  # by any other name: by their class


def without_caches(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of a block that runs twice: it may not write keys and values into a cache both times.

    Transformers leaves the same arguments out of layers that it checkpoints.

    Args:
        args: the positional arguments.
        kwargs: the others.
    """
    known: Any = getattr(sys.modules.get("transformers.cache_utils"), "Cache", ())

    def without(name: str, value: Any) -> Any:
        if name == "use_cache":
            return False
        return None if name in CACHES or isinstance(value, known) else value

    return [without("", value) for value in args], {name: without(name, value) for name, value in kwargs.items()}
