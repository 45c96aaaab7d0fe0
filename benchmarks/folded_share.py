"""Which share of a model's parameters folds, and the largest gradient that is still written out.

Small models of many architectures (``architectures.py``) are folded and trained for two steps on real tensors; what
counts is what happened in these backwards. Fills docs/what_folds.md.

    OMP_NUM_THREADS=1 python -m benchmarks.folded_share
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gradfold

from .architectures import ARCHITECTURES, Loss
from .common import fill_table, print_table, write_result

PAGE = Path(__file__).parent.parent / "docs" / "what_folds.md"


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of models; all others keep no row, and no page is written")
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/folded_share.json)")
    parser.add_argument("--page", type=Path, default=PAGE, help="the Markdown page whose table is replaced")
    args = parser.parse_args()
    rows = []
    for kind, models in ARCHITECTURES.items():
        for name, (make, loss) in models.items():
            if not args.only or name in args.only:
                rows.append({"kind": kind, "model": name, **share(make, loss)})
    header, lines = table(rows)
    print_table(header, lines)
    if not args.only:
        fill_table(args.page, "table", header, lines)
        print(f"\nwritten to {write_result('folded_share', rows, args.out)} and {args.page.name}")


def share(make: Callable[[], nn.Module], loss: Loss) -> dict[str, Any]:
    """Train a folded model for two steps, and return what folded in them."""
    torch.manual_seed(0)
    with contextlib.redirect_stderr(io.StringIO()):
        model = make().train()
    optimizer = gradfold.AdamW(model.parameters(), lr=1e-4)
    fold = gradfold.fold(model, optimizer)
    for step in range(2):
        loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    used = [row for row in fold.report().rows if row.handed or row.dense]
    sizes = {row.name: row.weight_bytes for row in used}
    folded = {row.name for row in used if row.route == "folded"}
    name = max((name for name in sizes if name not in folded), key=lambda name: sizes[name], default="")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "folded_share": sum(sizes[name] for name in folded) / sum(sizes.values()),
        "largest_gradient": name,
        "largest_gradient_bytes": sizes.get(name, 0),
        "largest_weight_bytes": max(sizes.values()),
    }


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the lines of the table."""
    header = ["model", "parameters", "folded", "largest gradient written", "its KiB", "largest weight KiB"]
    lines = []
    for row in rows:
        lines.append(
            [
                row["model"],
                f"{row['parameters']:,}",
                f"{100 * row['folded_share']:.1f}%",
                f"`{row['largest_gradient']}`" if row["largest_gradient"] else "none",
                f"{row['largest_gradient_bytes'] / 1024:.1f}",
                f"{row['largest_weight_bytes'] / 1024:.1f}",
            ]
        )
    return header, lines


if __name__ == "__main__":
    main()
