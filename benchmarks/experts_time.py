"""How long one training step of a small mixture of experts takes beside torch's fused AdamW.

Models with equal weights train side by side, one for each method, with the same experts implementation of transformers.
A round times one whole step (forward, backward, step, zero_grad) of every one, the order turned from round to round.
Reported: the median of the ratios to torch's fused optimizer within a round, its quartiles, the median times.

    torch    torch's fused AdamW after backward
    hooks    an optimizer per parameter, stepped by a hook when its gradient is complete
    folded   gradfold
    coded    gradfold with its states in int8, rounded at random

    OMP_NUM_THREADS=1 python -m benchmarks.experts_time
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from .common import DTYPES, interleaved_ms, print_table, random_batch, wall_ms, write_result
from .step_time import cpu_ms, figures, optimizer_of, stepper

METHODS = ("torch", "hooks", "folded", "coded")
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
STORAGE = {"states": "int8", "rounding": "stochastic"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256], help="tokens per step (default 256)")
    parser.add_argument("--experts", type=int, default=8, help="experts of a layer (default 8)")
    parser.add_argument("--top-k", type=int, default=2, help="experts of a token (default 2)")
    parser.add_argument("--hidden", type=int, default=512, help="width of the model (default 512)")
    parser.add_argument("--layers", type=int, default=4, help="(default 4)")
    parser.add_argument("--how", choices=IMPLEMENTATIONS, nargs="+", default=["eager", "grouped_mm"])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp32"])
    parser.add_argument("--methods", choices=METHODS[1:], nargs="+", default=["hooks", "folded"], help="beside torch")
    parser.add_argument("--rounds", type=int, default=21, help="(default 21)")
    parser.add_argument("--warm-up", type=int, default=2, help="untimed rounds (default 2)")
    parser.add_argument("--cpu-time", action="store_true", help="the process's CPU time, for a machine that others use")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/experts_time.json)")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: quartiles need at least 2")
    torch.set_num_threads(args.threads)

    rows = []
    for how in args.how:
        for dtype in args.dtype:
            for tokens in args.tokens:
                made = compare(how, dtype, tokens, args)
                print_rows(made)
                rows += made
    print(f"written to {write_result('experts_time', rows, args.out)}")


def compare(how: str, dtype: str, tokens: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one experts implementation, a method each."""
    methods = ["torch", *(method for method in METHODS if method in args.methods)]
    config = mixtral_config(args)
    batch = random_batch(config, tokens)
    models = [mixtral(config, how, DTYPES[dtype]) for _ in methods]
    optimizers = [optimizer_of(method, model, "adamw", STORAGE) for method, model in zip(methods, models, strict=True)]
    steps = [stepper(model, optimizer, batch) for model, optimizer in zip(models, optimizers, strict=True)]
    times = interleaved_ms(steps, args.rounds, args.warm_up, cpu_ms if args.cpu_time else wall_ms)
    about = {
        "how": how,
        "dtype": dtype,
        "tokens": tokens,
        "experts": args.experts,
        "top_k": args.top_k,
        "parameters": sum(p.numel() for p in models[0].parameters()),
        "rounds": args.rounds,
        "clock": "cpu" if args.cpu_time else "wall",
    }
    return [
        {**about, "method": method, **figures(ms, times[0]), "loss_after": step()}
        for method, step, ms in zip(methods, steps, times, strict=True)
    ]


def mixtral_config(args: argparse.Namespace) -> Any:
    """A Mixtral of these sizes."""
    from transformers import MixtralConfig

    return MixtralConfig(
        vocab_size=4096,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_local_experts=args.experts,
        num_experts_per_tok=args.top_k,
        use_cache=False,
    )


def mixtral(config: Any, how: str, dtype: torch.dtype) -> torch.nn.Module:
    """The same model for every method."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation=how).train()


def print_rows(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    print(
        f"{first['how']}, {first['dtype']}, {first['tokens']} tokens, {first['experts']} experts, "
        f"{first['parameters'] / 1e6:.1f} M parameters, {first['rounds']} rounds"
    )
    print_table(
        ["", "ms", "ratio", "quartiles", "loss after"],
        [
            [
                row["method"],
                f"{row['ms_median']:.1f}",
                f"{row['ratio_median']:.3f}",
                f"{row['ratio_quartile_1']:.3f} - {row['ratio_quartile_3']:.3f}",
                f"{row['loss_after']:.4f}",
            ]
            for row in rows
        ],
    )
    print(flush=True)


if __name__ == "__main__":
    main()
