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
from gradfold.train.recipe import DEFAULTS, Recipe

from .chosen import Chosen, choose_recipe, take_shorter
from .flags import given_fields, parsed_again, print_help, quiet_environment, refuse_unwritable
from .plan_target import batches_of, device_of, subject_of, with_batches

if TYPE_CHECKING:
    from gradfold.planner.models import Subject
    from gradfold.planner.report import Plan
    from gradfold.planner.search import SearchResult
    from gradfold.planner.step import StepMemory

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
    "stream.offload": "stream",
}
"""Flag -> the setting that a search leaves alone once it is given."""
ASSUMED = {"batch": "batch_size", "tokens": "sequence_length", "dtype": "dtype"}
"""What is printed of a plan's assumptions -> the recipe's field."""


@dataclasses.dataclass(frozen=True)
class PlanCommand:
    """Predict the memory of a training step, by running its real code on tensors that have no memory.

    Takes the flags and recipe files of `gradfold train`, with the same defaults: put `plan` in the place of `train` to
    see what a command would take. Flags that change no memory change nothing here. Of a model on the hub only the
    config.json is downloaded, and nothing at all of the models that docs/planning.md lists.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    config: str | None = None
    """Recipe file (YAML) to start from; other flags override it. None: no file."""
    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Recipe file of axolotl or LLaMA-Factory (YAML) to start from; other flags override it. None: no file."""
    tokens: int | None = None
    """Tokens per sequence, the same as --sequence-length. Where the data is not here to be read, every sequence is
    taken to be full. None: not given."""
    batch: int | None = None
    """Sequences per micro-batch, the same as --batch-size. None: not given."""
    ranks: int | None = None
    """How many ranks share the model, as --parallel says; the plan is of what each of them takes. None: one."""
    budget: str | None = None
    """Memory of the card, such as 24GiB: also search for settings that fit it, and print the commands to train.
    None: no search."""
    host_budget: str | None = None
    """Host memory for the states of a working set, or for weights and states that stream, such as 64GiB. None: as much
    as they take."""
    margin: float = 0.03
    """Part of the budgets that must stay free: predictions are of live tensors, and a card is never quite empty."""
    link_gbps: float = 25.0
    """Bandwidth between card and host memory in GB/s each way (PCIe 4.0 x16 reaches about 25, 5.0 about 50), for the
    time of weights that stream."""
    disk_gbps: float = 5.0
    """Bandwidth of the disk in GB/s, both ways together, for weights that stream from there."""
    tflops: float = 396.0
    """TFLOP/s that the card reaches in matrix products, for the time beside that: 40% of an H100's data sheet."""
    json: bool = False
    """Print everything as JSON, and no table."""
    plot: str | None = None
    """Draw the timeline of the step, with plain AdamW's above it, into this file (.png, .svg or .pdf).
    None: no picture."""
    measure: bool = False
    """Also run the step for real on this machine, with random weights; print predicted, measured and the error."""
    compare: bool = True
    """Compare with plain AdamW, AdamW in hooks and 8-bit AdamW."""


EXTRA = {
    "config": str | None,
    "from": str | None,
    "tokens": int | None,
    "batch": int | None,
    "ranks": int | None,
    "budget": str | None,
    "host_budget": str | None,
    "margin": float,
    "link_gbps": float,
    "disk_gbps": float,
    "tflops": float,
    "json": bool,
    "plot": str | None,
    "measure": bool,
    "compare": bool,
}


def run(arguments: Sequence[str]) -> int:
    """Plan; returns the exit code. Raises PlanError, FoldError or TrainError."""
    words = list(arguments)
    if "-h" in words or "--help" in words:
        print_help(PlanCommand, PlanCommand(DEFAULTS), PLAN_COMMAND)
        return 0
    options, chosen = _of_ranks(*_read(words))
    if options.plot is not None:
        _check_plot(options.plot, options.compare)
    quiet_environment()

    budget_bytes, host_bytes = _budgets(options)
    batches, said = batches_of(chosen)
    with _beside(options, batches) as baselines, _progress(options.json) as progress:
        subject = with_batches(subject_of(chosen.recipe.model), batches)
        budgets = (budget_bytes, host_bytes)
        plan, found, measured, nothing = _work(options, chosen, subject, budgets, baselines, progress)
        if options.plot is not None:
            progress("drawing")
            plan.plot(options.plot, budget_bytes, more=_best(plan, found))
    if options.json:
        print(json.dumps(_as_json(plan, chosen, found, measured, said), indent=1))
    else:
        _print(options, plan, chosen, found, measured, budget_bytes, said)
    if nothing is not None:
        raise nothing
    return 0


def _of_ranks(options: PlanCommand, chosen: Chosen) -> tuple[PlanCommand, Chosen]:
    """The same command; of many ranks without what only one process can do. Raises RecipeError."""
    if options.ranks is None:
        if options.recipe.parallel is not None:
            raise RecipeError(f"--parallel {options.recipe.parallel}: say how many ranks share the model: --ranks 2")
        return options, chosen
    if options.recipe.parallel is None:
        raise RecipeError(f"--ranks {options.ranks}: say how they share the model: --parallel fsdp, tp or replicas")
    if options.measure or options.plot is not None:
        word = "--measure" if options.measure else "--plot"
        raise RecipeError(f"{word} with --ranks: there is one process, and nothing to compare with; leave it out")
    return dataclasses.replace(options, compare=False), chosen


def _settings_of(options: PlanCommand) -> Any:
    return dataclasses.replace(options.recipe.plan_settings(), ranks=options.ranks or 1)


def _rates(options: PlanCommand) -> Any:
    """What --link-gbps, --disk-gbps and --tflops say."""
    from gradfold.planner.speed import Rates

    return Rates(options.tflops * 1e12, options.link_gbps * 1e9, options.disk_gbps * 1e9)


def _budgets(options: PlanCommand) -> tuple[int | None, int | None]:
    """The bytes of --budget and --host-budget. Raises PlanError, RecipeError."""
    from gradfold.planner.bytes import parse_budget

    if not 0 <= options.margin < 1:
        raise RecipeError(f"--margin {options.margin:g}: give a part of the budget, from 0 to below 1")
    for name in ("link_gbps", "disk_gbps", "tflops"):
        if not getattr(options, name) > 0:
            raise RecipeError(f"--{name.replace('_', '-')} {getattr(options, name):g}: give a number above 0")
    if options.host_budget is not None and options.budget is None:
        raise RecipeError(f"--host-budget {options.host_budget}: goes with --budget, the memory of the card")
    host = None if options.host_budget is None else parse_budget(options.host_budget, "host-budget")
    return None if options.budget is None else parse_budget(options.budget), host


def _best(plan: Plan, found: SearchResult | None) -> list[StepMemory]:
    """The third panel: the best fit, or the nearest miss; nothing where that is the plan itself."""
    if found is None:
        return []
    choice, what = (found.choices[0], "best fit") if found.choices else (found.nearest, "nearest miss")
    if choice is None or choice.settings == plan.settings:
        return []
    return [dataclasses.replace(choice.predicted.memory, label=f"{what}: {choice.settings.describe()}")]


def _print(
    options: PlanCommand,
    plan: Plan,
    chosen: Chosen,
    found: SearchResult | None,
    measured: Any,
    budget_bytes: int | None,
    said: str,
) -> None:
    from gradfold.cli import plan_found, plan_show

    plan_show.print_plan(plan, budget_bytes, assumptions=_assumptions(chosen, said), margin=options.margin)
    if measured is not None:
        plan_show.print_measured(plan, measured)
    if found is not None:
        plan_found.print_found(found, chosen.recipe, subject_of(chosen.recipe.model))
    if options.plot is not None:
        print(f"\ndrawn to {options.plot}")


def _read(words: list[str]) -> tuple[PlanCommand, Chosen]:
    """The command, the recipe it is about, and where that came from."""
    given = given_fields(words, EXTRA)
    extra = {name: given.pop(name) for name in EXTRA if name in given}
    flags = take_shorter(given, extra)
    chosen = choose_recipe(extra.get("config"), given, flags, extra.pop("from", None))
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
    subject: Subject,
    budgets: tuple[int | None, int | None],
    baselines: Callable[[], tuple],
    progress: Callable[[str], None],
) -> tuple[Plan, SearchResult | None, Any, Exception | None]:
    """The plan, what a search found, what was measured, and what to say if nothing fits."""
    from gradfold.planner.api import plan
    from gradfold.planner.errors import NothingFits
    from gradfold.planner.fake import frozen_objects
    from gradfold.planner.measure import measure
    from gradfold.planner.search import search

    recipe = chosen.recipe
    settings, device = _settings_of(options), device_of(recipe, options.measure)
    found = measured = nothing = None
    with frozen_objects(collect=False):
        made = plan(subject, settings, device=device, baselines=False, rates=_rates(options), progress=progress)
        if budgets[0] is not None:
            fixed = {SEARCHED[name] for name in chosen.sources if name in SEARCHED}
            more: dict[str, Any] = {"host_budget_bytes": budgets[1], "margin": options.margin, "progress": progress}
            try:
                found = search(subject, settings, budgets[0], device=device, fixed=fixed, **more)
            except NothingFits as error:
                found, nothing = error.result, error
        if options.compare:
            progress("tracing: what it is compared with")
            made = dataclasses.replace(made, baselines=baselines())
    if options.measure:
        progress("taking the step for real")
        measured = measure(subject, settings, device, made.peak_bytes)
    return made, found, measured, nothing


@contextlib.contextmanager
def _beside(options: PlanCommand, batches: Callable[[Any], Any] | None) -> Iterator[Callable[[], tuple]]:
    """What waits for the baselines' steps."""
    if not options.compare:
        yield lambda: ()
        return
    from .plan_baselines import tracing_beside

    given = None if batches is None else batches(options.recipe.plan_settings())
    with tracing_beside(options.recipe, options.measure, given) as baselines:
        yield baselines


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A spinner with what is being done, on standard error."""
    from rich.console import Console

    console = Console(stderr=True, quiet=quiet)
    with console.status("loading ...") as status:
        yield lambda what: status.update(f"{what} ...")


def _assumptions(chosen: Chosen, said: str) -> dict[str, tuple[Any, str]]:
    """What the plan takes for granted: name -> (value, where it came from). `said`: of the data."""
    recipe = chosen.recipe
    values = {name: (getattr(recipe, field), chosen.source(field)) for name, field in ASSUMED.items()}
    published = str(subject_of(recipe.model).dtype).removeprefix("torch.")
    if published not in ("None", recipe.dtype):
        values["dtype"] = (recipe.dtype, f"{chosen.source('dtype')}; published in {published}")
    if said:
        values["data"] = (" ".join(recipe.data), said)
    return values


def _as_json(plan: Plan, chosen: Chosen, found: SearchResult | None, measured: Any, said: str = "") -> dict[str, Any]:
    made = plan.as_dict()
    made["assumptions"] = {
        name: {"value": value, "from": source} for name, (value, source) in _assumptions(chosen, said).items()
    }
    if measured is not None:
        made["measured"] = {
            "peak_bytes": measured.peak_bytes,
            "by": measured.by,
            "error": plan.peak_bytes / measured.peak_bytes - 1,
        }
    if found is not None:
        made["search"] = found.as_dict()
        from .plan_line import recipe_of, train_line

        for fit, choice in zip(made["search"]["fits"], found.choices, strict=True):
            fit["train"] = train_line(recipe_of(chosen.recipe, choice.settings), choice.settings.ranks)
    return made
