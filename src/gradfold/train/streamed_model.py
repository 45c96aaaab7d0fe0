"""Load a model of transformers into the files of a stream, one tensor at a time: it is never in memory as a whole."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradfold.errors import FoldError
from gradfold.streaming import Stream

INDEX = "model.safetensors.index.json"


def load_streamed(
    folder: str | Path, stream: Stream, *, dtype: torch.dtype | None = None, auto_class: Any = None, **config: Any
) -> nn.Module:
    """Return a model with the weights of a checkpoint, in memory that its stream can use where it is.

    With ``Stream(offload="disk")`` its parameters lie in mapped files from the beginning, so that a model larger than
    host memory can be loaded, and ``fold`` moves nothing.

    Args:
        folder: A folder as ``save_pretrained`` writes it: ``config.json`` and safetensors files.
        stream: The stream that the model will be folded with.
        dtype: The dtype of its weights; None: the one its configuration names, else fp32.
        auto_class: The class whose ``from_config`` makes the model; None: ``AutoModelForCausalLM``.
        **config: Changes of the configuration.

    Returns:
        The model, in evaluation mode, as from ``from_pretrained``.

    Raises:
        FoldError: The folder has no such files, or their names or shapes are not those of the model (where transformers
            converts names as it loads). Nothing is left in the stream's folder then.

    Example:
        >>> model.save_pretrained("saved")
        >>> stream = gradfold.Stream(offload="disk", folder="scratch")
        >>> large = gradfold.hf.load_streamed("saved", stream, dtype=torch.bfloat16)
        >>> fold = gradfold.fold(large, gradfold.AdamW(large.parameters(), states="int8"), stream=stream)
    """
    import transformers

    source = Path(folder)
    files = _files(source)
    settings = transformers.AutoConfig.from_pretrained(str(source), **config)
    chosen = dtype or getattr(settings, "dtype", None) or torch.float32
    with stream.building(), _without_init():
        model = (auto_class or transformers.AutoModelForCausalLM).from_config(settings, dtype=chosen)
    if isinstance(model, transformers.PreTrainedModel):
        model.tie_weights()  # without which it is made here
    _fill(model, files, source)
    with contextlib.suppress(OSError):  # there need not be one
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(source))
    return model.eval()


def is_checkpoint(location: str) -> bool:
    """Return whether this is a folder that ``load_streamed`` can read."""
    folder = Path(location)
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _files(source: Path) -> dict[str, Path]:
    """Return the file of each tensor of a checkpoint, by its name there."""
    from safetensors import safe_open

    index = source / INDEX
    if index.is_file():
        names = json.loads(index.read_text())["weight_map"]
        return {name: source / file for name, file in names.items()}
    found = sorted(source.glob("*.safetensors"))
    if not found:
        raise FoldError(
            f"load_streamed(folder={str(source)!r}): no *.safetensors in it; give a folder that save_pretrained has "
            "written, or load the model with from_pretrained and fold it with stream="
        )
    made = {}
    for path in found:
        with safe_open(path, framework="pt") as file:
            made.update(dict.fromkeys(file.keys(), path))
    return made


def _fill(model: nn.Module, files: Mapping[str, Path], source: Path) -> None:
    """Copy every tensor of a checkpoint into the model."""
    from safetensors import safe_open
    from transformers.utils import logging

    wanted: dict[str, Tensor] = model.state_dict()
    names = _renamed(model, wanted, files)
    there = {wanted[names[name]].data_ptr() for name in files if name in names}
    missing = [name for name, one in wanted.items() if name not in names.values() and one.data_ptr() not in there]
    unknown = sorted(files.keys() - names.keys())
    if missing or unknown:
        said = [f"{len(missing)} weights of the model are not in its files, such as {missing[0]!r}"] if missing else []
        said += [f"{len(unknown)} tensors of its files are not the model's, such as {unknown[0]!r}"] if unknown else []
        raise FoldError(
            f"load_streamed(folder={str(source)!r}): {'; '.join(said)}; transformers may convert this checkpoint as it "
            "loads: load it with from_pretrained, and fold that with stream="
        )
    by_file: dict[Path, list[str]] = {}
    for name, path in files.items():
        by_file.setdefault(path, []).append(name)
    bar = logging.tqdm(total=len(files), desc="Loading weights", leave=False)
    with torch.no_grad():
        for path, members in by_file.items():
            with safe_open(path, framework="pt") as file:
                for name in members:
                    value, target = file.get_tensor(name), wanted[names[name]]
                    if value.shape != target.shape:
                        raise FoldError(
                            f"load_streamed(folder={str(source)!r}): {name} is {tuple(value.shape)} in {path.name}, "
                            f"and {tuple(target.shape)} in the model"
                        )
                    target.copy_(value)
                    bar.update()
    bar.close()


def _renamed(model: nn.Module, wanted: Mapping[str, Tensor], files: Mapping[str, Path]) -> dict[str, str]:
    """Return the model's name of each tensor of a checkpoint; that may be of the model without its head."""
    prefix = getattr(model, "base_model_prefix", "")
    made = {}
    for name in files:
        for tried in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            if tried in wanted:
                made[name] = tried
                break
    return made


@contextlib.contextmanager
def _without_init() -> Iterator[None]:
    """A context in which new modules draw no random weights, which are overwritten anyway."""
    found = None
    with contextlib.suppress(ImportError):
        found = getattr(importlib.import_module("transformers.initialization"), "no_init_weights", None)
    with contextlib.nullcontext() if found is None else found():
        yield
