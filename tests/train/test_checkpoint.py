"""Checkpoints: whole or not there, loadable anywhere, and exact."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gradfold.train.checkpoint import (
    STATES,
    TRAINER,
    list_checkpoints,
    read_checkpoint,
    restore_run,
)
from gradfold.train.recipe_groups import OPTIMIZER_SETTINGS
from tests.train.parts import Parts
from tests.train.tiny import recipe


def equal(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", OPTIMIZER_SETTINGS)
def test_states_come_back_to_the_bit(tokenizer, tmp_path, name):
    from transformers import AutoModelForCausalLM

    parts = Parts(tokenizer, tmp_path, name)
    path = parts.save()
    expected = parts.tensors()
    lr = parts.optimizer.param_groups[0]["lr"]

    other = Parts(tokenizer, tmp_path, name, steps=0)
    other.model.load_state_dict(AutoModelForCausalLM.from_pretrained(path).state_dict())
    if name not in ("SGD", "Muon"):  # which have no states, or not all, before the first step
        assert not equal(other.tensors(), expected)
    restore_run(read_checkpoint(path), other.model, other.optimizer, other.scheduler)
    assert equal(other.tensors(), expected)
    assert other.optimizer.param_groups[0]["lr"] == lr
    assert other.optimizer.state_dict()["param_groups"] == parts.optimizer.state_dict()["param_groups"]
    for both in (parts, other):  # the generators were restored last, so the other goes first
        torch.manual_seed(1)
        both.train(2)
    assert equal(other.tensors(), parts.tensors())


def test_random_numbers_go_on_where_they_were(parts):
    random.gauss(0, 1), np.random.standard_normal(), torch.rand(1)  # leave a second normal number waiting
    path = parts.save()

    def draw():
        return [random.gauss(0, 1), random.random(), *np.random.standard_normal(3), *torch.rand(3).tolist()]

    expected = draw()
    assert draw() != expected
    restore_run(read_checkpoint(path), parts.model, parts.optimizer, parts.scheduler)
    assert draw() == expected


def test_the_model_loads_in_plain_transformers(parts):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = parts.save()
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.randint(300, (2, 16))
    parts.model.eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, parts.model(ids).logits)
    loaded = AutoTokenizer.from_pretrained(path)
    assert loaded("the cat sat")["input_ids"] == parts.tokenizer("the cat sat")["input_ids"]
    assert loaded.chat_template == parts.tokenizer.chat_template


def test_states_are_named_by_their_parameter_and_hold_no_pickle(parts):
    path = parts.save()
    names = set(load_file(path / STATES))
    assert "model.layers.0.mlp.up_proj.weight/exp_avg" in names
    assert not [file.name for file in path.iterdir() if file.suffix in (".pt", ".pth", ".bin", ".pkl")]
    json.loads((path / TRAINER).read_text())


def test_the_last_k_stay(parts):
    for _ in range(4):
        parts.train(1)
        parts.save()
    assert [path.name for path in list_checkpoints(parts.folder)] == ["step-000006", "step-000007"]
    assert sorted(path.name for path in parts.folder.iterdir()) == ["step-000006", "step-000007"]


def test_one_may_be_kept(tokenizer, tmp_path):
    parts = Parts(tokenizer, tmp_path)
    parts.recipe = recipe(tmp_path, tmp_path, checkpoint__keep=1)
    for _ in range(3):
        parts.train(1)
        parts.save()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000006"]


def test_steps_sort_as_numbers(tmp_path):
    for step in (999_999, 1_000_000, 20):
        (tmp_path / f"step-{step:06d}").mkdir()
    (tmp_path / "step-x").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000020", "step-999999", "step-1000000"]
