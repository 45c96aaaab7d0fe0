"""`report_to`: the metrics of a run, also in wandb, tensorboard or trackio. None of these is needed otherwise."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from .errors import RecipeError, one_line
from .recipe import Recipe
from .recipe_file import flatten

PROJECT = "gradfold"


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take the figures of one step."""
        ...

    def finish(self) -> None:
        """Be done."""
        ...


def check_trackers(recipe: Recipe) -> None:
    """Raises RecipeError for a tracker whose package is not installed; before anything is loaded."""
    for name in recipe.report_to:
        if importlib.util.find_spec(name) is None:
            raise RecipeError(f"report_to = {name!r}: the package {name} is not installed; run: pip install {name}")


def open_trackers(recipe: Recipe, out: Path, note: Callable[[str], None]) -> Trackers:
    """Begin to log; a run that is resumed goes on in the same place. Raises RecipeError if a tracker cannot begin."""
    made: dict[str, Tracker] = {}
    for name in recipe.report_to:
        try:
            made[name] = OPEN[name](recipe, out)
        except Exception as error:  # each has its own ways to fail: no account, no network, no disk
            why = f"cannot begin ({one_line(error)}); leave it out, or set it up"
            raise RecipeError(f"report_to = {name!r}: {why}") from error
    return Trackers(made, note)


class Trackers:
    """All trackers of a run. One that fails is named once and left alone: it is no reason to stop training."""

    def __init__(self, trackers: dict[str, Tracker], note: Callable[[str], None]):
        self._trackers, self._note = trackers, note

    def log(self, record: dict[str, Any]) -> None:
        """Hand a line of metrics.jsonl on."""
        values = {name: float(value) for name, value in record.items()
                  if name != "step" and isinstance(value, int | float)}  # fmt: skip
        self._each(lambda tracker: tracker.log(record["step"], values))

    def finish(self) -> None:
        """Let all of them be done."""
        self._each(lambda tracker: tracker.finish())

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except Exception as error:
                del self._trackers[name]
                self._note(f"{name} is given up ({one_line(error)}); metrics.jsonl has all figures")


class _TensorBoard:
    def __init__(self, recipe: Recipe, out: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(out / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, recipe: Recipe, out: Path):
        wandb: Any = importlib.import_module("wandb")
        run_id = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]  # the same after a resume
        self._run = wandb.init(
            project=PROJECT, name=out.name, id=run_id, resume="allow", config=flatten(recipe), dir=str(out)
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def finish(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, recipe: Recipe, out: Path):
        self._trackio: Any = importlib.import_module("trackio")
        self._trackio.init(project=PROJECT, name=out.name, config=flatten(recipe), resume="allow")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._trackio.log(values, step=step)

    def finish(self) -> None:
        self._trackio.finish()


OPEN: dict[str, Callable[[Recipe, Path], Tracker]] = {"tensorboard": _TensorBoard, "wandb": _WandB, "trackio": _Trackio}
"""Name in `report_to` -> what begins to log."""
