"""How a plan looks on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gradfold.planner.allocator import CONTEXT_BYTES, allocated
from gradfold.planner.bytes import byte_unit, format_bytes
from gradfold.planner.measure import Measured
from gradfold.planner.report import Plan
from gradfold.planner.step import StepMemory
from gradfold.planner.trace import CATEGORIES

GIB = 2**30


def print_plan(
    plan: Plan,
    budget_bytes: int | None = None,
    console: Console | None = None,
    assumptions: Mapping[str, tuple[Any, str]] | None = None,
    margin: float = 0.0,
) -> None:
    """Print the peaks side by side, by what their bytes are for.

    Args:
        plan: what to print.
        budget_bytes: what the card has; adds a row that says whether each fits.
        console: where to print, standard output unless given.
        assumptions: name -> (value, where it came from) of what the plan was made for.
        margin: part of the budget that must stay free.
    """
    console = console or Console(highlight=False)
    settings, predicted = plan.settings, plan.predicted
    where = "as an accelerator runs it" if plan.device == "cuda" else "as this processor runs it"
    console.print(f"[bold]{escape(plan.model)}[/bold]  {predicted.parameters:,} parameters, {plan.dtype}")
    console.print(f"[dim]one step of {settings.describe_batches()}, {where}; {escape(settings.describe())}[/dim]")
    if assumptions:
        said = ", ".join(f"{name} {value} ({source})" for name, (value, source) in assumptions.items())
        console.print(f"[dim]assumed: {escape(said)}[/dim]")
    console.print()

    steps = (plan.memory, *plan.baselines)
    most_bytes = max(step.peak_bytes for step in steps)
    unit, unit_bytes = byte_unit(most_bytes)

    def sizes(of: Iterable[float]) -> list[str]:
        return [f"{size / unit_bytes:.2f}" for size in of]

    table = Table(show_edge=False, pad_edge=False, box=None, header_style="bold")
    table.add_column(unit, style="dim", no_wrap=True)
    table.add_column("this plan", justify="right", style="bold")
    for baseline in plan.baselines:
        table.add_column(baseline.label, justify="right")
    at_peak = [step.at_peak() for step in steps]
    for category in CATEGORIES:
        if any(figures[category] >= most_bytes / 5000 for figures in at_peak):
            table.add_row(category, *sizes(figures[category] for figures in at_peak))
    table.add_section()
    table.add_row("peak of live tensors", *sizes(step.peak_bytes for step in steps))
    table.add_row("reached in", *(_moment(step) for step in steps))
    if plan.device == "cuda":
        blocks = [allocated(step.timeline) for step in steps]
        table.add_row("as blocks of 512 B", *sizes(block.allocated_bytes for block in blocks))
        table.add_row("  and CUDA context", *sizes(block.allocated_bytes + CONTEXT_BYTES for block in blocks))
        table.add_row("allocator's segments", *sizes(block.reserved_bytes for block in blocks))
    if budget_bytes is not None:
        fits = ["yes" if _fits(plan, step, budget_bytes * (1 - margin)) else "no" for step in steps]
        spare = f", {margin:.0%} free" if margin else ""
        table.add_row(f"fits {format_bytes(budget_bytes)}{spare}", *fits)
    console.print(table)
    waits = settings.clip == "exact" and settings.clip_norm is not None
    if settings.parallel == "replicas" and settings.ranks > 1 and waits:
        most = format_bytes(predicted.parameters * 4)
        console.print(
            f"\n[yellow]not planned: with clip_norm and clip='exact', averaged gradients of {settings.ranks} replicas "
            f"wait for the norm, up to {most} more; clip='two_pass' keeps none[/yellow]"
        )
    if predicted.chunks:
        host, disk = format_bytes(predicted.host_bytes), format_bytes(predicted.disk_bytes)
        moved = format_bytes(predicted.moved_bytes_per_step)
        console.print(
            f"\nworking set: {predicted.chunks} chunks; sleeping states take {host} of host memory and {disk} of disk; "
            f"{moved} move to or from them in a step, on average"
        )
    if said := plan.describe_stream():
        console.print(f"\n{said}", highlight=False)
    if plan.device == "cuda":
        console.print(
            f"[dim]\nThe CUDA context is assumed to take {_gib(CONTEXT_BYTES)} GiB. Segments are what the caching "
            "allocator asks the driver for; with PYTORCH_ALLOC_CONF=expandable_segments:True they come close to the "
            "blocks.[/dim]"
        )


def print_measured(plan: Plan, measured: Measured, console: Console | None = None) -> None:
    """Print the predicted and the measured peak, and the prediction's error."""
    console = console or Console(highlight=False)
    error = plan.peak_bytes / measured.peak_bytes - 1
    console.print(
        f"\npredicted [bold]{format_bytes(plan.peak_bytes)}[/bold], measured [bold]{format_bytes(measured.peak_bytes)}"
        f"[/bold] ({measured.by}): error {error:+.2%}"
    )


def _moment(step: StepMemory) -> str:
    return f"{step.peak_phase}, {step.peak_place.removeprefix('model.') or 'loss'}"


def _fits(plan: Plan, step: StepMemory, budget_bytes: float) -> bool:
    if plan.device != "cuda":
        return step.peak_bytes <= budget_bytes
    return allocated(step.timeline).allocated_bytes + CONTEXT_BYTES <= budget_bytes


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.2f}"
