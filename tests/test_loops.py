"""The blocks of docs/loops.md: each runs folded and with plain torch, and ends with the same weights."""

import contextlib
import functools
import re
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import gradfold
from tests.zoo import distance

PAGE = Path(__file__).parents[1] / "docs" / "loops.md"
HEADING_OR_BLOCK = re.compile(r"^(#+ .*?)$|^```python *(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks():
    """The setup, and each other block by the heading that it stands under."""
    heading, setup, found = "", "", {}
    for title, kind, code in HEADING_OR_BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if title:
            heading = title.lstrip("# ")
        elif kind == "setup":
            setup = code
        else:
            count = sum(key.startswith(heading) for key in found)
            found[f"{heading} {count + 1}"] = code
    return setup, found


SETUP, SNIPPETS = blocks()


class PlainFold:
    """What ``gradfold.fold`` is to plain torch: contexts that do nothing."""

    def __init__(self, model, optimizer, **options):
        self.paused = self.accumulating = contextlib.nullcontext
        self.clip_grad_norm_ = functools.partial(nn.utils.clip_grad_norm_, list(model.parameters()))


def run(code, module):
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    names = {}
    try:
        exec(compile(SETUP, "setup", "exec"), names)
        names["gradfold"] = module
        exec(compile(code, "block", "exec"), names)
    finally:
        torch.set_default_dtype(before)
    return nn.ModuleDict({name: value for name, value in names.items() if isinstance(value, nn.Module)})


@pytest.mark.parametrize("name", SNIPPETS)
def test_a_block_ends_with_torchs_weights(name):
    plain = types.SimpleNamespace(AdamW=torch.optim.AdamW, SGD=torch.optim.SGD, fold=PlainFold)
    folded, expected = run(SNIPPETS[name], gradfold), run(SNIPPETS[name], plain)
    assert expected.keys() == folded.keys() and len(list(expected.parameters())) > 0
    assert distance(folded, expected) <= 1e-12


def test_the_page_has_a_block_for_each_loop_it_names():
    assert len(SNIPPETS) >= 12
    assert {"SAM 1", "Averages of weights 1", "Two optimizers 1", "An input buffer that is filled again 1"} <= set(
        SNIPPETS
    )
