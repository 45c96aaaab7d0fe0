"""Peak live bytes of a whole training run in transformers' Trainer: plain, and folded by ``gradfold.hf.fold_trainer``.

Real tensors on the CPU, two optimizer steps, from before the optimizer is made. The aim of each folded run is the plain
one's peak minus the bytes of all gradients; "margin" says by how much it is below that (or, negative, above).

The model has a head of its own, or one tied to the embedding, as small Llamas have.

    python -m benchmarks.trainer_memory                  # ten minutes on a busy core; fills docs/in_your_trainer.md
    python -m benchmarks.trainer_memory --tokens 64 --accumulate 1
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch

import gradfold.hf
from gradfold.planner.trace import LiveBytes

from .common import fill_table, llama, llama_config, print_table, write_result

MIB = 2**20
HEADS = ("untied", "tied")
PAGE = Path(__file__).parents[1] / "docs" / "in_your_trainer.md"


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024], help="of a micro-batch")
    parser.add_argument("--accumulate", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--head", choices=HEADS, nargs="+", default=HEADS)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=16_000)
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/trainer_memory.json)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)

    rows = []
    for head, tokens, accumulate in itertools.product(args.head, args.tokens, args.accumulate):
        for limit in (0.0, 1.0):
            rows += compare(args, head, tokens, accumulate, limit)
    settings = ["head", "max_grad_norm", "accumulate", "tokens", "options"]
    header = [*settings, "plain", "minus gradients", "folded", "margin"]
    table = [
        [
            row["head"],
            f"{row['max_grad_norm']:g}",
            str(row["accumulate"]),
            str(row["tokens"]),
            row["options"],
            *(f"{row[key] / MIB:.1f}" for key in ("plain_peak_bytes", "aim_bytes", "folded_peak_bytes")),
            f"{(row['aim_bytes'] - row['folded_peak_bytes']) / MIB:+.1f}",
        ]
        for row in rows
    ]
    print_table(header, table)
    print(write_result("trainer_memory", rows, args.out))
    if args.out is None:
        fill_table(PAGE, "trainer_memory", header, table)


def compare(args: Any, head: str, tokens: int, accumulate: int, limit: float) -> list[dict[str, Any]]:
    """Run plain, and folded in each way that goes with these arguments."""
    plain, gradients = peak(args, head, tokens, accumulate, limit, None)
    ways: list[dict[str, Any]] = [{}]
    if accumulate == 1 and head == "untied":
        ways.append({"clip": "two_pass", "head_keep_bytes": 0} if limit else {"head_keep_bytes": 0})
    rows = []
    for options in ways:
        folded, _ = peak(args, head, tokens, accumulate, limit, options)
        rows.append(
            {
                "head": head,
                "tokens": tokens,
                "accumulate": accumulate,
                "max_grad_norm": limit,
                "options": ", ".join(f"{key}={value!r}" for key, value in options.items()),
                "parameters": gradients // 4,
                "gradient_bytes": gradients,
                "plain_peak_bytes": plain,
                "aim_bytes": plain - gradients,
                "folded_peak_bytes": folded,
            }
        )
    return rows


def peak(
    args: Any, head: str, tokens: int, accumulate: int, limit: float, fold: dict[str, Any] | None
) -> tuple[int, int]:
    """Return the peak of live bytes in one run, and the bytes of all gradients."""
    from transformers import Trainer, TrainingArguments

    config = llama_config(args.layers, head == "tied", hidden=args.hidden, intermediate=4 * args.hidden, heads=4,
                          vocabulary=args.vocabulary)  # fmt: skip
    model = llama(config, torch.float32)
    drawn = torch.randint(0, args.vocabulary, (2 * accumulate, tokens), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulate,
            max_grad_norm=limit,
            max_steps=2,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
            save_strategy="no",
            remove_unused_columns=False,
        )
        rows: Any = [{"input_ids": ids, "labels": ids} for ids in drawn]
        trainer: Any = Trainer(model, arguments, train_dataset=rows)
        if fold is not None:
            trainer = gradfold.hf.fold_trainer(trainer, **fold)
        with LiveBytes(timeline=False) as live:
            live.track(model)
            trainer.train()
    return live.peak_bytes, sum(p.numel() * p.element_size() for p in model.parameters())


if __name__ == "__main__":
    main()
