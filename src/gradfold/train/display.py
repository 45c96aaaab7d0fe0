"""What a run shows on the terminal. Where there is none (a log file), plain lines instead of moving bars."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gradfold.planner.bytes import format_bytes
from gradfold.planner.settings import batches_of_tokens

if TYPE_CHECKING:
    from .recipe import Recipe
    from .recipe_groups import GradientRecipe
    from .run import Run

LOG_LINES = 20  # how often a run without a terminal says how far it is


class Display:
    """Shows a run on a rich console. `Display(Console(quiet=True))` shows nothing."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console()

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A spinner beside `what` while the block runs."""
        with self.console.status(f"{what} …"):
            yield

    def note(self, text: str) -> None:
        """Print a remark, in yellow."""
        self.console.print(Text(text, style="yellow"), soft_wrap=True)

    def unread(self, columns: dict[str, str]) -> None:
        """Name the columns of the data that nothing reads, with the first row that has them."""
        if columns:
            names = ", ".join(f"`{_printable(name)}` ({where})" for name, where in columns.items())
            self.note(f"nothing reads these columns of the data: {names}")

    def started(self, run: Run) -> None:
        """What is about to be trained, on what, for how long."""
        recipe, data = run.recipe, run.data
        parameters = sum(parameter.numel() for parameter in run.model.parameters())
        epochs = run.steps / data.steps_per_epoch if data.steps_per_epoch else None
        if not recipe.fold:
            how = "from stored gradients (--no-fold)"
        elif recipe.gradient.waits:
            how = "folded into backward; what waits for the step is never larger than the gradients"
        else:
            how = "folded into backward: no gradient is stored"
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_column()
        millions = _trained(run, parameters)
        grid.add_row("model", f"{escape(recipe.model)}, {millions}, {recipe.dtype} on {run.device}")
        grid.add_row("data", f"{escape(_files(recipe))}: {_amount(data)}")
        batches = batches_of_tokens(
            recipe.batch_size, recipe.sequence_length, recipe.gradient.accumulate, getattr(data, "paired", False)
        )
        passes = "" if epochs is None else f" ({epochs:.2g} epochs)"
        grid.add_row("training", f"{run.steps:,} steps{passes} of {batches}")
        grid.add_row("optimizer", f"{recipe.optimizer.name}, lr {recipe.optimizer.lr:.3g}, {how}")
        if clipping := _clipping(recipe.gradient):
            grid.add_row("gradients", clipping)
        if run.fold is not None and (working_set := run.fold.describe_working_set()):
            grid.add_row("working set", working_set)
        if recipe.stream.used and run.fold is not None:
            grid.add_row("streamed", _streamed(run))
        grid.add_row("results", escape(str(run.out)))
        self.console.print(grid)
        held = getattr(data, "held_out_tokens", None)
        kinds = [data.tokens] if held is None or held is data.tokens else [data.tokens, held]
        for what in left_out(kinds, recipe.sequence_length):
            self.note(what)
        if run.progress.step:
            self.console.print(f"continuing after step {run.progress.step}")

    def measured(self, step: int, loss: float) -> None:
        """Print a held-out loss."""
        self.console.print(f"step {step:>5}  held-out loss {loss:.4f}", highlight=False)

    @contextlib.contextmanager
    def progress(self, run: Run) -> Iterator[Bar]:
        """A bar over all steps, or log lines."""
        if not self.console.is_terminal:
            yield Bar(self, run.steps, None, None)
            return
        columns = (
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("", total=run.steps, completed=run.progress.step, figures="")
            yield Bar(self, run.steps, progress, task)

    def summary(self, summary: dict[str, Any], out: Path) -> None:
        """The table and the samples at the end."""
        table = Table(title="Trained", title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
        table.add_column()
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        for label, key in (("held-out loss", "held_out_loss"), ("held-out perplexity", "held_out_perplexity")):
            values = summary[key]
            if values["after"] is not None:
                table.add_row(label, _figure(values["before"]), f"[bold]{_figure(values['after'])}[/bold]")
        if losses := summary["train_loss"]:
            table.add_row("training loss, first and last step", _figure(losses["first"]), _figure(losses["last"]))
        if steps := summary["step_memory"]:
            table.add_section()
            table.add_row("memory of one step", steps["plain"]["label"], steps["folded"]["label"])
            for label, key in (
                ("peak of all tensors", "peak_bytes"),
                ("most gradients at a time", "most_gradient_bytes"),
            ):
                table.add_row(
                    label, format_bytes(steps["plain"][key]), f"[bold]{format_bytes(steps['folded'][key])}[/bold]"
                )
        self.console.print(table)
        self.console.print(_totals(summary), highlight=False, soft_wrap=True)
        if summary["sample"]["after"] is not None:
            self._samples(summary["sample"])
        self.console.print(f"model      {escape(summary['checkpoint'])}", highlight=False, soft_wrap=True)
        if best := summary["best"]:
            said = f"best       {best['checkpoint']} (held-out loss {best['held_out_loss']:.4f})"
            self.console.print(escape(said), highlight=False, soft_wrap=True)
        if address := summary.get("pushed_to"):
            self.console.print(f"pushed     {escape(address)}", highlight=False, soft_wrap=True)
        files = ", ".join([*summary["plots"], "metrics.jsonl", "summary.json"])
        self.console.print(f"results    {escape(str(out))}: {files}", highlight=False, soft_wrap=True)

    def _samples(self, sample: dict[str, str]) -> None:
        for when in ("before", "after"):
            written = re.sub(r"\n{3,}", "\n\n", (sample[when] or "").rstrip())
            text = Text(sample["prompt"].strip(), style="dim").append(written, style="bold")
            self.console.print(Panel(text, title=f"sample {when} training", title_align="left", border_style="dim"))


class Bar:
    """The progress of one run's steps."""

    def __init__(self, display: Display, steps: int, progress: Progress | None, task: TaskID | None):
        self._display = display
        self._progress = progress
        self._task = task
        self._every = max(1, steps // LOG_LINES)

    def stepped(self, record: dict[str, Any]) -> None:
        """Show one step's metrics."""
        peak = record.get("peak_cuda_bytes") or record["peak_rss_bytes"]
        speed = f"{record['tokens_per_s']:,.0f} tok/s"
        norm = "" if record["grad_norm"] is None else f"  grad norm {record['grad_norm']:#.3g}"
        if record.get("skipped"):
            self._display.note(f"step {record['step']}: a gradient is not finite; what has one does not step")
        chunk = f"  chunk {record['chunk'] + 1}/{record['chunks']}" if "chunk" in record else ""
        figures = f"loss {record['loss']:.4f}{norm}{chunk}  {speed}  lr {record['lr']:.2e}  peak {format_bytes(peak)}"
        if "link_share" in record:
            moved = record["link_to_device_bytes"] + record["link_to_host_bytes"]
            figures += f"  link {record['link_share']:.0%} of the step, {format_bytes(moved)}"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=record["step"], figures=figures)
        elif record["step"] % self._every == 0:
            self._display.console.print(f"step {record['step']:>5}  {figures}", highlight=False, soft_wrap=True)

    def measured(self, step: int, loss: float) -> None:
        """Print a held-out loss above the bar."""
        self._display.measured(step, loss)


def _printable(name: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def _files(recipe: Recipe) -> str:
    if not recipe.data_weights:
        return ", ".join(recipe.data)
    weighted = zip(recipe.data, recipe.data_weights, strict=True)
    return ", ".join(f"{path} (weight {weight:g})" for path, weight in weighted)


def _amount(data: Any) -> str:
    """How much data there is, in a line."""
    if not data.steps_per_epoch:
        return f"streamed; {len(data.held_out):,} held-out sequences"
    rows, tokens = len(data.tokens), int(data.tokens.starts[-1])
    if getattr(data, "paired", False):
        sizes, sequences = f"{rows // 2:,} preferences, {tokens:,} tokens", "pairs"
    else:
        sizes, sequences = f"{rows:,} rows, {tokens:,} tokens", "sequences"
    return f"{sizes}; {len(data.train):,} training and {len(data.held_out):,} held-out {sequences}"


def left_out(all_tokens: Iterable[Any], limit: int) -> list[str]:
    """What became of rows that are not trained as they are, a sentence for each kind."""
    found = list(all_tokens)

    def count(name: str) -> int:
        return sum(getattr(tokens, name, 0) for tokens in found)

    said = []
    if number := count("dropped"):
        said.append(f"{_rows(number)} left out: over sequence_length = {limit} tokens (text.too_long = drop)")
    if number := count("truncated"):
        lost = f"; {count('cut_away'):,} of them had nothing to learn left" if count("cut_away") else ""
        said.append(f"{_rows(number)} cut to sequence_length = {limit} tokens (text.too_long = truncate){lost}")
    if number := count("skipped") - count("cut_away"):
        said.append(f"{_rows(number)} left out: empty, or nothing to learn in them")
    return said


def _rows(number: int) -> str:
    return f"{number:,} rows were" if number > 1 else "1 row was"


def _trained(run: Run, parameters: int) -> str:
    """How many of the parameters train: all along, or in each turn of a working set."""
    per_turn = [] if run.fold is None else run.fold.trained_per_turn()
    if per_turn:
        least, most = (f"{count / 1e6:.1f}" for count in (min(per_turn), max(per_turn)))
        counts = most if least == most else f"{least} to {most}"
        return f"{counts} M of {parameters / 1e6:.1f} M parameters trained in each of {len(per_turn)} turns"
    trained = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    return f"{trained / 1e6:.1f} M of {parameters / 1e6:.1f} M parameters trained"


def _streamed(run: Run) -> str:
    """Where weights and states live, and how many blocks come and go."""
    stream = run.recipe.stream
    where = "in host memory" if stream.offload == "cpu" else f"in files of {stream.folder or run.out}"
    streamed = run.fold.report().streamed
    size = f"{format_bytes(streamed.home_bytes)} "
    return escape(f"{size}of weights and states {where}, {stream.blocks} blocks at a time on the device")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if value < 100 else f"{value:,.0f}"


def _clipping(gradient: GradientRecipe) -> str:
    parts = []
    if gradient.clip_norm is not None:
        how = {"exact": "", "two_pass": ", measured by a backward of its own", "delayed": " by the last step's norm"}
        parts.append(f"clipped to norm {gradient.clip_norm:g}{how[gradient.clip]}")
    if gradient.clip_value is not None:
        parts.append(f"elements clipped to ±{gradient.clip_value:g}")
    return ", ".join(parts)


def _peak(summary: dict[str, Any]) -> str:
    size = format_bytes(summary["peak_rss_bytes"])
    if summary["peak_rss_is_of"] == "anonymous memory":
        return f"peak anonymous memory of the process {size} (without the files that are mapped)"
    return f"peak memory of the process {size}"


def _totals(summary: dict[str, Any]) -> str:
    parts = [
        f"{summary['steps']:,} steps, {summary['tokens']:,} tokens in {summary['training_s']:,.0f} s "
        f"({summary['tokens_per_s']:,.0f} tokens/s)",
        _peak(summary),
    ]
    if skipped := summary["skipped_steps"]:
        parts.append(f"{skipped:,} of the steps with gradients that were not finite and reached no weight")
    if summary["peak_cuda_bytes"]:
        parts.append(f"of the GPU {format_bytes(summary['peak_cuda_bytes'])}")
    return ", ".join(parts)
