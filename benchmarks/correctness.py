"""What does each method of stepping in backward compute, compared with its own definition on stored gradients?

Every method (``peers/``) trains a small model on the CPU as its documentation says. The judge trains a copy: plain
autograd, gradients stored and summed, clipped with torch's formula, then the method's own unfused rule. A cell shows
the relative L2 distance of the two total updates of all weights after a few steps. No cell is written by hand. Fills
docs/correctness.md, and the verdicts into the README.

    OMP_NUM_THREADS=1 python -m benchmarks.correctness
    OMP_NUM_THREADS=1 python -m benchmarks.correctness --only optimi LOMO        # a quick look, writes nothing
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import io
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import fill_table, print_table, write_result
from .peers import CONTESTANTS, Contestant, OutOfDate, PeerUnavailable
from .peers.base import LR, message

PAGE = Path(__file__).parent.parent / "docs" / "correctness.md"
README = PAGE.parent.parent / "README.md"
COLUMNS = {
    "accumulation": "accumulation exact?",
    "clipping": "clipping exact?",
    "norm": "reported norm true?",
    "ties": "ties",
    "scheduler": "scheduler reaches it?",
    "resume": "resume identical?",
}
STEPS = 8  # enough for BAdam to go through all four of its blocks, and back
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # largest distance that counts as exact, relative to the update
VOCABULARY, WIDTH, TOKENS, MICRO = 23, 12, 7, 4
CLIP_NORM = 0.05  # below every step's norm, which is checked
SPIKE = 3  # while clipping, every third step's loss is 20 times larger


class BadScene(Exception):
    """The judge's scene does not test what the column asks; an error of the judge."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One cell: a distance, and what it means."""

    verdict: str  # yes, no, refused, not offered; for a row that could not run: why
    distance: float | None = None
    note: str = ""

    def __str__(self) -> str:
        return self.verdict if self.distance is None else f"{self.verdict} ({self.distance:.1g})"


# the scene ------------------------------------------------------------------------------------------------------------


class TinyLayer(nn.Module):
    """A Linear with bias, a norm, and a Linear without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.norm = nn.LayerNorm(2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer."""
        return x + self.down(torch.tanh(self.norm(self.up(x))))


class TinyNet(nn.Module):
    """Embedding, two layers and a head; tied: one matrix for both ends, and layer 0 is used twice."""

    def __init__(self, tied: bool):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([TinyLayer(), TinyLayer()])
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.path = (0, 1, 0) if tied else (0, 1)
        if tied:
            self.lm_head.weight = self.embed.weight

    def loss(self, ids: Tensor) -> Tensor:
        """Return the loss of a batch."""
        x = self.embed(ids)  # [B, T, WIDTH]
        for index in self.path:
            x = self.layers[index](x)
        return F.cross_entropy(self.lm_head(x)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def batches(count: int) -> list[Tensor]:
    """Return random batches."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (2, TOKENS), generator=generator) for _ in range(count)]


def schedule(step: int) -> float:
    """Return the factor of the learning rate, which halves every step, so that a rate that does not change shows."""
    return 0.5**step


# the judge ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """A contestant and the judge's copy after some steps."""

    start: nn.Module
    theirs: nn.Module
    right: nn.Module
    norms: list[tuple[float | None, float]]  # reported, true

    def distance(self) -> float:
        """Relative distance of the two total updates."""
        return distance(self.start, self.theirs, self.right)

    def norm_error(self) -> float | None:
        """Worst relative error of the reported norms; None if a step reported none."""
        if any(reported is None for reported, _ in self.norms):
            return None
        return max(abs(reported - true) / true for reported, true in self.norms)


def make_net(kind: type[Contestant], tied: bool) -> nn.Module:
    """Return the model a contestant trains."""
    torch.manual_seed(0)
    return TinyNet(tied).to(kind.dtype)


def distance(start: nn.Module, theirs: nn.Module, right: nn.Module) -> float:
    """Return |theirs - right| / |right - start| over all parameters together, in fp64."""
    gap = total = 0.0
    for w0, w1, w2 in zip(start.parameters(), theirs.parameters(), right.parameters(), strict=True):
        w0, w1, w2 = (w.detach().double() for w in (w0, w1, w2))
        gap += float((w1 - w2).pow(2).sum())
        total += float((w2 - w0).pow(2).sum())
    return math.sqrt(gap / total) if math.isfinite(gap) else math.inf


def compare_runs(
    kind: type[Contestant], tied: bool = False, micro: int = 1, clip_norm: float | None = None, scheduled: bool = False
) -> Outcome:
    """Train contestant and copy for STEPS optimizer steps of ``micro`` micro-batches."""
    start = make_net(kind, tied)
    theirs, right = copy.deepcopy(start), copy.deepcopy(start)
    contestant, definition = kind(theirs, accumulate=micro, clip_norm=clip_norm), kind.define(right)
    schedulers = contestant.attach(schedule) if scheduled else []
    data, norms = batches(STEPS * micro), []
    for step in range(STEPS):
        ids = data[step * micro : (step + 1) * micro]
        scale = 1.0 if clip_norm is None or step % SPIKE else 20.0
        true = store_gradients(right, ids, contestant.trained(), clip_norm, scale)
        if clip_norm is not None and true <= clip_norm:
            raise BadScene(f"{kind.name}, step {step}: the gradient's norm {true:.2g} is not clipped at all")
        definition.step(LR * (schedule(step) if scheduled else 1.0))
        contestant.step([lambda ids=part, scale=scale: theirs.loss(ids) * scale for part in ids])
        norms.append((contestant.norm, true))
        for scheduler in schedulers:
            scheduler.step()
    return Outcome(start, theirs, right, norms)


def store_gradients(
    model: nn.Module, ids: Sequence[Tensor], trained: set[str], clip_norm: float | None, scale: float
) -> float:
    """Fill ``.grad`` with the clipped sum over micro-batches; returns the norm before clipping. Plain autograd only."""
    named = {name: param for name, param in model.named_parameters() if name in trained}
    grads = torch.autograd.grad(sum(model.loss(part) * scale for part in ids), list(named.values()))
    norm = math.sqrt(sum(float(grad.double().pow(2).sum()) for grad in grads))
    factor = 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))  # as clip_grad_norm_
    for param in model.parameters():
        param.grad = None
    for param, grad in zip(named.values(), grads, strict=True):
        param.grad = grad * factor
    return norm


def resume(kind: type[Contestant], order: str = "", factor: Callable[[int], float] = schedule) -> float:
    """Train half of the steps, restore new objects from what was saved, and return the distance to not stopping.

    Zero means the same bits. A scheduler is attached, and its state is saved too. It is created before the optimizer's
    state is loaded, as torch's documentation asks.
    """
    data, weights, saved = batches(STEPS), [], io.BytesIO()
    half = STEPS // 2
    start = make_net(kind, tied=False)
    for stops in (False, True):
        model = copy.deepcopy(start)
        contestant = kind(model)
        schedulers = contestant.attach(factor)
        for step, ids in enumerate(data):
            if stops and step == half:
                states = [model.state_dict(), contestant.state_dict(), [each.state_dict() for each in schedulers]]
                torch.save(states, saved)
                saved.seek(0)
                states = torch.load(saved, weights_only=False)
                model = copy.deepcopy(start)
                model.load_state_dict(states[0])
                contestant = kind(model)
                contestant.order = order
                schedulers = contestant.attach(factor)
                contestant.load_state_dict(states[1])
                for scheduler, state in zip(schedulers, states[2], strict=True):
                    scheduler.load_state_dict(state)
            contestant.step([lambda ids=ids, model=model: model.loss(ids)])
            for scheduler in schedulers:
                scheduler.step()
        weights.append(model)
    return distance(start, weights[1], weights[0])


def judge_resume(kind: type[Contestant]) -> Verdict:
    """Return the best result over the ways in which a user may write it.

    The note lists the others, and the effect of a constant learning rate.
    """
    figures, refusal = {}, ""
    for order in kind.orders:
        try:
            figures[order] = resume(kind, order)
        except Exception as error:
            refusal = refusal or message(error)
    ways = [f"{order}: {figure:.1g}" for order, figure in figures.items() if len(kind.orders) > 1]
    if not refusal and min(figures.values()) == 0.0:
        return Verdict("yes", 0.0, "; ".join(ways) if any(figures.values()) else kind.notes.get("resume", ""))
    if figures:
        best = min(figures, key=lambda order: figures[order])
        ways.append(f"with a constant learning rate: {resume(kind, best, lambda step: 1.0):.1g}")
    note = "; ".join(filter(None, [refusal, kind.notes.get("resume"), *ways]))
    return Verdict("refused", None, note) if refusal else Verdict("no", figures[best], note)


def judge(kind: type[Contestant], column: str) -> Verdict:
    """Return one cell."""
    note = kind.notes.get(column, "")
    missing = kind.missing(column)
    try:
        if column == "resume":
            return judge_resume(kind)
        figure = MEASURES[column](kind)
    except (OutOfDate, BadScene):
        raise
    except Exception as error:  # whatever a peer raises is its answer
        return Verdict("refused", None, "; ".join(filter(None, [message(error), note])))
    if figure is None:
        return Verdict("not offered", None, missing or "nothing is reported")
    if figure <= TOLERANCE[kind.dtype]:
        return Verdict("yes", figure, note)
    if missing is not None:
        return Verdict("not offered", figure, f"{missing}; the figure is what comes of doing without")
    return Verdict("no", figure, note)


MEASURES: dict[str, Callable[[type[Contestant]], float | None]] = {
    "accumulation": lambda kind: compare_runs(kind, micro=MICRO).distance(),
    "clipping": lambda kind: compare_runs(kind, clip_norm=CLIP_NORM).distance(),
    "norm": lambda kind: compare_runs(kind, clip_norm=CLIP_NORM).norm_error(),
    "ties": lambda kind: compare_runs(kind, tied=True).distance(),
    "scheduler": lambda kind: compare_runs(kind, scheduled=True).distance(),
}


def judge_all(kind: type[Contestant]) -> dict[str, Any]:
    """Return a contestant's cells, version and definition as a flat row."""
    result: dict[str, Any] = {"contestant": kind.name, "package": kind.package, "dtype": str(kind.dtype)[6:]}
    try:
        if kind.module is not None:
            kind.load()
        kind(make_net(kind, tied=False))
    except PeerUnavailable as error:
        return {**result, "unavailable": str(error)}
    except Exception as error:
        return {**result, "version": kind.version(), "unavailable": f"not run here ({message(error)})"}
    result |= {"version": kind.version(), "defined_by": kind.defined_by}
    result["note"] = kind.missing("") or kind.notes.get("", "")
    with warnings.catch_warnings():  # torch warns that the scheduler steps first if optimizer.step() is never called
        warnings.filterwarnings("ignore", message="(?s).*`lr_scheduler.step.*`optimizer.step")
        for column in COLUMNS:
            cell = judge(kind, column)
            result |= {column: cell.verdict, f"{column}_distance_ratio": cell.distance, f"{column}_note": cell.note}
    return result


# the table ------------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the table."""
    lines = []
    for each in rows:
        name = " ".join(filter(None, [each["contestant"], each.get("version") if each["package"] else None]))
        if "unavailable" in each:
            lines.append([name, each["unavailable"], *["-"] * (len(COLUMNS) - 1)])
        else:
            lines.append([name, *(str(Verdict(each[key], each[f"{key}_distance_ratio"])) for key in COLUMNS)])
    return ["", *COLUMNS.values()], lines


def short_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the README's table: verdicts without figures, a dash for what is not offered."""
    words = {"not offered": "–"}
    lines = [
        [each["contestant"], *(words.get(each.get(key, "–"), each.get(key, "–")) for key in COLUMNS)] for each in rows
    ]
    return ["", *(title.removesuffix("?") for title in COLUMNS.values())], lines


def notes(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return the notes of the cells as [contestant, column, note]."""
    lines = []
    for each in rows:
        if "defined_by" in each:
            against = f"judged against {each['defined_by']}, in {each['dtype']}"
            lines.append([each["contestant"], "all", "; ".join(filter(None, [against, each["note"]]))])
        for key, title in COLUMNS.items():
            if each.get(f"{key}_note"):
                lines.append([each["contestant"], title.rstrip("?"), each[f"{key}_note"]])
    return lines


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(CONTESTANTS), help=", ".join(CONTESTANTS))
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/correctness.json)")
    parser.add_argument("--page", type=Path, help="Markdown page to fill (default docs/correctness.md for a full run)")
    args = parser.parse_args()

    rows = []
    for name in args.only or CONTESTANTS:
        rows.append(judge_all(CONTESTANTS[name]))
    header, lines = table(rows)
    print_table(header, lines)
    print()
    for contestant, column, note in notes(rows):
        print(f"{contestant}, {column}: {note}")
    if args.only and not args.out:
        return  # a look: the published figures stay those of a full run
    written = write_result("correctness", rows, args.out)
    if page := args.page or (None if args.only else PAGE):
        fill_table(page, "correctness", header, lines)
        fill_table(page, "notes", ["", "column", "note"], notes(rows))
        if page == PAGE:
            fill_table(README, "correctness", *short_table(rows))
    print(f"\nwritten to {written.name}")


if __name__ == "__main__":
    main()
