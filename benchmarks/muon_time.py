"""How long one training step with Muon takes beside torch.optim.Muon and torch's fused AdamW.

Hidden matrices train with Muon, the rest with AdamW (``gradfold.muon_groups``), in models with equal weights side by
side, one for each method. A round times one whole step (forward, backward, step, zero_grad) of every one, the order
turned from round to round. Reported: the median of the ratios to torch's within a round, its quartiles, the median
times.

    torch    torch.optim.Muon and torch's fused AdamW after backward
    floor    forward and backward; every gradient is dropped as it arrives, nothing steps
    hooks    an optimizer per parameter, stepped by a hook when its gradient is complete
    folded   gradfold.fold(model, [muon, adamw])
    coded    the same with states stored as --states says (int8)

    OMP_NUM_THREADS=1 python -m benchmarks.muon_time
    OMP_NUM_THREADS=1 python -m benchmarks.muon_time --layers 1 --hidden 128 --rounds 2 --tokens 16    # a quick look

On CPUs without bf16 instructions most of torch's time is the orthogonalisation in scalar code; gradfold multiplies
large matrices in fp32 there (``backends/newton_schulz.py``). So directions of large matrices agree to a part in some
hundred, as bf16's do, and the last losses to a few digits. There a step of torch's on 100 M parameters takes tens of
minutes; ``--layers 1`` has the same matrices, and ``--methods folded`` leaves out the other slow one, hooks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import gradfold

from .common import (
    DTYPES,
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
from .step_time import Dropped, cpu_ms, figures, stepper, stored_bytes

METHODS = ("torch", "floor", "hooks", "folded", "coded")
LR, ADAMW_LR = 0.02, 3e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256, help="tokens per step (default 256)")
    parser.add_argument("--layers", type=int, default=12, help="layers of the Llama; 12 are 100.7 M parameters")
    parser.add_argument("--hidden", type=int, default=768, help="width, a multiple of 64 (default 768)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--methods", choices=METHODS[1:], nargs="+", default=METHODS[1:], help="beside torch")
    parser.add_argument("--states", choices=["bf16", "int8", "int4"], default="int8", help="of coded")
    parser.add_argument("--rounds", type=int, default=5, help="(default 5)")
    parser.add_argument("--warm-up", type=int, default=1, help="untimed rounds (default 1)")
    parser.add_argument("--cpu-time", action="store_true", help="the process's CPU time, for a machine that others use")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/muon_time.json)")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: quartiles need at least 2")
    torch.set_num_threads(args.threads)
    rows = compare(["torch", *(method for method in METHODS if method in args.methods)], args)
    print_rows(rows)
    print(f"written to {write_result('muon_time', rows, args.out)}")


def compare(methods: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows, a method each."""
    hidden = args.hidden
    config = llama_config(args.layers, hidden=hidden, intermediate=hidden * 8 // 3, heads=hidden // 64)
    batch = random_batch(config, args.tokens)
    models = [llama(config, DTYPES[args.dtype]) for _ in methods]
    optimizers = [optimizer_of(method, model, args.states) for method, model in zip(methods, models, strict=True)]
    steps = [Remembered(stepper(model, one, batch)) for model, one in zip(models, optimizers, strict=True)]
    times = interleaved_ms(steps, args.rounds, args.warm_up, cpu_ms if args.cpu_time else wall_ms)
    about = {
        "dtype": args.dtype,
        "tokens": args.tokens,
        "parameters": sum(p.numel() for p in models[0].parameters()),
        "rounds": args.rounds,
        "clock": "cpu" if args.cpu_time else "wall",
    }
    return [
        {
            **about,
            "method": method,
            "states": args.states if method == "coded" else None,
            "step_bytes": 2 * stored_bytes(optimizer),
            **figures(ms, times[0]),
            "last_loss": step.loss,
        }
        for method, optimizer, step, ms in zip(methods, optimizers, steps, times, strict=True)
    ]


class Remembered:
    """A training step that keeps the loss it began from: torch's take too long for one more."""

    def __init__(self, step: Callable[[], float]):
        self.step = step
        self.loss = 0.0

    def __call__(self) -> None:
        """Take it."""
        self.loss = self.step()


class Both:
    """Muon and AdamW in a loop written for one optimizer."""

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer):
        self.members = muon, adamw

    @property
    def state(self) -> dict[Any, Any]:
        """The states of both."""
        return {param: states for member in self.members for param, states in member.state.items()}

    def step(self) -> None:
        """Step both."""
        for member in self.members:
            member.step()

    def zero_grad(self) -> None:
        """Let go of the gradients of both."""
        for member in self.members:
            member.zero_grad()


def optimizer_of(method: str, model: torch.nn.Module, states: str) -> Any:
    """What steps the model, attached to it."""
    matrices, others = gradfold.muon_groups(model)
    if method == "torch":
        return Both(torch_muon([param for _, param in matrices]), torch_adamw([param for _, param in others]))
    if method == "floor":
        return Dropped(list(model.parameters()))
    if method == "hooks":
        hidden = {id(param) for _, param in matrices}
        return SteppedInHooks(
            list(model.parameters()),
            lambda params: torch_muon(params) if id(params[0]) in hidden else torch_adamw(params),
        )
    storage: dict[str, Any] = {"states": states} if method == "coded" else {}
    both = Both(gradfold.Muon(matrices, lr=LR, **storage), gradfold.AdamW(others, lr=ADAMW_LR, **storage))
    fold_plain_head(model, list(both.members))
    return both


def torch_muon(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """torch's Muon."""
    return torch.optim.Muon(params, lr=LR)


def torch_adamw(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """torch's fused AdamW."""
    return torch.optim.AdamW(params, lr=ADAMW_LR, fused=True)


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    first = rows[0]
    print(
        f"muon {first['dtype']}, {first['tokens']} tokens, {first['parameters'] / 1e6:.1f} M parameters, "
        f"{first['rounds']} rounds"
    )
    print_table(
        ["", "ms", "least", "ratio", "quartiles", "step MB", "last loss"],
        [
            [
                f"{row['method']} {row['states'] or ''}".strip(),
                f"{row['ms_median']:.0f}",
                f"{row['ms_least']:.0f}",
                f"{row['ratio_median']:.3f}",
                f"{row['ratio_quartile_1']:.3f} - {row['ratio_quartile_3']:.3f}",
                f"{row['step_bytes'] / 1e6:.0f}" if row["step_bytes"] else "-",
                f"{row['last_loss']:.4f}",
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
