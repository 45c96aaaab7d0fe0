"""A quantized model is refused by the field that says so: a plan of its config would be of another model."""

import json

import pytest

from gradfold.planner import PlanError, find_subject, plan
from gradfold.planner.models import Subject
from gradfold.train.errors import ModelError
from gradfold.train.model import find_model, load_model
from tests.planner.small import llama

transformers = pytest.importorskip("transformers")

FIELDS = {  # what config.json says, and what is said of it
    **{
        f"quantization_config, {method}": (
            {"quantization_config": {"quant_method": method, "bits": 4}},
            f"quantization_config says {method}",
        )
        for method in (
            "gptq",
            "awq",
            "fp8",
            "mxfp4",
            "nvfp4",
            "compressed-tensors",
            "hqq",
            "torchao",
            "aqlm",
            "modelopt",
        )
    },
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "quantization_config says bitsandbytes",
    ),
    "no method": ({"quantization_config": {"bits": 8}}, "quantization_config says 8 bits"),
    "older": ({"compression_config": {"format": "dense"}}, "compression_config says no method by name"),
    "MLX": ({"quantization": {"group_size": 64, "bits": 4}}, "quantization says 4 bits"),
}
PLAIN = {"none": {"quantization_config": None}, "empty": {"quantization_config": {}}, "absent": {}}


def folder_of(path, fields):
    llama(2).save_pretrained(path)
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return path


def refused(says):
    return rf"weights are quantized and cannot be trained \({says}\); use the original model it was made from"


@pytest.mark.parametrize("name", FIELDS)
def test_folders_and_files(name, tmp_path):
    fields, says = FIELDS[name]
    folder = folder_of(tmp_path, fields)
    for model in (folder, str(folder), folder / "config.json"):
        with pytest.raises(PlanError, match=refused(says)):
            find_subject(model)
    with pytest.raises(ModelError, match=refused(says)):
        find_model(str(folder))


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_config(name, tmp_path):
    folder = folder_of(tmp_path, PLAIN[name])
    assert find_subject(folder).layers == 2
    assert find_model(str(folder)).location == str(folder)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_files_beside_the_config(name, tmp_path):
    folder = folder_of(tmp_path, {})
    (folder / name).write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    with pytest.raises(PlanError, match=refused(f"{name} says NVFP4")):
        find_subject(folder)
    with pytest.raises(ModelError, match=refused(f"{name} says NVFP4")):
        find_model(str(folder))


def test_configs():
    """As fields, as transformers' own object, and in the config of a part."""
    config = llama(2)
    config.quantization_config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    nested = transformers.LlavaConfig(text_config=llama(2))
    nested.text_config.quantization_config = {"quant_method": "gptq"}
    for one, says in ((config, "quantization_config says bitsandbytes"), (nested, r"text_config\.quant.* says gptq")):
        for ask in (find_subject, plan, lambda config: plan(Subject("mine", config=config))):
            with pytest.raises(PlanError, match=refused(says)):
                ask(one)


def test_modules():
    model = transformers.LlamaForCausalLM(llama(2))
    model.is_quantized = True
    with pytest.raises(PlanError, match=refused("is_quantized")):
        find_subject(model)
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(PlanError, match=refused("quantization_config says gptq")):
        plan(model)
    model.config.quantization_config = {"quant_method": "gguf"}  # transformers has turned these into floats
    assert find_subject(model).source is model


def test_a_hub_id(monkeypatch):
    """Before its weights are looked for, or what reads them."""
    config = llama(2)
    config.quantization_config = {"quant_method": "awq"}
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *args, **kwargs: config)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    with pytest.raises(PlanError, match=refused("quantization_config says awq")):
        find_subject("someone/model-AWQ")
    with pytest.raises(ModelError, match=refused("quantization_config says awq")):
        load_model(find_model("someone/model-AWQ"), None, None)


@pytest.mark.parametrize("command", ["plan", "train"])
def test_the_command_line(command, tmp_path, capsys):
    from gradfold.cli.main import main

    folder = folder_of(tmp_path / "model", {"quantization_config": {"quant_method": "fp8"}})
    (tmp_path / "text.txt").write_text("some words")
    out = tmp_path / "out"
    given = ["--data", str(tmp_path / "text.txt"), "--out", str(out)] if command == "train" else []
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(main([command, *given, "--model", str(folder)]))
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and not out.exists()
    assert "quantization_config says fp8" in said and len(said.splitlines()) == 1
