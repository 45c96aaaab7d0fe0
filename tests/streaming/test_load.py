"""A checkpoint goes into a stream's files a tensor at a time."""

import re

import pytest
import torch

import gradfold
from gradfold import FoldError, Stream
from gradfold.streaming.host import is_mapped

from .scenes import MODELS, distance, loss_of, made, train

NAMES = ["llama", "llama, tied", "gpt2"]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_load(name, sharded, tmp_path):
    """Weights and configuration are the checkpoint's, and lie in files; training goes on as from memory."""
    model = made(name, torch.float32, seed=3)
    model.save_pretrained(tmp_path / "saved", **({"max_shard_size": "8KB"} if sharded else {}))
    stream = Stream(offload="disk", folder=tmp_path / "scratch")
    loaded = gradfold.hf.load_streamed(tmp_path / "saved", stream)
    assert distance(model, loaded) == 0
    assert not loaded.training
    assert all(is_mapped(param) for param in loaded.parameters())
    assert not list((tmp_path / "scratch").iterdir())  # its files have no names
    optimizer = gradfold.AdamW(loaded.parameters(), lr=1e-2)
    fold = gradfold.fold(loaded, optimizer, stream=stream)
    homes = fold._state.streamer.blocks[0].home
    assert all(is_mapped(home) for home in homes.values())
    theirs = gradfold.AdamW(model.parameters(), lr=1e-2)
    other = gradfold.fold(model, theirs)
    train(loaded, optimizer, range(3), fold)
    train(model, theirs, range(3), other)
    assert distance(model, loaded) == 0


def test_dtype_and_memory(tmp_path):
    """dtype= names the weights' own; offload="cpu" loads into memory."""
    made("llama", torch.float32).save_pretrained(tmp_path)
    loaded = gradfold.hf.load_streamed(tmp_path, Stream(), dtype=torch.bfloat16)
    assert {param.dtype for param in loaded.parameters()} == {torch.bfloat16}
    assert not any(is_mapped(param) for param in loaded.parameters())
    assert torch.isfinite(loss_of(loaded, 0))


def test_a_model_without_its_head(tmp_path):
    """A base model's checkpoint has shorter names; a tied head needs none of its own."""
    model = made("gpt2", torch.float32, seed=2)
    model.transformer.save_pretrained(tmp_path)
    loaded = gradfold.hf.load_streamed(tmp_path, Stream(), auto_class=__import__("transformers").AutoModelForCausalLM)
    assert distance(model, loaded) == 0


def refuses(message):
    return pytest.raises(FoldError, match=re.escape(message))


def test_refusals(tmp_path):
    """No files, weights that are missing, tensors that nobody knows, other shapes."""
    from safetensors.torch import load_file, save_file

    with refuses("no *.safetensors in it"):
        gradfold.hf.load_streamed(tmp_path, Stream())
    made("llama", torch.float32).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.norm.weight"
    save_file({key: one for key, one in tensors.items() if key != name}, file)
    with refuses("1 weights of the model are not in its files, such as 'model.norm.weight'"):
        gradfold.hf.load_streamed(tmp_path, Stream())
    save_file({**tensors, "model.extra": torch.ones(2)}, file)
    with refuses("1 tensors of its files are not the model's, such as 'model.extra'"):
        gradfold.hf.load_streamed(tmp_path, Stream())
    save_file({**tensors, name: torch.ones(3)}, file)
    with refuses("model.norm.weight is (3,) in model.safetensors, and (16,) in the model"):
        gradfold.hf.load_streamed(tmp_path, Stream())


@pytest.mark.parametrize("name", ["t5", "mixtral", "stack"])
def test_building(name, tmp_path):
    """Parameters of new modules lie in files, with the values they would have had."""
    stream = Stream(offload="disk", folder=tmp_path)
    torch.manual_seed(0)
    with stream.building():
        model = MODELS[name]()
    plain = made(name, torch.float32)
    assert all(is_mapped(param) for param in model.parameters())
    assert distance(model, plain) == 0
    assert not list(tmp_path.iterdir())
    extra = torch.nn.Linear(2, 2)
    assert not is_mapped(extra.weight)
