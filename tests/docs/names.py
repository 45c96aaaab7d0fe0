"""The names that the blocks of the docs and the examples of docstrings may use, as small as they can be."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfold
from tests.llama import small_llama


class Names(dict):
    """A namespace that makes each of the names below when it is first read."""

    @classmethod
    def of_page(cls, page):
        """The names of one page of docs/."""
        return cls(OF_PAGE.get(page, dict)())

    def __missing__(self, name):
        make = MAKERS.get(name)
        if make is None:
            raise KeyError(name)
        self[name] = made = make(self)
        return made


def causal_model(dtype=torch.float32, layers=1):
    """A Llama of a few thousand parameters."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = small_llama(64, 16, layers, attention_dropout=0.0, use_cache=False)
    return LlamaForCausalLM(config).to(dtype)


def batches(count=4):
    """Batches of token ids, which are their labels, too."""
    torch.manual_seed(1)
    return [dict.fromkeys(("input_ids", "labels"), torch.randint(64, (2, 8))) for _ in range(count)]


MAKERS = {
    "model": lambda names: causal_model(names.get("dtype", torch.float32)),
    "loader": lambda names: batches(),
    "batch": lambda names: names["loader"][0],
    "optimizer": lambda names: gradfold.AdamW(names["model"].parameters(), lr=1e-3),
    "fold": lambda names: gradfold.fold(names["model"], names["optimizer"]),
    "input_ids": lambda names: names["batch"]["input_ids"],
    "evaluate": lambda names: lambda model: model(**names["batch"]).loss.item(),
    "Accelerator": lambda names: pytest.importorskip("accelerate").Accelerator,
    "torch": lambda names: torch,
    "nn": lambda names: nn,
    "F": lambda names: F,
    "gradfold": lambda names: gradfold,
}


def experts():
    """A mixture of experts in a folder, as transformers saves it."""
    from transformers import AutoModelForCausalLM

    from tests.moe import mixtral

    mixtral("grouped_mm").save_pretrained("tiny-mixtral")
    return {"AutoModelForCausalLM": AutoModelForCausalLM, "name": "tiny-mixtral"}


OF_PAGE = {"bytes_per_parameter.md": lambda: {"dtype": torch.bfloat16}, "experts.md": experts}
"""Page -> makes what it takes for granted beside the names above."""
