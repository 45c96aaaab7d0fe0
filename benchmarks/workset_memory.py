"""Peak live bytes on the device over a round of a working set, from the real steps on fake tensors.

Llama-2-7B's shape in bf16, gradient checkpointing, and AdamW with fp32 states that are in host memory while their
slices are inactive. Samples some turns of one round, the first and the last included: of each its last step, in which
the next chunk's states are fetched, and the change of chunks after it. States in host memory are not counted; those on
their way back are.

    python -m benchmarks.workset_memory                      # about 10 minutes
    python -m benchmarks.workset_memory --turns 3 --batch 1
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gradfold
from gradfold.planner.fake import SkipWrites
from gradfold.planner.fake_host import FakeHost
from gradfold.planner.trace import LiveBytes

from .common import fold_plain_head, llama_config, print_table, write_result

GIB = 2**30


def llama_2_7b() -> Any:
    """Return the config of Llama-2-7B's shape."""
    return llama_config(32, hidden=4096, intermediate=11_008, vocabulary=32_000, heads=32, max_positions=4096)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=128)
    parser.add_argument("--turns", type=int, default=5, help="number of turns that are sampled from one round")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prefetch", type=int, choices=[0, 1], nargs="+", default=[1])
    parser.add_argument("--states", default="fp32")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/workset_memory.json)")
    args = parser.parse_args()

    rows = []
    for batch in args.batch:
        for prefetch in args.prefetch:
            rows.append(measure_round(args, batch, prefetch))
            print(rows[-1], flush=True)
    table = [
        [
            f"batch {row['batch']}, K = {row['chunks']}, prefetch {row['prefetch']}",
            *(f"{row[key] / GIB:.2f}" for key in ("weights_bytes", "most_peak_bytes", "least_peak_bytes")),
            f"{row['floor_bytes'] / GIB:.2f}",
        ]
        for row in rows
    ]
    print_table(["", "weights GiB", "highest peak", "lowest peak", "no states"], table)
    print(f"\nwritten to {write_result('workset_memory', rows, args.out)}")


def measure_round(args: argparse.Namespace, batch: int, prefetch: int) -> dict[str, Any]:
    """Return one row: peaks over the sampled turns."""
    from transformers import AutoModelForCausalLM

    config = llama_2_7b()
    config.num_hidden_layers = args.layers
    started = time.perf_counter()
    with FakeTensorMode(allow_non_fake_inputs=True), SkipWrites():
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = AutoModelForCausalLM.from_config(config).train()
        finally:
            torch.set_default_dtype(before)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.zeros(batch, args.tokens, dtype=torch.int64)
        optimizer = gradfold.AdamW(model.parameters(), lr=1e-5, states=args.states, rounding="stochastic")
        store = FakeHost()
        working_set = gradfold.WorkingSet(interval=1, chunks=args.chunks, offload=store, prefetch=prefetch)
        fold = fold_plain_head(model, optimizer, working_set=working_set)
        rotation = fold._state.turns
        weights = {p.untyped_storage()._cdata: p.numel() * p.element_size() for p in model.parameters()}
        peaks, states = {}, {}
        turns = sorted({round(i * (args.chunks - 1) / max(1, args.turns - 1)) for i in range(args.turns)})
        for turn in turns:
            rotation.schedule.next = turn  # jump there
            step(model, optimizer, ids)
            with LiveBytes(timeline=False) as live:
                store.meter = live
                live.track(model, optimizer, ids)
                live.track(fold.scratch_tensors(), category="scratch")
                states[turn] = sum(
                    t.numel() * t.element_size() for held in optimizer.state.values() for t in held.values()
                )
                # a turn's states exist already when it comes round again
                rotation.schedule.next = (turn + 1) % args.chunks
                step(model, optimizer, ids)
                peaks[turn] = live.peak_bytes
                where = f"{live.peak_op}"
                store.meter = None
            print(f"  turn {turn}: {peaks[turn] / GIB:.3f} GiB at {where}, states {states[turn] / GIB:.3f}", flush=True)
    return {
        "batch": batch,
        "tokens": args.tokens,
        "chunks": args.chunks,
        "prefetch": prefetch,
        "states": args.states,
        "weights_bytes": sum(weights.values()),
        "most_peak_bytes": max(peaks.values()),
        "least_peak_bytes": min(peaks.values()),
        "floor_bytes": max(peaks[turn] - states[turn] for turn in turns),
        "chunk_state_bytes": max(states.values()),
        "peak_bytes_by_turn": peaks,
        "seconds": time.perf_counter() - started,
    }


def step(model: torch.nn.Module, optimizer: Any, ids: Tensor) -> None:
    """Take one training step."""
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    main()
