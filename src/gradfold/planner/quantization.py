"""Whether a model's weights are quantized, by its config: codes and scales are nothing that an optimizer trains."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FIELDS = ("quantization_config", "compression_config", "quantization")
"""transformers' field, the one compressed-tensors wrote before, and MLX's."""
FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Beside config.json: what AutoGPTQ, AutoAWQ and ModelOpt write."""


def quantization_of(config: Any) -> str | None:
    """Return which field of a config says so, and the method; None for plain weights.

    Args:
        config: a transformers config or the fields of its file; those of its parts (``text_config``) count too.
    """
    for path, fields in _parts("", config):
        for name in FIELDS:
            found = fields.get(name)
            if found and (name != "quantization" or isinstance(found, Mapping)):
                return f"{path}{name} says {_method(found)}"
    return None


def quantization_in(folder: Path) -> str | None:
    """Return what the files of a model's folder say; None for plain weights, and for files that cannot be read."""
    if said := quantization_of(_read(folder / "config.json")):
        return said
    for name in FILES:
        if found := _read(folder / name):
            return f"{name} says {_method(found)}"
    return None


def way_out(said: str) -> str:
    """Return the message about a quantized model, without its name."""
    return (
        f"its weights are quantized and cannot be trained ({said}); use the original model it was made from, or "
        "dequantize it (transformers: model.dequantize()) and save it without that field"
    )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _parts(path: str, config: Any, depth: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield a config's fields, and those of the configs in it, each with the path to it."""
    fields = config if isinstance(config, Mapping) else vars(config) if hasattr(config, "model_type") else None
    if fields is None or depth > 3:
        return
    yield path, fields
    for name, value in fields.items():
        if str(name).endswith("_config") and name not in FIELDS:
            yield from _parts(f"{path}{name}.", value, depth + 1)


def _method(found: Any) -> str:
    """Return the quantization's method in the config's own words."""
    fields = found if isinstance(found, Mapping) else vars(found) if hasattr(found, "__dict__") else {}
    inner = fields.get("quantization")
    if isinstance(inner, Mapping):
        fields = {**fields, **inner}
    for name in ("quant_method", "quant_algo", "quant_type", "mode"):
        if value := fields.get(name):
            return str(getattr(value, "value", value))
    bits = fields.get("bits") or fields.get("w_bit")
    return f"{bits} bits" if bits else type(found).__name__ if not isinstance(found, Mapping) else "no method by name"
