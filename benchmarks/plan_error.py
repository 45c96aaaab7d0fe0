"""How far a plan's peak is from what the CPU's allocator hands out while the step is really taken.

Each configuration is predicted on fake tensors, for this processor. Then it is trained for real, in a process of its
own, under torch's profiler with `profile_memory=True`: the peak is the largest sum of the allocator's own events (every
allocation and release, inside operators too), from before the model is built. Nothing of gradfold's meter is involved.

    OMP_NUM_THREADS=1 python benchmarks/plan_error.py            # about 3 minutes
    OMP_NUM_THREADS=1 python benchmarks/plan_error.py --only 0 4
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

from common import print_table, write_result
from gradfold import WorkingSet
from gradfold.planner.bytes import format_bytes
from gradfold.planner.models import Subject
from gradfold.planner.predict import predict
from gradfold.planner.settings import Settings
from gradfold.planner.step import run_step
from gradfold.planner.workload import Workload, enable_checkpointing, trainable

MIB = 2**20


def llama(**changes: Any) -> Any:
    """17 M parameters in 6 layers, 8 M in embedding and head each."""
    from transformers import LlamaConfig

    sizes = {"vocab_size": 16_000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    return LlamaConfig(**(sizes | heads | changes), use_cache=False)


def gemma2() -> Any:
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
    from transformers import GPT2Config

    return GPT2Config(vocab_size=16_000, n_embd=512, n_layer=6, n_head=8, n_positions=1024, use_cache=False)


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    settings: Settings

    def subject(self) -> Subject:
        makers = {
            "llama": llama,
            "llama, tied": lambda: llama(tie_word_embeddings=True),
            "gemma2": gemma2,
            "qwen3": qwen3,
            "gpt2": gpt2,
        }
        return Subject(self.model, config=makers[self.model]())


def case(model: str, **settings: Any) -> Case:
    return Case(model, Settings(**({"tokens": 256, "batch": 2, "dtype": "float32"} | settings)))


CASES = (
    case("llama"),
    case("llama", checkpointing=True),
    case("llama", states="int8"),
    case("llama", head="plain"),
    case("llama, tied", checkpointing=True, states="int8", dtype="bfloat16"),
    case("llama", working_set=WorkingSet(interval=1, chunks=6), checkpointing=True),
    case("llama", working_set=WorkingSet(interval=1, chunks=4), states="int8", head="plain"),
    case("gemma2", checkpointing=True),
    case("qwen3", states="int4", dtype="bfloat16", master="split8"),
    case("qwen3", accumulate=3, head="plain"),
    case("gpt2", clip_norm=1.0),
    case("gpt2", fold=False, head="plain"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the cases to run")
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/plan_error.json)")
    args = parser.parse_args()
    rows = []
    for number in args.only or range(len(CASES)):
        one = CASES[number]
        predicted = predict(one.subject(), one.settings, "cpu").memory.peak_bytes
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            measured = pool.submit(allocator_peak_bytes, number).result()
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


def allocator_peak_bytes(number: int) -> int:
    """Train one case for real; the peak of what the allocator handed out, the model's weights included."""
    torch.set_num_threads(1)
    one = CASES[number]
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
    events = profiled.profiler.kineto_results.events()
    begin = min(event.start_ns() for event in events if event.name() == "measured steps")
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        if event.start_ns() >= begin:
            peak = max(peak, now)
    return peak


if __name__ == "__main__":
    main()
