"""Shared by the benchmarks: the model, the optimizers that are compared, timing, the machine, and result files."""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import gradfold
from gradfold._machine import machine_facts

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Peer:
    """One rule: gradfold's optimizer, and torch's in its fastest variant that every device has."""

    gradfold: Callable[..., Any]
    torch: Callable[..., torch.optim.Optimizer]
    torch_options: dict[str, Any]

    def torch_optimizer(self, params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """Return torch's optimizer of this rule."""
        return self.torch(params, lr=lr, **self.torch_options)


PEERS = {
    "adamw": Peer(gradfold.AdamW, torch.optim.AdamW, {"fused": True}),
    "adam": Peer(gradfold.Adam, torch.optim.Adam, {"fused": True}),
    "sgd": Peer(gradfold.SGD, torch.optim.SGD, {"fused": True}),
    "adagrad": Peer(gradfold.Adagrad, torch.optim.Adagrad, {"fused": True}),
    "rmsprop": Peer(gradfold.RMSprop, torch.optim.RMSprop, {"foreach": True}),
    "nadam": Peer(gradfold.NAdam, torch.optim.NAdam, {"foreach": True}),
    "radam": Peer(gradfold.RAdam, torch.optim.RAdam, {"foreach": True}),
}


def llama_config(
    layers: int = 12,
    tied: bool = False,
    *,
    hidden: int = 768,
    intermediate: int = 2048,
    vocabulary: int = 10_240,
    heads: int = 12,
    kv_heads: int | None = None,
    max_positions: int = 2048,
) -> Any:
    """The ``LlamaConfig`` of every benchmark; by default 100.7 M parameters.

    Those are 12 untied layers: 84.9 M in the layers, 7.9 M each in embedding and head.

    Args:
        layers: Decoder layers.
        tied: Whether the head shares the embedding's weight.
        hidden: Width of the model.
        intermediate: Width of the MLP.
        vocabulary: Rows of embedding and head.
        heads: Attention heads.
        kv_heads: Key and value heads; None for as many as ``heads``.
        max_positions: Longest sequence.
    """
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        use_cache=False,
    )


def llama(config: Any, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """Return the model in training mode with random weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def fold_plain_head(model: nn.Module, optimizer: Any, **options: Any) -> gradfold.Fold:
    """Fold a model but leave its loss head as transformers has it.

    Figures compare optimizers, so all models have the same head; ``head.py`` measures what a folded head saves.
    """
    return gradfold.fold(model, optimizer, head="plain", **options)


def random_batch(config: Any, tokens: int) -> dict[str, torch.Tensor]:
    """Return one sequence ``[1, tokens]`` that is its own labels."""
    ids = torch.randint(0, config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def wall_ms(step: Callable[[], Any]) -> float:
    """Return the wall-clock time of one call in milliseconds."""
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def interleaved_ms(
    steps: Sequence[Callable[[], Any]],
    rounds: int,
    warm_up: int = 2,
    timed: Callable[[Callable[[], Any]], float] = wall_ms,
) -> list[list[float]]:
    """Time every step once per round, in alternating order.

    Disturbances of the machine then hit all of them alike; take ratios within a round.

    Args:
        steps: The functions to time.
        rounds: Timed rounds.
        warm_up: Untimed rounds before.
        timed: Runs a step and returns its milliseconds.

    Returns:
        For each step, its times in milliseconds, one per round.
    """
    times: list[list[float]] = [[] for _ in steps]
    gc.collect()
    gc.disable()
    try:
        for number in range(-warm_up, rounds):
            turned = range(len(steps)) if number % 2 else reversed(range(len(steps)))
            for index in turned:
                elapsed_ms = timed(steps[index])
                if number >= 0:
                    times[index].append(elapsed_ms)
    finally:
        gc.enable()
    return times


def paired_figures(torch_ms: Sequence[float], folded_ms: Sequence[float]) -> dict[str, Any]:
    """Return both medians, and median and quartiles of the ratios folded / torch, pair by pair."""
    ratios = [f / t for f, t in zip(folded_ms, torch_ms, strict=True)]
    first, median, third = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "torch_ms_median": statistics.median(torch_ms),
        "folded_ms_median": statistics.median(folded_ms),
        "ratio_median": median,
        "ratio_quartile_1": first,
        "ratio_quartile_3": third,
        "ratios": [round(r, 4) for r in ratios],
    }


def machine() -> dict[str, Any]:
    """Return processor, threads and versions."""
    return {
        **machine_facts(),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "malloc": {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")},
    }


def command_line() -> str:
    """Return the command that repeats this run from the root of the repository."""
    threads = os.environ.get("OMP_NUM_THREADS")
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # set by `python -m`
    module = spec.name.removesuffix(".__main__") if spec else f"benchmarks.{Path(sys.argv[0]).stem}"
    words = [f"OMP_NUM_THREADS={threads}"] if threads else []
    told = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]  # no path of a machine
    return " ".join([*words, "python", "-m", module, *map(shlex.quote, told)])


def revision() -> str | None:
    """Return the checked-out commit, followed by ``-dirty`` if files differ from it; None outside git."""
    words = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


class AllocatorBytes(NamedTuple):
    """What torch's allocator had handed out."""

    resting: int  # as the part that counts began
    peak: int  # the most during it


def allocator_bytes(profiled: Any, mark: str) -> AllocatorBytes:
    """Return what torch's allocator had handed out since ``record_function(mark)`` began, by its own events.

    Args:
        profiled: A finished ``torch.profiler.profile`` with ``profile_memory=True`` that saw every allocation.
        mark: The name of the part that counts.
    """
    events = profiled.profiler.kineto_results.events()
    begin = min(event.start_ns() for event in events if event.name() == mark)
    now = resting = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        if event.start_ns() >= begin:
            peak = max(peak, now)
        else:
            resting = now
    return AllocatorBytes(resting, peak)


def write_result(name: str, rows: list[dict[str, Any]], path: Path | None = None, **more: Any) -> Path:
    """Write rows with machine, command and revision to benchmarks/results/NAME.json.

    Args:
        name: Name of the benchmark.
        rows: Flat dicts with units in their keys.
        path: Another file to write to.
        **more: Further top-level entries.
    """
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "command": command_line(),
        "revision": revision(),
        "machine": machine(),
        **more,
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a result file; empty if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a plain table; the first column is text, the others are figures."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    for n, line in enumerate([header, *rows]):
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells))
        if n == 0:
            print("  ".join("-" * w for w in widths))


def fill_table(page: Path, name: str, header: list[str], rows: list[list[str]]) -> None:
    """Replace the Markdown table between ``<!-- NAME -->`` and ``<!-- end of NAME -->`` of a page."""
    fill_text(
        page, name, "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])
    )


def fill_text(page: Path, name: str, text: str) -> None:
    """Replace what is between ``<!-- NAME -->`` and ``<!-- end of NAME -->`` of a page."""
    old = page.read_text(encoding="utf-8")
    between = rf"(<!-- {name} -->\n).*?(\n<!-- end of {name} -->)"
    new, found = re.subn(between, lambda m: m[1] + text + m[2], old, flags=re.DOTALL)
    if not found:
        raise SystemExit(f"{page.name} has no <!-- {name} --> ... <!-- end of {name} -->")
    page.write_text(new, encoding="utf-8")
