"""Heads that transformers' ``tp_plan`` has spread over ranks by their words.

transformers puts a forward on such a head that makes DTensors of its inputs, calls the module's own forward, and
gathers the logits. The loss of a folded head needs neither: it takes the hidden states before that forward.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from gradfold.engine import is_spread

from .vocabulary import why_not


def parallel_style(head: Any) -> Any | None:
    """Return how transformers' ``tp_plan`` has spread a head; None if it has not."""
    function = vars(head).get("forward") if isinstance(head, nn.Module) else None
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    if function is None or not {"self", "original_forward"} <= set(names):
        return None
    style = function.__closure__[names.index("self")].cell_contents
    module = sys.modules.get(type(style).__module__)
    base = getattr(module, "TensorParallelLayer", None)
    return style if base is not None and isinstance(style, base) else None


def why_not_spread(head: Any, style: Any) -> str:
    """Return why the loss cannot be computed from the shards of a head; empty if it can."""
    name = type(style).__name__
    gathers = getattr(getattr(style, "output_layouts", None), "is_replicate", lambda: False)()
    if name != "ColwiseParallel" or not (gathers and style.use_local_output):
        return f"its tp_plan ({name}) does not gather logits that are spread by words"
    if not is_spread(head.weight):
        return "its tp_plan has left its weight whole"
    return why_not(head.weight, head.bias)
