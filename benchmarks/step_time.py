"""How long one training step takes beside torch's fused optimizer, and what part of it is the optimizer's.

Models with equal weights train side by side, one for each method. A round times one whole step (forward, backward,
step, zero_grad) of every one, the order turned from round to round, so that what the machine does meanwhile hits all of
them. Reported: the median of the ratios to torch's fused optimizer within a round, its quartiles, the median times.

    torch    torch's fused optimizer after backward
    floor    forward and backward; every gradient is dropped as it arrives, nothing steps
    hooks    an optimizer per parameter, stepped by a hook when its gradient is complete
    folded   gradfold
    coded    gradfold with its states stored as --states, --rounding and --master say (int8, stochastic)

    OMP_NUM_THREADS=1 python -m benchmarks.step_time

A copy of 256 MiB is timed in every round, too. ``aim`` is the floor plus the time to read and write the weights and the
states (2 in the dtype of the weight; coded as they are stored) once at that copy's bytes per second.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .common import (
    DTYPES,
    PEERS,
    fold_plain_head,
    interleaved_ms,
    llama,
    llama_config,
    print_table,
    random_batch,
    wall_ms,
    write_result,
)
from .peers.hooks import SteppedInHooks

METHODS = ("torch", "floor", "hooks", "folded", "coded")
COPY_BYTES = 2**28
LR = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256], help="tokens per step (default 256)")
    parser.add_argument("--layers", type=int, default=12, help="layers of the Llama; 12 are 100.7 M parameters")
    parser.add_argument("--tied", action="store_true", help="tie the head to the embedding")
    parser.add_argument("--rule", choices=PEERS, nargs="+", default=["adamw"])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp32"])
    parser.add_argument("--methods", choices=METHODS[1:], nargs="+", default=METHODS[1:], help="beside torch")
    parser.add_argument("--states", choices=["fp32", "bf16", "int8", "int4"], default="int8", help="of coded")
    parser.add_argument("--rounding", choices=["nearest", "stochastic"], default="stochastic", help="of coded")
    parser.add_argument("--master", choices=["split8", "split16"], help="of coded")
    parser.add_argument("--rounds", type=int, default=21, help="(default 21)")
    parser.add_argument("--warm-up", type=int, default=2, help="untimed rounds (default 2)")
    parser.add_argument("--cpu-time", action="store_true", help="the process's CPU time, for a machine that others use")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/step_time.json)")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: quartiles need at least 2")
    torch.set_num_threads(args.threads)

    storage = {key: value for key in ("states", "rounding", "master") if (value := getattr(args, key))}
    methods = ["torch", *(method for method in METHODS if method in args.methods)]
    rows = []
    for dtype in args.dtype:
        for rule in args.rule:
            for tokens in args.tokens:
                made = compare(methods, rule, dtype, tokens, storage, args)
                print_rows(made)
                rows += made
    print(f"written to {write_result('step_time', rows, args.out)}")


def compare(
    methods: Sequence[str], rule: str, dtype: str, tokens: int, storage: dict[str, str], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of one rule in one dtype at one number of tokens, a method each."""
    config = llama_config(args.layers, args.tied)
    batch = random_batch(config, tokens)
    models = [llama(config, DTYPES[dtype]) for _ in methods]
    optimizers = [optimizer_of(method, model, rule, storage) for method, model in zip(methods, models, strict=True)]
    steps = [stepper(model, optimizer, batch) for model, optimizer in zip(models, optimizers, strict=True)]
    source = torch.ones(COPY_BYTES // 4)
    target = torch.ones_like(source)
    timed = cpu_ms if args.cpu_time else wall_ms
    times = interleaved_ms([*steps, lambda: target.copy_(source)], args.rounds, args.warm_up, timed)

    about = {
        "rule": rule,
        "dtype": dtype,
        "tokens": tokens,
        "parameters": sum(p.numel() for p in models[0].parameters()),
        "rounds": args.rounds,
        "clock": "cpu" if args.cpu_time else "wall",
    }
    rows = []
    for method, optimizer, step, ms in zip(methods, optimizers, steps, times, strict=False):
        row = {**about, "method": method, "storage": storage if method == "coded" else {}}
        row |= {"step_bytes": 2 * stored_bytes(optimizer), **figures(ms, times[0]), "loss_after": step()}
        rows.append(row)
    copy_ms = statistics.median(times[-1])
    for row in rows:
        row["copy_bytes_per_s"] = 1e3 * 2 * COPY_BYTES / copy_ms
        if "floor" in methods and row["step_bytes"]:
            step_ms = 1e3 * row["step_bytes"] / row["copy_bytes_per_s"]
            floor_ms = statistics.median(times[methods.index("floor")])
            row["aim_ratio"] = (floor_ms + step_ms) / rows[0]["ms_median"]
    return rows


class Dropped:
    """No optimizer: gradients are dropped as they arrive."""

    state: dict = {}  # noqa: RUF012
    param_groups: list = []  # noqa: RUF012

    def __init__(self, params):
        for param in params:
            param.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def step(self) -> None: ...

    def zero_grad(self) -> None: ...


def optimizer_of(method: str, model: torch.nn.Module, rule: str, storage: dict[str, str]) -> Any:
    """What steps the model, attached to it."""
    peer, params = PEERS[rule], list(model.parameters())
    if method == "torch":
        return peer.torch_optimizer(params, LR)
    if method == "floor":
        return Dropped(params)
    if method == "hooks":
        return SteppedInHooks(params, lambda one: peer.torch_optimizer(one, LR))
    optimizer = peer.gradfold(params, lr=LR, **(storage if method == "coded" else {}))
    fold_plain_head(model, optimizer)
    return optimizer


def stored_bytes(optimizer: Any) -> int:
    """Of the parameters that have states, and of the states."""
    return sum(param.nbytes + tensor_bytes(state) for param, state in optimizer.state.items())


def tensor_bytes(state: Any) -> int:
    """Of all tensors in a state, however deep."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    return sum(map(tensor_bytes, state.values())) if isinstance(state, dict) else 0


def stepper(model: torch.nn.Module, optimizer: Any, batch: dict) -> Callable[[], float]:
    """A function that does one training step and gives the loss from before it."""

    def step() -> float:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def cpu_ms(step: Callable[[], Any]) -> float:
    """One call, in CPU time of the process."""
    start = time.process_time()
    step()
    return 1e3 * (time.process_time() - start)


def figures(ms: Sequence[float], torch_ms: Sequence[float]) -> dict[str, Any]:
    """The median time, and the median and quartiles of the ratios to torch's, round by round."""
    ratios = [mine / theirs for mine, theirs in zip(ms, torch_ms, strict=True)]
    first, median, third = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "ms_median": statistics.median(ms),
        "ms_least": min(ms),
        "ratio_median": median,
        "ratio_quartile_1": first,
        "ratio_quartile_3": third,
        "ratios": [round(r, 4) for r in ratios],
    }


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    first = rows[0]
    print(
        f"{first['rule']} {first['dtype']}, {first['tokens']} tokens, {first['parameters'] / 1e6:.1f} M parameters, "
        f"{first['rounds']} rounds, copy {first['copy_bytes_per_s'] / 1e9:.1f} GB/s (read and written)"
    )
    print_table(
        ["", "ms", "least", "ratio", "quartiles", "aim", "step MB", "loss after"],
        [
            [
                " ".join([row["method"], *row["storage"].values()]),
                f"{row['ms_median']:.0f}",
                f"{row['ms_least']:.0f}",
                f"{row['ratio_median']:.3f}",
                f"{row['ratio_quartile_1']:.3f} - {row['ratio_quartile_3']:.3f}",
                f"{row['aim_ratio']:.3f}" if "aim_ratio" in row else "-",
                f"{row['step_bytes'] / 1e6:.0f}" if row["step_bytes"] else "-",
                f"{row['loss_after']:.4f}",
            ]
            for row in rows
        ],
    )
    print(flush=True)


if __name__ == "__main__":
    main()
