"""How far is the peak of a plan from what the CPU's allocator really hands out?

Each configuration is predicted on fake tensors for this processor. It is then trained for real in a process of its
own, under torch's profiler with ``profile_memory=True``. The measured peak is the largest sum of the allocator's
events (every allocation and release, also inside operators), starting before the model is built. gradfold's own meter
is not involved.

    OMP_NUM_THREADS=1 python -m benchmarks.plan_error            # about 3 minutes
    OMP_NUM_THREADS=1 python -m benchmarks.plan_error --only 0 4
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gradfold import WorkingSet
from gradfold.planner.bytes import format_bytes
from gradfold.planner.models import Subject
from gradfold.planner.predict import predict
from gradfold.planner.settings import Settings
from gradfold.planner.step import run_step
from gradfold.planner.workload import Workload, enable_checkpointing, trainable

from .common import allocator_bytes, llama_config, print_table, write_result

MIB = 2**20


def small_llama(tied: bool = False) -> Any:
    """17 M parameters in 6 layers, 8 M in embedding and head each."""
    return llama_config(6, tied, hidden=512, intermediate=1408, vocabulary=16_000, heads=8, kv_heads=4)


def gemma2() -> Any:
    """A small Gemma 2."""
    from transformers import Gemma2Config

    return Gemma2Config(
        vocab_size=16_000,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=7,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        use_cache=False,
    )


def qwen3() -> Any:
    """A small Qwen3."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=16_000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        use_cache=False,
    )


def gpt2() -> Any:
    """A small GPT-2."""
    from transformers import GPT2Config

    return GPT2Config(vocab_size=16_000, n_embd=512, n_layer=6, n_head=8, n_positions=1024, use_cache=False)


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One configuration to predict and to train."""

    model: str
    settings: Settings

    def subject(self) -> Subject:
        """The model to plan."""
        makers = {
            "llama": small_llama,
            "llama, tied": lambda: small_llama(tied=True),
            "gemma2": gemma2,
            "qwen3": qwen3,
            "gpt2": gpt2,
        }
        return Subject(self.model, config=makers[self.model]())


def configuration(model: str, **settings: Any) -> Configuration:
    """Add a configuration."""
    return Configuration(model, Settings(**({"tokens": 256, "batch": 2, "dtype": "float32"} | settings)))


CONFIGURATIONS = (
    configuration("llama"),
    configuration("llama", checkpointing=True),
    configuration("llama", states="int8"),
    configuration("llama", head="plain"),
    configuration("llama, tied", checkpointing=True, states="int8", dtype="bfloat16"),
    configuration("llama", working_set=WorkingSet(chunks=6), checkpointing=True),
    configuration("llama", working_set=WorkingSet(chunks=4), states="int8", head="plain"),
    configuration("gemma2", checkpointing=True),
    configuration("qwen3", states="int4", dtype="bfloat16", master="split8"),
    configuration("qwen3", accumulate=3, head="plain"),
    configuration("gpt2", clip_norm=1.0),
    configuration("gpt2", fold=False, head="plain"),
)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", help="indices of the configurations to run")
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/plan_error.json)")
    args = parser.parse_args()
    rows = []
    for number in args.only or range(len(CONFIGURATIONS)):
        one = CONFIGURATIONS[number]
        predicted = predict(one.subject(), one.settings, "cpu").memory.peak_bytes
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            measured = pool.submit(measured_peak_bytes, number).result()
        size = f"{one.settings.accumulate} x " if one.settings.accumulate > 1 else ""
        rows.append(
            {
                "case": number,
                "model": one.model,
                "settings": f"{one.settings.dtype}, {one.settings.describe()}",
                "tokens": f"{size}{one.settings.batch} x {one.settings.tokens}",
                "predicted_bytes": predicted,
                "measured_bytes": measured,
                "error": predicted / measured - 1,
            }
        )
        print(f"{number}: {rows[-1]['error']:+.2%}", flush=True)
    table = [
        [
            row["model"],
            row["settings"],
            row["tokens"],
            format_bytes(row["predicted_bytes"]),
            format_bytes(row["measured_bytes"]),
            f"{row['error']:+.2%}",
        ]
        for row in rows
    ]
    print_table(["model", "settings", "tokens", "predicted", "measured", "error"], table)
    print(f"\nlargest error {max(abs(row['error']) for row in rows):.2%}")
    if args.only is None or args.out:
        print(f"written to {write_result('plan_error', rows, args.out)}")


def measured_peak_bytes(number: int) -> int:
    """Train one configuration for real; return the allocator's peak, weights included."""
    torch.set_num_threads(1)
    one = CONFIGURATIONS[number]
    workload, settings = Workload(one.subject(), one.settings, "cpu"), one.settings
    batch = workload.batch()
    batch = {name: torch.randint(0, 1000, ids.shape) for name, ids in batch.items()}
    batch["labels"] = batch["input_ids"]
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        model = workload.subject.build(settings.torch_dtype(None), None)
        if settings.checkpointing:
            enable_checkpointing(model)
        turns = settings.working_set and dataclasses.replace(settings.working_set, interval=1)
        optimizer = settings.make_optimizer(trainable(model))
        fold = settings.make_fold(model, optimizer, turns) if settings.fold else None
        chunks = 1 if fold is None or fold.working_set is None else fold.working_set.chunks
        for _ in range(chunks):  # until every chunk has had its turn, and every state is there
            run_step(model, optimizer, batch, fold, micro_batches=settings.accumulate)
        gc.collect()
        with torch.profiler.record_function("measured steps"):
            for _ in range(chunks):
                run_step(model, optimizer, batch, fold, micro_batches=settings.accumulate)
    return allocator_bytes(profiled, "measured steps").peak


if __name__ == "__main__":
    main()
