"""`gradfold plan`: predict what a training step takes, and find settings that fit a budget."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gradfold.cli.flags import given_fields, parsed_again, print_help, quiet_environment
from gradfold.train.errors import RecipeError
from gradfold.train.recipe import Recipe
from gradfold.train.recipe_file import load_fields, unflatten

if TYPE_CHECKING:
    from gradfold.planner.report import Plan
    from gradfold.planner.search import Found
    from gradfold.planner.settings import Settings

PROG = "gradfold plan"
ENDINGS = (".png", ".svg", ".pdf")
SEARCHED = {
    "optimizer.states": "states",
    "optimizer.master": "master",
    "gradient_checkpointing": "checkpointing",
    "head": "head",
    "gradient.accumulate": "accumulate",
    "working_set.chunks": "working_set",
    "working_set.by": "working_set",
}
"""Flag -> the setting that a search leaves alone once it is given."""


@dataclasses.dataclass(frozen=True)
class PlanCommand:
    """Predict the memory of a training step, by running its real code on tensors that have no memory.

    Takes the flags of `gradfold train`, so that a command can be planned by putting `plan` in the place of `train`;
    those that change no memory change nothing here. Without --dtype or --config it plans for the dtype in which the
    model is published; train's default is float32. Nothing is downloaded but the model's config.json, and of the
    models listed in the README not even that.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    config: str | None = None
    """Recipe file (YAML) to start from; other flags override it."""
    tokens: int | None = None
    """Tokens a sequence, the same as sequence_length. Every sequence is taken to be full. [1024]"""
    batch: int | None = None
    """Sequences a batch, the same as batch_size. [1]"""
    budget: str | None = None
    """What the card has, such as 24GiB: also search for settings that fit it, and print the fastest."""
    json: bool = False
    """Print everything as JSON, and no table."""
    plot: str | None = None
    """Draw the step beside plain AdamW's into this file (.png, .svg or .pdf)."""
    measure: bool = False
    """Also take the step for real, on random weights, here; print predicted, measured and the error."""
    compare: bool = True
    """--no-compare: leave out plain AdamW, AdamW in hooks and 8-bit AdamW."""


EXTRA = {
    "config": str | None,
    "tokens": int | None,
    "batch": int | None,
    "budget": str | None,
    "json": bool,
    "plot": str | None,
    "measure": bool,
    "compare": bool,
}


def run(arguments: Sequence[str]) -> int:
    """Plan; returns the exit code. Raises PlanError, FoldError or TrainError."""
    words = list(arguments)
    if "-h" in words or "--help" in words:
        print_help(PlanCommand, PlanCommand(Recipe()), PROG)
        return 0
    options, recipe, settled = _read(words)
    if options.plot is not None:
        _check_plot(options.plot, options.compare)
    quiet_environment()

    from gradfold.planner.units import parse_bytes

    budget_bytes = None if options.budget is None else parse_bytes(options.budget)
    with _beside(options, recipe, settled) as peers, _progress(options.json) as progress:
        plan, found, measured = _work(options, recipe, settled, budget_bytes, peers, progress)
        if options.plot is not None:
            progress("drawing")
            plan.plot(options.plot, budget_bytes)
    if options.json:
        print(json.dumps(_as_json(plan, found, measured), indent=1))
        return 0
    from gradfold.cli import plan_show

    plan_show.print_plan(plan, budget_bytes)
    if measured is not None:
        plan_show.print_measured(plan, measured)
    if found is not None:
        plan_show.print_found(plan, found)
    if options.plot is not None:
        print(f"\ndrawn to {options.plot}")
    return 0


def settings_from(recipe: Recipe, settled: frozenset[str]) -> Settings:
    """The recipe's settings; without a recipe file or --dtype, the dtype is what the model is published in."""
    made = recipe.plan_settings()
    return made if "dtype" in settled else dataclasses.replace(made, dtype=None)


def _read(words: list[str]) -> tuple[PlanCommand, Recipe, frozenset[str]]:
    """The command, the recipe, and which of its fields were given."""
    given = given_fields(words, EXTRA)
    extra = {name: given.pop(name) for name in EXTRA if name in given}
    for short, name in (("tokens", "sequence_length"), ("batch", "batch_size")):
        if short in extra and name in given:
            raise RecipeError(f"--{short} and --{name.replace('_', '-')} say the same; keep one")
    fields = load_fields(extra["config"]) if extra.get("config") else {}
    if fields:
        fields.setdefault("dtype", Recipe().dtype)  # as it would train
    fields |= given
    if "model" not in fields:
        raise RecipeError("name a model: --model llama-3.1-8b, a hub id, or a folder with a config.json")
    parsed_again(PlanCommand, PlanCommand(unflatten(fields, Recipe())), words, PROG)
    fields.setdefault("sequence_length", 1024)
    fields.setdefault("batch_size", 1)
    sizes = {"sequence_length": extra.get("tokens"), "batch_size": extra.get("batch")}
    fields |= {name: size for name, size in sizes.items() if size is not None}
    recipe = unflatten(fields, Recipe())
    return PlanCommand(recipe, **extra), recipe, frozenset(fields)


def _check_plot(path: str, compare: bool) -> None:
    """Before a minute of work, not after it."""
    if not path.endswith(ENDINGS):
        raise RecipeError(f"--plot {path}: name a file that ends in {', '.join(ENDINGS)}")
    if not Path(path).absolute().parent.is_dir():
        raise RecipeError(f"--plot {path}: there is no folder {Path(path).parent}")
    if not compare:
        raise RecipeError("--plot with --no-compare: the picture has plain AdamW above the plan; leave one of them out")
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise RecipeError("--plot needs matplotlib; run: pip install 'gradfold[plot]'")


def _work(
    options: PlanCommand,
    recipe: Recipe,
    settled: frozenset[str],
    budget_bytes: int | None,
    peers: Callable[[], tuple],
    progress: Callable[[str], None],
) -> tuple[Plan, Found | None, Any]:
    """The plan, what a search found, what was measured."""
    from gradfold.cli.plan_peers import subject_of
    from gradfold.planner.fake import frozen_objects
    from gradfold.planner.make import plan
    from gradfold.planner.measure import measure
    from gradfold.planner.search import search

    settings, device = settings_from(recipe, settled), device_of(recipe, options.measure)
    subject = subject_of(recipe.model)
    found = measured = None
    with frozen_objects(collect=False):
        made = plan(subject, settings, device=device, peers=False, progress=progress)
        if budget_bytes is not None:
            fixed = {SEARCHED[name] for name in settled if name in SEARCHED}
            found = search(subject, settings, budget_bytes, device=device, fixed=fixed, progress=progress)
        if options.compare:
            progress("tracing: what it is compared with")
            made = dataclasses.replace(made, peers=peers())
    if options.measure:
        progress("taking the step for real")
        measured = measure(subject, settings, device, made.peak_bytes)
    return made, found, measured


def device_of(recipe: Recipe, measured: bool) -> str:
    """What to plan for: an accelerator unless told otherwise; to be measured, what there is."""
    if recipe.device != "auto":
        return "cpu" if recipe.device == "cpu" else "cuda"
    if not measured:
        return "cuda"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def _beside(options: PlanCommand, recipe: Recipe, settled: frozenset[str]) -> Iterator[Callable[[], tuple]]:
    """What waits for the peers' steps."""
    if not options.compare:
        yield lambda: ()
        return
    from gradfold.cli.plan_peers import tracing_beside

    with tracing_beside(recipe, settled, options.measure) as peers:
        yield peers


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A spinner with what is being done, on standard error."""
    from rich.console import Console

    console = Console(stderr=True, quiet=quiet)
    with console.status("loading ...") as status:
        yield lambda what: status.update(f"{what} ...")


def _as_json(plan: Plan, found: Found | None, measured: Any) -> dict[str, Any]:
    made = plan.as_dict()
    if measured is not None:
        made["measured"] = {
            "peak_bytes": measured.peak_bytes,
            "by": measured.by,
            "error": plan.peak_bytes / measured.peak_bytes - 1,
        }
    if found is not None:
        made["search"] = found.as_dict()
    return made
