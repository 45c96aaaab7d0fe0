"""The suites of a run, in their order. Imports no torch, so that the process which starts the others stays small."""

from __future__ import annotations

from typing import NamedTuple


class Suite(NamedTuple):
    """A module with ``cases(context)``: what it measures, most important first."""

    name: str
    module: str
    title: str
    columns: tuple[str, ...]  # of a row, in the report
    share: float = 1.0  # of the time that is left, beside those of the suites still to come
    shards: int = 1  # processes at once: one wherever times are taken
    judged: bool = False  # a row that fails, or that cannot be measured, fails the run
    best: tuple[str, str] | None = None  # also list the row of the smallest second figure for each of the first


_HERE = "benchmarks.gpu.suites"

SUITES = (
    Suite(
        "correctness",
        f"{_HERE}.correctness",
        "Every kernel against fp64, against the reference's bits, against itself",
        ("checks", "error", "reference_error", "bits_differ", "repeats"),
        share=1.5,
        shards=14,
        judged=True,
    ),
    Suite(
        "folded",
        f"{_HERE}.folded",
        "Small folded models against fp64 training, and torch's own",
        ("error", "reference_error", "norm_error"),
        share=0.5,
        shards=4,
        judged=True,
    ),
    Suite(
        "compiled",
        f"{_HERE}.compiled",
        "Compiling what is timed below, on all cores: registers, spills and shared memory as the driver counts them",
        ("compile_s", "registers", "spills", "shared_kib"),
        share=1.0,
        shards=14,
    ),
    Suite(
        "step",
        f"{_HERE}.step",
        "Whole training steps of the Llama-3.1-8B shape, bf16, batch 1 x 512",
        ("layers", "parameters_b", "peak_gib", "step_ms", "ratio", "ratio_quartiles", "loss", "backend"),
        share=2.5,
    ),
    Suite(
        "shapes",
        f"{_HERE}.shapes",
        "One folded step of Llama-3.1-8B's linear shapes, beside a library product and torch's fused AdamW",
        (
            "ours_ms",
            "ours_dw_ratio",
            "ours_separate_ratio",
            "ours_side_ratio",
            "ours_blocks_ratio",
            "ours_copy_ratio",
            "ours_gb_s",
            "ours_tflop_s",
        ),
        share=2.0,
    ),
    Suite(
        "tuning",
        f"{_HERE}.tuning",
        "Other tiles than the table's, on scratch copies",
        ("shape", "candidate", "ours_ms", "table_ms", "ratio", "ratio_quartiles"),
        share=1.0,
        best=("shape", "ratio"),
    ),
    Suite(
        "memory",
        f"{_HERE}.memory",
        "Peak memory of a step: predicted on fake tensors, and measured",
        ("layers", "predicted_gib", "measured_gib", "ratio", "device"),
        share=0.7,
    ),
)
