"""The model that a plan is for: found by name, built of fake tensors, at any depth."""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradfold import _torch
from gradfold._torch import FakeTensorMode
from gradfold.errors import users_level

from .errors import PlanError
from .fake import fake_copy, plain_torch
from .presets import PRESETS, config_of, preset_of
from .quantization import quantization_in, quantization_of, way_out

if TYPE_CHECKING:
    from .settings import Settings

MOST_CONFIG_BYTES, MOST_LAYERS = 2**24, 4096
BROKEN_CONFIG = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, ImportError, RuntimeError)
"""What models raise whose config has widths of 0, -64 or "wide"."""


@dataclass(eq=False)
class Subject:
    """A model to plan for. `config`: transformers', if it has one; `source`: else a module, or what builds one.

    `batches`: what steps with some settings are given, where the data is known: the `MicroBatches` of each of the few
    that may take most; None: full sequences.
    """

    name: str
    config: Any = None
    source: Any = None
    batches: Callable[[Settings], list[Any]] | None = None

    def __post_init__(self) -> None:
        said = quantization_of(self.config)
        if said is None and getattr(self.source, "is_quantized", False):  # not if it was read from a GGUF file
            said = quantization_of(getattr(self.source, "config", None)) or "is_quantized"
            said = None if said.endswith(" gguf") else said
        if said is not None:
            raise PlanError(f"model {self.name}: {way_out(said)}")

    @property
    def dtype(self) -> torch.dtype | None:
        """What it is published in, or is in."""
        if self.config is None:
            return self._source_dtype
        found = getattr(self.config, "dtype", None)
        return getattr(torch, found) if isinstance(found, str) else found

    @functools.cached_property
    def _source_dtype(self) -> torch.dtype | None:
        model = self.source
        if not isinstance(model, nn.Module):
            model = self.build(None, FakeTensorMode(allow_non_fake_inputs=True))
        return next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), None)

    @property
    def layers(self) -> int | None:
        """How many it has; None: it cannot be built with fewer."""
        return None if self.config is None else getattr(self.config, "num_hidden_layers", None)

    def build(self, dtype: torch.dtype | None, mode: FakeTensorMode | None, layers: int | None = None) -> nn.Module:
        """Build the model in training mode.

        Args:
            dtype: of all floating-point tensors; None: the model's own.
            mode: the fake tensors' mode; None: real tensors of random numbers.
            layers: how many layers to build; None: all.

        Raises:
            PlanError: transformers cannot build it, or it is no causal model.
        """
        if self.config is None:
            return _of_source(self.source, dtype, mode)
        from transformers import AutoModelForCausalLM

        _refuse_other_kinds(self.name, self.config)
        dtype = dtype or self.dtype or torch.bfloat16
        config = copy.deepcopy(self.config) if layers is None else _with_layers(self.config, layers)
        config.use_cache = False
        try:
            with mode or contextlib.nullcontext():
                return AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        except BROKEN_CONFIG as error:
            what = f"transformers cannot build a causal model of it ({_short(error)})"
            raise PlanError(f"model {self.name}: {what}") from None

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return self._meta[0]

    @functools.cached_property
    def _meta(self) -> tuple[int, list[tuple] | None]:
        """How many parameters it has, and of each layer its modules and their parameters."""
        if self.config is None:
            return _count(self.build(None, FakeTensorMode(allow_non_fake_inputs=True))), None
        with plain_torch(), torch.device("meta"):
            model = self.build(torch.bfloat16, None)
        return _count(model), _shapes(model, self.layers)

    @functools.cached_property
    def depths(self) -> tuple[int, int, int] | None:
        """Two depths whose steps tell that of the whole model, and the period of its layers; None: run it whole."""
        layers = self.layers
        if layers is None or getattr(self.config, "text_config", None) is not None:
            return None
        if getattr(self.config, "num_kv_shared_layers", None):  # the last layers use the keys of others
            return None
        period = _period(self.config, layers, self._meta[1])
        if period is None:
            return None
        first = 2 * period + layers % period
        return (first, first + period, period) if layers > first + 2 * period else None


def find_subject(model: Any) -> Subject:
    """Find what is to be planned: a model by name or by hand.

    Args:
        model: The name of a preset, a folder, a config.json or a hub id; a transformers config; a module; or a function
            that builds one.

    Returns:
        The subject: its name, its config or module, and how to build it of fake tensors.

    Raises:
        PlanError: No such model; the message says what it could be.

    Example:
        >>> subject = gradfold.planner.find_subject(model.config)
    """
    if isinstance(model, (str, Path)):
        return _named(str(model))
    if hasattr(model, "model_type") and not isinstance(model, nn.Module):
        return Subject(getattr(model, "name_or_path", "") or model.model_type, config=model)
    if isinstance(model, nn.Module):
        return _of_module(model)
    if callable(model):
        return Subject(getattr(model, "__name__", "model"), source=model)
    raise PlanError(
        f"model={model!r}: give a name, a folder, a transformers config, a module or a function that builds one"
    )


def _of_module(model: nn.Module) -> Subject:
    model, compiled = _torch.uncompiled(model)
    if compiled:
        warnings.warn(
            f"{type(model).__name__} is compiled; its eager form is planned. A compiled region also holds the uses of "
            "its weights until its backward ends: fold.report() says how much that was",
            stacklevel=users_level(),
        )
    return Subject(type(model).__name__, source=model)


def _named(name: str) -> Subject:
    if not name.strip():
        raise PlanError(f"model {name!r}: give a name, a folder or a hub id, ORG/MODEL")
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # "~name" of nobody, or no home at all
        raise PlanError(f"model {name}: {_short(error)}; name the folder itself") from None
    if path.is_dir():
        if said := quantization_in(path):
            raise PlanError(f"model {name}: {way_out(said)}")
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
        with path.open("rb") as file:
            data = file.read(MOST_CONFIG_BYTES + 1)
        if len(data) > MOST_CONFIG_BYTES:
            raise PlanError(f"model {name}: {path.name} is larger than {MOST_CONFIG_BYTES >> 20} MiB, and so no config")
        fields = json.loads(data.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"model {name}: {path.name} cannot be read ({_short(error)})") from None
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise PlanError(f"model {name}: {path.name} is no transformers config, it has no model_type")
    layers = fields.get("num_hidden_layers", 1)
    if type(layers) is not int or not 0 < layers <= MOST_LAYERS:
        raise PlanError(f"model {name}: num_hidden_layers in {path.name} is no number from 1 to {MOST_LAYERS:,}")
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
    source: nn.Module | Callable[[], nn.Module], dtype: torch.dtype | None, mode: FakeTensorMode | None
) -> nn.Module:
    with plain_torch():
        if mode is not None:
            model = fake_copy(source, mode)
        else:
            model = copy.deepcopy(source) if isinstance(source, nn.Module) else source()
        if not isinstance(model, nn.Module):
            raise PlanError(f"model={source!r}: makes a {type(model).__name__}, not a torch module")
        if dtype is not None:
            _convert(model, dtype)
    return model if model.training else model.train()


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    """`model.to(dtype)`, which torch cannot do to fake parameters."""
    made: dict[int, nn.Parameter] = {}  # tied ones stay tied
    for module in list(model.modules()):
        parameters, buffers = _torch.own_parameters(module), _torch.own_buffers(module)
        for name, parameter in parameters.items():
            if parameter is not None and parameter.is_floating_point() and parameter.dtype != dtype:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
                parameters[name] = made[id(parameter)]
        for name, buffer in buffers.items():
            if buffer is not None and buffer.is_floating_point():
                buffers[name] = buffer.to(dtype)


def _refuse_other_kinds(name: str, config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as masked

    kind = getattr(config, "model_type", "")
    if getattr(config, "is_encoder_decoder", False):
        raise PlanError(f"model {name}: {kind} is encoder and decoder; a plan is for causal models: give its module")
    if kind in masked and not getattr(config, "is_decoder", False):
        raise PlanError(
            f"model {name}: {kind} is a masked language model; a plan is for causal ones: give its module, or a config "
            "with is_decoder=True"
        )


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
