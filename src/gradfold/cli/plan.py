"""`gradfold plan`: predict what a training step takes, and find settings that fit a budget."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gradfold.train.errors import RecipeError
from gradfold.train.recipe import Recipe

from .chosen import Chosen, choose_recipe
from .flags import given_fields, parsed_again, print_help, quiet_environment, refuse_unwritable
from .plan_target import device_of, subject_of

if TYPE_CHECKING:
    from gradfold.planner.report import Plan
    from gradfold.planner.search import SearchResult

PLAN_COMMAND = "gradfold plan"
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
ASSUMED = {"batch": "batch_size", "tokens": "sequence_length", "dtype": "dtype"}
"""What is printed of a plan's assumptions -> the recipe's field."""
SHORTER = {"tokens": "sequence_length", "batch": "batch_size"}
"""Flag of this command -> the recipe's field that it sets."""


@dataclasses.dataclass(frozen=True)
class PlanCommand:
    """Predict the memory of a training step, by running its real code on tensors that have no memory.

    Takes the flags and recipe files of `gradfold train`, with the same defaults: put `plan` in the place of `train` to
    see what a command would take. Flags that change no memory change nothing here. Of a model on the hub only the
    config.json is downloaded, and nothing at all of the models that docs/planning.md lists.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    config: str | None = None
    """Recipe file (YAML) to start from; other flags override it."""
    tokens: int | None = None
    """Tokens per sequence, the same as --sequence-length. Every sequence is taken to be full."""
    batch: int | None = None
    """Sequences per micro-batch, the same as --batch-size."""
    budget: str | None = None
    """Memory of the card, such as 24GiB: also search for settings that fit it, and print the fastest."""
    json: bool = False
    """Print everything as JSON, and no table."""
    plot: str | None = None
    """Draw the timeline of the step, with plain AdamW's above it, into this file (.png, .svg or .pdf)."""
    measure: bool = False
    """Also run the step for real on this machine, with random weights; print predicted, measured and the error."""
    compare: bool = True
    """Compare with plain AdamW, AdamW in hooks and 8-bit AdamW."""


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
        print_help(PlanCommand, PlanCommand(Recipe()), PLAN_COMMAND)
        return 0
    options, chosen = _read(words)
    if options.plot is not None:
        _check_plot(options.plot, options.compare)
    quiet_environment()

    from gradfold.planner.bytes import parse_bytes

    budget_bytes = None if options.budget is None else parse_bytes(options.budget)
    with _beside(options) as baselines, _progress(options.json) as progress:
        plan, found, measured = _work(options, chosen, budget_bytes, baselines, progress)
        if options.plot is not None:
            progress("drawing")
            plan.plot(options.plot, budget_bytes)
    if options.json:
        print(json.dumps(_as_json(plan, chosen, found, measured), indent=1))
        return 0
    from gradfold.cli import plan_show

    plan_show.print_plan(plan, budget_bytes, assumptions=_assumptions(chosen))
    if measured is not None:
        plan_show.print_measured(plan, measured)
    if found is not None:
        plan_show.print_found(plan, found)
    if options.plot is not None:
        print(f"\ndrawn to {options.plot}")
    return 0


def _read(words: list[str]) -> tuple[PlanCommand, Chosen]:
    """The command, the recipe it is about, and where that came from."""
    given = given_fields(words, EXTRA)
    extra = {name: given.pop(name) for name in EXTRA if name in given}
    flags = {}
    for short, name in SHORTER.items():
        if extra.get(short) is None:
            continue
        if name in given:
            raise RecipeError(f"--{short} and --{name.replace('_', '-')} say the same; keep one")
        given[name], flags[name] = extra[short], f"--{short}"
    chosen = choose_recipe(extra.get("config"), given, flags)
    parsed_again(PlanCommand, PlanCommand(chosen.recipe), words, PLAN_COMMAND)
    return PlanCommand(chosen.recipe, **extra), chosen


def _check_plot(path: str, compare: bool) -> None:
    """Before a minute of work, not after it."""
    if not path.endswith(ENDINGS):
        raise RecipeError(f"--plot {path}: name a file that ends in {', '.join(ENDINGS)}")
    if not Path(path).absolute().parent.is_dir():
        raise RecipeError(f"--plot {path}: there is no folder {Path(path).parent}")
    if Path(path).exists() and not Path(path).is_file():
        raise RecipeError(f"--plot {path}: is a folder, a pipe or a device; name a file")
    refuse_unwritable(Path(path).absolute().parent, f"--plot {path}")
    if not compare:
        raise RecipeError("--plot with --no-compare: the picture has plain AdamW above the plan; leave one of them out")
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise RecipeError("--plot needs matplotlib; run: pip install 'gradfold[plot]'")


def _work(
    options: PlanCommand,
    chosen: Chosen,
    budget_bytes: int | None,
    baselines: Callable[[], tuple],
    progress: Callable[[str], None],
) -> tuple[Plan, SearchResult | None, Any]:
    """The plan, what a search found, what was measured."""
    from gradfold.planner.api import plan
    from gradfold.planner.fake import frozen_objects
    from gradfold.planner.measure import measure
    from gradfold.planner.search import search

    recipe = chosen.recipe
    settings, device = recipe.plan_settings(), device_of(recipe, options.measure)
    subject = subject_of(recipe.model)
    found = measured = None
    with frozen_objects(collect=False):
        made = plan(subject, settings, device=device, baselines=False, progress=progress)
        if budget_bytes is not None:
            fixed = {SEARCHED[name] for name in chosen.sources if name in SEARCHED}
            found = search(subject, settings, budget_bytes, device=device, fixed=fixed, progress=progress)
        if options.compare:
            progress("tracing: what it is compared with")
            made = dataclasses.replace(made, baselines=baselines())
    if options.measure:
        progress("taking the step for real")
        measured = measure(subject, settings, device, made.peak_bytes)
    return made, found, measured


@contextlib.contextmanager
def _beside(options: PlanCommand) -> Iterator[Callable[[], tuple]]:
    """What waits for the baselines' steps."""
    if not options.compare:
        yield lambda: ()
        return
    from .plan_baselines import tracing_beside

    with tracing_beside(options.recipe, options.measure) as baselines:
        yield baselines


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A spinner with what is being done, on standard error."""
    from rich.console import Console

    console = Console(stderr=True, quiet=quiet)
    with console.status("loading ...") as status:
        yield lambda what: status.update(f"{what} ...")


def _assumptions(chosen: Chosen) -> dict[str, tuple[Any, str]]:
    """What the plan takes for granted: name -> (value, where it came from)."""
    recipe = chosen.recipe
    values = {name: (getattr(recipe, field), chosen.source(field)) for name, field in ASSUMED.items()}
    published = str(subject_of(recipe.model).dtype).removeprefix("torch.")
    if published not in ("None", recipe.dtype):
        values["dtype"] = (recipe.dtype, f"{chosen.source('dtype')}; published in {published}")
    return values


def _as_json(plan: Plan, chosen: Chosen, found: SearchResult | None, measured: Any) -> dict[str, Any]:
    made = plan.as_dict()
    made["assumptions"] = {
        name: {"value": value, "from": source} for name, (value, source) in _assumptions(chosen).items()
    }
    if measured is not None:
        made["measured"] = {
            "peak_bytes": measured.peak_bytes,
            "by": measured.by,
            "error": plan.peak_bytes / measured.peak_bytes - 1,
        }
    if found is not None:
        made["search"] = found.as_dict()
    return made
