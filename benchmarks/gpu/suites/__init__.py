"""The suites of a run, in their order. Imports no torch, so that the process which starts the others stays small."""

from __future__ import annotations

from typing import NamedTuple


class Suite(NamedTuple):
    """One suite: a module with ``cases(context)``.

    Attributes:
        name: Name on the command line.
        module: The module.
        title: Title in the report.
        columns: Columns of its table in the report.
        share: Share of the time that is left, relative to the suites still to come.
        shards: Number of processes at once; 1 if times are taken.
        judged: Whether a failed row, or one that cannot be measured, fails the run.
        best: (column, figure): also list the row with the smallest figure for each value of the column.
    """

    name: str
    module: str
    title: str
    columns: tuple[str, ...]
    share: float = 1.0
    shards: int = 1
    judged: bool = False
    best: tuple[str, str] | None = None


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
