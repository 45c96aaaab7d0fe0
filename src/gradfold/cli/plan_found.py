"""How what a search has found looks on a terminal: what fits, what that costs, the command to train; what does not."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gradfold.planner.bytes import byte_unit, format_bytes
from gradfold.planner.costs import costs_of, notes_for
from gradfold.planner.models import Subject
from gradfold.planner.search import Choice, SearchResult
from gradfold.planner.settings import Settings
from gradfold.train.recipe import Recipe

from .plan_line import recipe_of, train_line

MISSES = 4  # that are shown beside what fits
NEAREST = 8  # ... where nothing does


def print_found(found: SearchResult, recipe: Recipe, subject: Subject, console: Console | None = None) -> None:
    """Print settings that fit, each with its cost and its command, and the nearest that do not.

    Args:
        found: what a search has found.
        recipe: what was planned.
        subject: its model.
        console: where to print, standard output unless given.
    """
    console = console or Console(highlight=False)
    budget = format_bytes(found.budget_bytes)
    if found.margin:
        budget += f" ({found.margin:.0%} left free)"
    if found.host_budget_bytes is not None:
        budget += f" and {format_bytes(found.host_budget_bytes)} of host memory"
    if not found.choices:
        _print_nearest(found, budget, subject, console)
        return
    _print_choices(f"\nWhat fits {budget}", found.choices, subject, console)
    if found.misses:
        console.print("\n[bold]What does not[/bold]")
        for settings, size_bytes in found.misses[:MISSES]:
            console.print(f"[dim]about {format_bytes(size_bytes)}[/dim]  {escape(_flags(settings))}")
    _print_lines(found.choices, recipe, subject, console)


def _print_choices(title: str, choices: Sequence[Choice], subject: Subject, console: Console) -> None:
    table = _table(title)
    unit, unit_bytes = byte_unit(max(choice.device_bytes for choice in choices))
    for column, justify in (("", "left"), ("settings", "left"), (f"device {unit}", "right"), (f"host {unit}", "right")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_column("step", justify="right")
    table.add_column("costs", overflow="fold")
    costs: list[str] = []
    for choice in choices:
        own = costs_of(choice.settings, subject)
        costs += own
        step = f"{choice.expected_s / choices[0].expected_s:.2f}x"
        size, host = (f"{n / unit_bytes:.2f}" for n in (choice.device_bytes, choice.predicted.host_bytes))
        table.add_row(choice.why, escape(_flags(choice.settings)), size, host, step, ", ".join(own))
    console.print(table)
    for note in notes_for(costs):
        console.print(f"[dim]{escape(note)}[/dim]")
    console.print(
        "[dim]step: expected time by the card's data sheet, for ordering only. A working set's steps are shorter "
        "because they train a chunk at a time.[/dim]"
    )


def _print_nearest(found: SearchResult, budget: str, subject: Subject, console: Console) -> None:
    """The nearest misses, as a table."""
    if found.nearest is not None:
        _print_choices(f"\nNothing fits {budget}. The nearest", [found.nearest], subject, console)
    table = _table("\nWhat else was tried")
    shown = None if found.nearest is None else found.nearest.settings
    misses = [miss for miss in found.misses if miss[0] != shown][:NEAREST]
    unit, unit_bytes = byte_unit(max((size for _, size in misses), default=0))
    table.add_column(f"about {unit}", justify="right")
    table.add_column("over", justify="right")
    table.add_column("settings", overflow="fold")
    table.add_column("costs", overflow="fold")
    room = found.budget_bytes * (1 - found.margin)
    for settings, size_bytes in misses:
        size, over = (f"{n / unit_bytes:.2f}" for n in (size_bytes, max(0.0, size_bytes - room)))
        table.add_row(size, over, escape(_flags(settings)), ", ".join(costs_of(settings, subject)))
    console.print(table)


def _print_lines(choices: Sequence[Choice], recipe: Recipe, subject: Subject, console: Console) -> None:
    """The commands, unbroken, to be copied."""
    console.print("\n[bold]To train so[/bold] [dim](with rows of your own after --data)[/dim]")
    for why in dict.fromkeys(choice.why for choice in choices):
        choice = next(choice for choice in choices if choice.why == why)
        console.print(f"[dim]{why}:[/dim]")
        line = train_line(recipe_of(recipe, choice.settings), choice.settings.ranks)
        console.print(line, markup=False, soft_wrap=True)
    longest = getattr(subject.config, "max_position_embeddings", None)
    if isinstance(longest, int) and recipe.sequence_length > longest:
        console.print(f"[yellow]this model takes at most {longest} tokens, and `gradfold train` refuses more[/yellow]")


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        show_edge=False,
        pad_edge=False,
        box=None,
        header_style="dim",
    )


def _flags(settings: Settings) -> str:
    """Settings as the flags that ask for them, beside those that are the same for all."""
    words = []
    if settings.states is not None:
        words.append(f"--optimizer.states {settings.states}")
    if settings.master is not None:
        words.append(f"--optimizer.master {settings.master}")
    if settings.checkpointing:
        words.append("--gradient-checkpointing")
    if settings.head == "plain":
        words.append("--head plain")
    if settings.accumulate > 1:
        words.append(f"--batch {settings.batch} --gradient.accumulate {settings.accumulate}")
    if (turns := settings.working_set) is not None:
        words.append(f"--working-set.chunks {turns.chunks}" if turns.chunks else "--working-set.by layer")
        words += [f"--working-set.offload {turns.offload}"] if isinstance(turns.offload, str) else []
    if (stream := settings.stream) is not None:
        words.append(f"--stream.offload {stream.offload}")
        words += [f"--stream.blocks {stream.blocks}"] if stream.blocks != 2 else []
    return " ".join(words) or "(nothing more)"
