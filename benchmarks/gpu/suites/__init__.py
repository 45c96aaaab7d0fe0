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

_STEP = ("layers", "parameters_b", "peak_gib", "reserved_gib", "step_ms", "host_ms")

# Shares are about the seconds that a suite is worth of a budget of 520.
SUITES = (
    Suite(
        "correctness",
        f"{_HERE}.correctness",
        "Every kernel and storage against fp64, against the reference's bits, against itself",
        ("checks", "error", "reference_error", "bits_differ", "repeats"),
        share=100,
        shards=14,
        judged=True,
    ),
    Suite(
        "hardware",
        f"{_HERE}.hardware",
        "What only a GPU runs: approximate instructions, prefetch, descriptors, several streams, a captured step",
        ("checks", "units", "limit_units", "error", "bits_differ"),
        share=30,
        shards=5,
        judged=True,
    ),
    Suite(
        "folded",
        f"{_HERE}.folded",
        "Small folded models against fp64 training, and torch's own",
        ("error", "reference_error", "norm_error"),
        share=30,
        shards=4,
        judged=True,
    ),
    Suite(
        "compiled",
        f"{_HERE}.compiled",
        "Compiling what is timed below, on all cores: registers, spills and shared memory as the driver counts them",
        ("compile_s", "registers", "spills", "shared_kib"),
        share=50,
        shards=14,
    ),
    Suite(
        "step",
        f"{_HERE}.step",
        "Whole training steps of the Llama-3.1-8B shape, bf16, batch 1 x 512",
        (*_STEP, "ratio", "ratio_quartiles", "loss", "backend"),
        share=130,
    ),
    Suite(
        "small",
        f"{_HERE}.small",
        "Whole training steps of small models, bf16, batch 1 x 512, without and with a CUDA graph",
        ("parameters_b", "step_ms", "base_step_ms", "host_ms", "base_host_ms", "ratio", "ratio_quartiles", "loss"),
        share=60,
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
        share=60,
    ),
    Suite(
        "memory",
        f"{_HERE}.memory",
        "Peak memory of a step: predicted on fake tensors, and measured",
        ("layers", "predicted_gib", "measured_gib", "ratio", "device"),
        share=25,
    ),
    Suite(
        "workset",
        f"{_HERE}.workset",
        "A working set of the Llama-2-7B shape: the highest peak of its steps, and their mean time",
        ("chunks", "tokens", "weights_gib", "peak_gib", "least_peak_gib", "paper_gib", "step_ms", "most_step_ms"),
        share=35,
    ),
    Suite(
        "graph",
        f"{_HERE}.graph",
        "The step of the Llama-3.1-8B shape as a CUDA graph, beside the same step without",
        (*_STEP, "eager_step_ms", "ratio", "loss"),
        share=30,
    ),
    Suite(
        "tuning",
        f"{_HERE}.tuning",
        "Other tiles than the table's, on scratch copies",
        ("shape", "candidate", "ours_ms", "table_ms", "ratio", "ratio_quartiles"),
        share=20,
        best=("shape", "ratio"),
    ),
)
