"""Time of a training step whose weights and states stream, compared with the fold that has them on the device.

A Llama of 100.7 M parameters, fp32, AdamW. All models live in one process and take turns, in alternating order from
round to round. Here the device is memory too, so that every byte is copied as it would be for a GPU, by a thread of its
own; on disk, the file cache is warm after the first rounds. Reported: medians, median and quartiles of the ratios to
the first row within a round, how long the host has waited for copies, and what crossed the link.

    checkpointed     folded, each layer checkpointed: what streaming computes, without the copies
    folded           folded, nothing checkpointed
    streamed, cpu    Stream(offload="cpu")
    streamed, disk   Stream(offload="disk")

    OMP_NUM_THREADS=1 python -m benchmarks.stream_time --tokens 256 1024 --rounds 5
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch

import gradfold
from gradfold._options import StateFormat

from .common import (
    fold_plain_head,
    interleaved_ms,
    llama,
    llama_config,
    paired_figures,
    print_table,
    random_batch,
    write_result,
)

LR = 1e-5
WANTED = {1024: 1.25}  # of the checkpointed fold's time, by tokens
WAYS = ("checkpointed", "folded", "streamed, cpu", "streamed, disk")


def way(
    name: str, layers: int, tokens: int, states: StateFormat | None, folder: str
) -> tuple[Callable[[], None], gradfold.Fold]:
    """Return a function that takes one training step of a new model, and its fold."""
    config = llama_config(layers)
    config.use_cache = False
    model: Any = llama(config, torch.float32)
    optimizer = gradfold.AdamW(model.parameters(), lr=LR, states=states)
    options = {}
    if name == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif name == "streamed, cpu":
        options = {"stream": gradfold.Stream(offload="cpu")}
    elif name == "streamed, disk":
        options = {"stream": gradfold.Stream(offload="disk", folder=folder)}
    fold = fold_plain_head(model, optimizer, **options)
    batch = random_batch(config, tokens)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, fold


def main() -> None:
    """Time all ways, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="layers of the Llama; 12 are 100.7 M parameters")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024], help="tokens per step (256 1024)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (5)")
    parser.add_argument("--states", choices=get_args(StateFormat), help="of the optimizer (as torch)")
    parser.add_argument("--folder", type=Path, help="for the files of what streams from disk")
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/stream_time.json)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for tokens in args.tokens:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            made = [way(name, args.layers, tokens, args.states, folder) for name in WAYS]
            times = interleaved_ms([step for step, _ in made], args.rounds)
            traffics = [fold.traffic for _, fold in made]
            del made
            gc.collect()
        for name, each, traffic in zip(WAYS, times, traffics, strict=True):
            figures = paired_figures(times[0], each)
            rows.append(
                {
                    "way": name,
                    "layers": args.layers,
                    "tokens": tokens,
                    "states": args.states,
                    "wanted_ratio": WANTED.get(tokens) if traffic is not None else None,
                    "first_ms_median": figures.pop("torch_ms_median"),
                    "ms_median": figures.pop("folded_ms_median"),
                    **figures,
                    "waited_ms": None if traffic is None else 1e3 * traffic.seconds_waited,
                    "to_device_bytes": None if traffic is None else traffic.to_device,
                    "to_host_bytes": None if traffic is None else traffic.to_host,
                }
            )
    print_table(
        ["", "T", "ms", "ratio", "quartiles", "wanted", "waited ms", "MiB to device", "MiB to host"],
        [
            [
                row["way"],
                str(row["tokens"]),
                f"{row['ms_median']:.0f}",
                f"{row['ratio_median']:.3f}",
                f"{row['ratio_quartile_1']:.3f} {row['ratio_quartile_3']:.3f}",
                "" if row["wanted_ratio"] is None else f"<= {row['wanted_ratio']:.2f}",
                *(
                    ["", "", ""]
                    if row["waited_ms"] is None
                    else [
                        f"{row['waited_ms']:.0f}",
                        f"{row['to_device_bytes'] / 2**20:.0f}",
                        f"{row['to_host_bytes'] / 2**20:.0f}",
                    ]
                ),
            ]
            for row in rows
        ],
    )
    print(f"\nwritten to {write_result('stream_time', rows, args.out)}")


if __name__ == "__main__":
    main()
