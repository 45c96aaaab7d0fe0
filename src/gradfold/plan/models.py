"""The model that a plan is for: found by name, built of fake tensors, at any depth."""

from __future__ import annotations

import copy
import difflib
import functools
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gradfold.plan.errors import PlanError
from gradfold.plan.fake import fake_copy
from gradfold.plan.presets import PRESETS, config_of, preset_of


@dataclass(eq=False)
class Subject:
    """A model to plan for. `config`: transformers', if it has one; `source`: else a module, or what builds one."""

    name: str
    config: Any = None
    source: Any = None

    @property
    def dtype(self) -> torch.dtype | None:
        """What it is published in, or is in."""
        if self.config is not None:
            found = getattr(self.config, "dtype", None)
            return getattr(torch, found) if isinstance(found, str) else found
        if isinstance(self.source, nn.Module):
            return next((p.dtype for p in self.source.parameters() if p.dtype.is_floating_point), None)
        return None

    @property
    def layers(self) -> int | None:
        """How many it has; None: it cannot be built with fewer."""
        return None if self.config is None else getattr(self.config, "num_hidden_layers", None)

    def build(self, dtype: torch.dtype, mode: FakeTensorMode | None, layers: int | None = None) -> nn.Module:
        """The model in training mode, on fake tensors of `mode`; without one, of real random numbers.

        Raises PlanError for what transformers cannot build.
        """
        if self.config is None:
            return _of_source(self.source, dtype, mode)
        from transformers import AutoModelForCausalLM

        config = copy.deepcopy(self.config) if layers is None else _with_layers(self.config, layers)
        config.use_cache = False
        try:
            if mode is None:
                return AutoModelForCausalLM.from_config(config, dtype=dtype).train()
            with mode:
                return AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        except (ValueError, TypeError, KeyError, ImportError) as error:
            raise PlanError(f"model {self.name}: transformers cannot build a causal model of it ({error})") from None

    @property
    def parameters(self) -> int:
        """How many numbers it trains."""
        return self._meta[0]

    @functools.cached_property
    def _meta(self) -> tuple[int, list[tuple] | None]:
        """How many parameters it has, and of each layer its modules and their parameters."""
        if self.config is None:
            model = self.build(self.dtype or torch.float32, FakeTensorMode(allow_non_fake_inputs=True))
            return _count(model), None
        with torch.device("meta"):
            model = self.build(torch.bfloat16, None)
        return _count(model), _shapes(model, self.layers)

    @functools.cached_property
    def depths(self) -> tuple[int, int, int] | None:
        """Two depths whose steps tell that of the whole model, and the period of its layers; None: run it whole."""
        layers = self.layers
        if layers is None or getattr(self.config, "text_config", None) is not None:
            return None
        period = _period(self.config, layers, self._meta[1])
        if period is None:
            return None
        first = 2 * period + layers % period
        return (first, first + period, period) if layers > first + 2 * period else None


def find_subject(model: Any) -> Subject:
    """A model: its name (a preset, a folder, a config.json, a hub id), a transformers config, a module or its builder.

    Raises PlanError, saying what it could be.
    """
    if isinstance(model, (str, Path)):
        return _named(str(model))
    if hasattr(model, "model_type"):
        return Subject(getattr(model, "name_or_path", "") or model.model_type, config=model)
    if isinstance(model, nn.Module):
        return Subject(type(model).__name__, source=model)
    if callable(model):
        return Subject(getattr(model, "__name__", "model"), source=model)
    raise PlanError(
        f"model={model!r}: give a name, a folder, a transformers config, a module or a function that builds one"
    )


def _named(name: str) -> Subject:
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise PlanError(f"model {name}: has no config.json; name a folder that save_pretrained wrote")
    if path.is_file():
        return Subject(name, config=_from_file(name, path))
    if (preset := preset_of(name)) is not None:
        return Subject(name, config=config_of(preset))
    if "/" not in name or name.startswith((".", "/", "~")):
        raise PlanError(f"model {name!r}: no such folder{_hint(name)}")
    return Subject(name, config=_from_hub(name))


def _hint(name: str) -> str:
    near = difflib.get_close_matches(name.lower().rpartition("/")[2], PRESETS, n=1, cutoff=0.55)
    known = ", ".join(PRESETS)
    return (
        f"; did you mean {near[0]!r}?" if near else f"; known without a download: {known}; or name a hub id, ORG/MODEL"
    )


def _from_file(name: str, path: Path) -> Any:
    from transformers import AutoConfig

    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"model {name}: {path.name} cannot be read ({error})") from None
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise PlanError(f"model {name}: {path.name} is no transformers config, it has no model_type")
    try:
        return AutoConfig.for_model(**fields)
    except Exception as error:
        raise PlanError(f"model {name}: transformers knows no such model ({_short(error)})") from None


def _from_hub(name: str) -> Any:
    from transformers import AutoConfig
    from transformers.utils import logging as logs

    level, hub = logs.get_verbosity(), logging.getLogger("huggingface_hub")
    logs.set_verbosity(logs.CRITICAL)
    before = hub.level
    hub.setLevel(logging.CRITICAL)  # it would say each time that it tries again
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:
        raise PlanError(
            f"model {name!r}: its config cannot be had from the hub ({_short(error)}){_hint(name)}"
        ) from None
    finally:
        logs.set_verbosity(level)
        hub.setLevel(before)


def _short(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".:")


def _of_source(
    source: nn.Module | Callable[[], nn.Module], dtype: torch.dtype, mode: FakeTensorMode | None
) -> nn.Module:
    if mode is None:
        model = copy.deepcopy(source) if isinstance(source, nn.Module) else source()
    else:
        model = fake_copy(source, mode)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            return model.to(dtype)
    return model


def _with_layers(config: Any, layers: int) -> Any:
    """The config of a model of the first `layers` layers."""
    made = copy.deepcopy(config)
    whole = config.num_hidden_layers
    made.num_hidden_layers = layers
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == whole:
            setattr(made, name, value[:layers])
    return made


def _period(config: Any, layers: int, shapes: list[tuple] | None) -> int | None:
    """After how many layers they repeat, by what the config says of each and by their parameters; None: they do not."""
    listed = [value for value in vars(config).values() if isinstance(value, list) and len(value) == layers]
    if shapes is None or len(shapes) != layers:
        return None
    rows = list(zip(shapes, *listed, strict=True))
    return next((p for p in range(1, layers // 3 + 1) if all(a == b for a, b in zip(rows, rows[p:]))), None)


def _shapes(model: nn.Module, layers: int | None) -> list[tuple] | None:
    """Of each layer its modules and their parameters; None where no one list holds the layers."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == layers]
    if len(stacks) != 1:
        return None
    return [
        tuple(
            (name, type(module).__name__, tuple((n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False)))
            for name, module in layer.named_modules()
        )
        for layer in stacks[0]
    ]


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
