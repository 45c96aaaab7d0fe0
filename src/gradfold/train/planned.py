"""What a run's data says before the run begins, for its plan: the batches of its largest step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .data import Data, prepare_data
from .errors import TrainError, one_line
from .model import find_model, load_tokenizer, quiet_transformers
from .objective import NextToken, Objective
from .packing import Batch
from .preference import Preference
from .readers import find_file
from .recipe import Recipe

if TYPE_CHECKING:
    from gradfold.planner.settings import Settings
    from gradfold.planner.step import MicroBatches

MOST_READ_BYTES = 2**25
"""Size of files that a plan tokenizes; of larger ones every sequence is taken to be full."""


def planned_batches(recipe: Recipe) -> tuple[Callable[[Settings], list[MicroBatches]] | None, str]:
    """What a step of the run is given at most, as a function of how its batch is split, and what to say of it.

    None where the data cannot be read here, with the reason: there is no file, it is large or streamed, or the model's
    tokenizer is not on this machine. Nothing is downloaded.
    """
    try:
        if reason := _unread(recipe):
            return None, reason
        source = find_model(recipe.model)
        if not Path(source.location).is_dir():
            return None, "the model's tokenizer is not in a folder here"
        with quiet_transformers():
            data = prepare_data(recipe, load_tokenizer(source))
    except TrainError as error:
        return None, one_line(error)
    made = functools.cache(functools.partial(_batches, recipe, data))
    longest = max(batch["input_ids"].shape[1] for step in made(recipe.plan_settings()) for batch in step)
    return made, f"the longest sequence of a step has {longest:,} tokens"


def _unread(recipe: Recipe) -> str:
    """Why the data is not read."""
    paths = [find_file(source) for source in (*recipe.data, *recipe.text.held_out_data) if source != "pydoc"]
    if recipe.text.streaming:
        return "text.streaming"
    if sum(path.stat().st_size for path in paths) > MOST_READ_BYTES:
        return f"over {MOST_READ_BYTES >> 20} MiB"
    return ""


def _batches(recipe: Recipe, data: Data, settings: Settings) -> list[MicroBatches]:
    """The batches of the steps that may be the largest, where `settings` say how its sequences are split."""
    from gradfold.planner.step import MicroBatches

    data = dataclasses.replace(data, batch_size=settings.batch, accumulate=settings.accumulate)
    steps = recipe.steps or math.ceil((recipe.epochs or 1) * data.steps_per_epoch)
    objective: Objective = NextToken(recipe.text.packing)
    if data.paired:
        objective = Preference(recipe.preference, recipe.head)
    known = data.paired and recipe.preference.reference == "precomputed"

    def inputs_of(batch: Batch) -> dict[str, Any]:
        inputs = objective.inputs(batch, torch.device("cpu"))
        if known and "reference" not in inputs:
            inputs["reference"] = torch.zeros(len(batch.input_ids), dtype=torch.float64)
        return inputs

    return [MicroBatches(map(inputs_of, step)) for step in data.largest_steps(steps)]
