"""The picture the README opens with: Llama-3.1-8B's memory over one step, plain AdamW above, folded below.

Runs the real step code on fake tensors: no weights, no GPU, about two minutes.

    python benchmarks/picture.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import LlamaConfig

import gradfold
from common import RESULTS, fold_plain_head, llama
from gradfold.backends import gemm
from gradfold.plan.plot import draw_step_memory
from gradfold.plan.step import step_memory

LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("docs/images/step_memory.png"))
    args = parser.parse_args()
    gemm._native = lambda dtype: True  # predict for a device that multiplies bf16 itself, whatever runs this
    ids = torch.zeros(1, args.tokens, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}

    def build() -> torch.nn.Module:
        return llama(LLAMA_8B, torch.bfloat16)

    plain = step_memory(
        build, lambda p: torch.optim.AdamW(p, lr=1e-5, fused=True), batch, fold=False, label="plain AdamW"
    )
    folded = step_memory(
        build, lambda p: gradfold.AdamW(p, lr=1e-5), batch, fold=fold_plain_head, label="gradfold.AdamW, folded"
    )
    title = f"Llama-3.1-8B, bf16 weights and states, {args.tokens} tokens: one training step"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw_step_memory(plain, folded, args.out, title=title)
    figures = {"tokens": args.tokens, "plain": plain.as_dict(), "folded": folded.as_dict()}
    (RESULTS / "llama_8b_memory.json").write_text(json.dumps(figures, indent=1) + "\n")
    for step in (plain, folded):
        print(f"{step.label:24} peak {step.peak_bytes / 2**30:6.2f} GiB in {step.peak_phase}")


if __name__ == "__main__":
    main()
