"""Models with their data, for the benchmarks that train: every method gets the same batches."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from gradfold.train.data import as_tensors
from gradfold.train.display import Display
from gradfold.train.evaluate import held_out_loss
from gradfold.train.model import find_model, load_model
from gradfold.train.recipe import Recipe
from gradfold.train.recipe_groups import OptimizerRecipe, TextRecipe
from gradfold.train.setup import assemble

from .common import llama_config


@dataclasses.dataclass(frozen=True)
class Task:
    """A model with its data."""

    build: Callable[[str, int], nn.Module]  # dtype, seed
    batch: Callable[[int], dict[str, Tensor]]
    held_out: Callable[[nn.Module], float]  # loss of an fp32 model, in nats per token


def smollm2(seed: int, length: int = 256, held_out: int = 10) -> Task:
    """SmolLM2-135M on the default data of ``gradfold train``; one sequence of ``length`` tokens per step."""
    recipe = Recipe(
        steps=1,
        batch_size=1,
        sequence_length=length,
        seed=seed,
        fold=False,
        text=TextRecipe(held_out=0.1),
        optimizer=OptimizerRecipe(name="SGD"),
    )
    with tempfile.TemporaryDirectory() as folder:
        run = assemble(recipe, Path(folder) / "none", None, Display(Console(quiet=True)))
    data, device = run.data, run.device
    few = dataclasses.replace(run, data=dataclasses.replace(data, held_out=data.held_out[:held_out]))
    loaded = load_model(find_model("smollm2"), recipe, device).train()

    def build(dtype: str, seed: int) -> nn.Module:
        return copy.deepcopy(loaded).to(getattr(torch, dtype))

    return Task(
        build,
        lambda step: as_tensors(data.batches(step)[0], device, recipe.text.packing),
        lambda model: held_out_loss(dataclasses.replace(few, model=model), lambda: False) or math.nan,
    )


def shakespeare(folder: Path, seed: int, length: int = 256, batch_size: int = 4) -> Task:
    """A Llama of 6.2 M parameters, with a BPE tokenizer of 2,048 tokens trained on the texts of a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.txt"))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=2048, initial_alphabet=alphabet, show_progress=False)
    )
    ids = torch.tensor([i for text in texts for i in tokenizer.encode(text).ids])
    windows = ids[: len(ids) // length * length].view(-1, length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    held_out, training = windows[order[:64]], windows[order[64:]]
    config = llama_config(6, hidden=256, intermediate=768, vocabulary=2048, heads=4, max_positions=length)

    def batch(step: int) -> dict[str, Tensor]:
        start = step * batch_size % (len(training) - batch_size)
        rows = training[start : start + batch_size]
        return {"input_ids": rows, "labels": rows}

    return _from_random_weights(config, batch, held_out.split(16))


def characters(
    seed: int, length: int = 64, batch_size: int = 8, *, layers: int = 4, hidden: int = 128, intermediate: int = 448
) -> Task:
    """A Llama, by default of 1 M parameters, that reads Python's own documentation (``pydoc_data``) by character."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([alphabet[character] for character in text])
    windows = ids[: len(ids) // length * length].view(-1, length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    held_out, training = windows[order[:256]], windows[order[256:]]
    config = llama_config(
        layers, hidden=hidden, intermediate=intermediate, vocabulary=len(alphabet), heads=4, max_positions=length
    )

    def batch(step: int) -> dict[str, Tensor]:
        rows = training[torch.arange(step * batch_size, (step + 1) * batch_size) % len(training)]
        return {"input_ids": rows, "labels": rows}

    return _from_random_weights(config, batch, held_out.split(64))


def _from_random_weights(config: Any, batch: Callable[[int], dict[str, Tensor]], held_out: Sequence[Tensor]) -> Task:
    """Return the task of a causal model that starts from random weights, measured on batches of whole windows."""
    from transformers import AutoModelForCausalLM

    def build(dtype: str, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return model.to(getattr(torch, dtype)).train()

    @torch.no_grad()
    def measure(model: nn.Module) -> float:
        model.eval()
        losses = [model(input_ids=rows, labels=rows, use_cache=False).loss.item() for rows in held_out]
        model.train()
        return statistics.fmean(losses)

    return Task(build, batch, measure)
