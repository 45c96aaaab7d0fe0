"""Finding a model, what is said where there is none, and at which depths it may be run."""

import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gradfold.planner.errors import PlanError
from gradfold.planner.models import Subject, find_subject
from gradfold.planner.predict import predict
from gradfold.planner.settings import Settings
from tests.planner.small import SIZES, differing, gemma2, gemma3, llama, qwen2_moe

transformers = pytest.importorskip("transformers")

SHORT = Settings(tokens=16, batch=1)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Also where a test runs with a network: none is used."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8, dtype=torch.float32)
        self.norm = nn.LayerNorm(8, dtype=torch.float64)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("count", torch.ones(3, dtype=torch.int64))


def saved(folder, fields):
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return path


def chained(error):
    """Whether a traceback of it would show another one's."""
    return error.__cause__ is not None or (error.__context__ is not None and not error.__suppress_context__)


# finding ------------------------------------------------------------------------------------------------------------


def test_a_folder_and_its_file(tmp_path):
    config = llama(3, dtype="bfloat16")
    config.save_pretrained(tmp_path)
    for name in (tmp_path, str(tmp_path), tmp_path / "config.json"):
        subject = find_subject(name)
        assert subject.name == str(name)
        assert (subject.layers, subject.dtype, subject.config.hidden_size) == (3, torch.bfloat16, 64)


def test_a_folder_comes_before_a_preset_of_its_name(tmp_path, monkeypatch):
    llama(3).save_pretrained(tmp_path / "llama-2-7b")
    monkeypatch.chdir(tmp_path)
    assert find_subject("llama-2-7b").layers == 3


def test_a_config_a_module_and_a_function():
    assert find_subject(llama()).name == "llama"
    assert find_subject(Net()).name == find_subject(Net).name == "Net"
    assert [find_subject(one).parameters for one in (Net(), Net)] == [50 * 8 + 2 * 8] * 2
    assert find_subject(Net).dtype is torch.float32
    assert find_subject(llama(dtype=None)).dtype is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lama-3.1-8b", "model 'lama-3.1-8b': no such folder; did you mean 'llama-3.1-8b'"),
        ("xyz", "no such folder; known without a download: llama-2-7b, .*; or name a hub id, ORG/MODEL"),
        ("/no/such/folder", "model '/no/such/folder': no such folder"),
        ("", "model '': give a name"),
        (" ", "model ' ': give a name"),
        (3, "model=3: give a name, a folder"),
        (None, "model=None: give a name"),
        ("Qwen/Qwen3-80B", "its config cannot be had from the hub .*did you mean 'qwen3-8b'"),
    ],
)
def test_what_is_not_there(name, message):
    with pytest.raises(PlanError, match=message) as raised:
        find_subject(name)
    assert not chained(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("{", "config.json cannot be read"),
        ("[1]", "is no transformers config, it has no model_type"),
        ({"hidden_size": 3}, "has no model_type"),
        ({"model_type": "no_such_thing"}, "transformers knows no such model .*no_such_thing"),
        ({"model_type": "llama", "hidden_size": "wide"}, "transformers knows no such model"),
    ],
)
def test_broken_configs(tmp_path, fields, message):
    saved(tmp_path, fields)
    with pytest.raises(PlanError, match=message) as raised:
        find_subject(tmp_path)
    assert not chained(raised.value)


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(PlanError, match="has no config.json; name a folder that save_pretrained wrote"):
        find_subject(tmp_path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (transformers.T5Config, "t5 is encoder and decoder"),
        (transformers.BartConfig, "bart is encoder and decoder"),
        (transformers.BertConfig, "bert is a masked language model; .*is_decoder=True"),
        (transformers.RobertaConfig, "roberta is a masked language model"),
        (transformers.ViTConfig, "transformers cannot build a causal model of it"),
    ],
)
def test_other_kinds_of_models(kind, message):
    with pytest.raises(PlanError, match=message) as raised:
        predict(find_subject(kind()), SHORT)
    assert len(str(raised.value)) < 300


# building -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [Net, Net()], ids=["function", "module"])
@pytest.mark.parametrize("fake", [False, True])
def test_a_source_keeps_its_dtypes_unless_told(source, fake):
    def dtypes(model):
        return [t.dtype for t in (model.embed.weight, model.norm.weight, model.head.weight, model.scale, model.count)]

    def build(dtype):
        return find_subject(source).build(dtype, FakeTensorMode(allow_non_fake_inputs=True) if fake else None)

    f32, f64, bf16, i64 = torch.float32, torch.float64, torch.bfloat16, torch.int64
    assert dtypes(build(None)) == [f32, f64, f32, f32, i64]
    model = build(bf16)
    assert dtypes(model) == [bf16, bf16, bf16, bf16, i64]
    assert model.head.weight is model.embed.weight
    assert dtypes(Net()) == [f32, f64, f32, f32, i64]
    if isinstance(source, nn.Module):
        assert dtypes(source) == [f32, f64, f32, f32, i64]  # itself untouched


def test_a_model_is_built_to_be_trained():
    module = Net().eval()
    assert find_subject(module).build(None, None).training
    assert not module.training
    frozen_part = Net()
    frozen_part.norm.eval()
    assert not find_subject(frozen_part).build(None, None).norm.training


def test_what_builds_no_module():
    with pytest.raises(PlanError, match="makes a int, not a torch module"):
        predict(find_subject(lambda: 3), SHORT)


# depths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "depths"),
    [
        (llama(32), (2, 3, 1)),
        (llama(5), (2, 3, 1)),
        (llama(4), None),  # nothing to save
        (llama(1), None),
        (gemma2(26), (4, 6, 2)),
        (gemma2(27), (5, 7, 2)),
        (gemma2(8), None),
        (gemma3(26), None),  # 14 and 20 layers are more work than 26
        (gemma3(48), (12, 18, 6)),
        (qwen2_moe(12), (2, 3, 1)),
        (qwen2_moe(12, mlp_only_layers=[0, 1]), None),  # dense first layers
        (qwen2_moe(12, decoder_sparse_step=2), (4, 6, 2)),
    ],
)
def test_depths(config, depths):
    assert Subject("one", config=config).depths == depths


def test_without_a_list_of_layers_there_are_no_depths():
    assert find_subject(Net()).depths is None
    nested = transformers.Gemma3Config(text_config={**SIZES, "num_hidden_layers": 12})
    assert find_subject(nested).depths is None


def test_layers_that_use_those_before_them_are_run_whole():
    config = llama(12)
    config.num_kv_shared_layers = 4
    assert Subject("one", config=config).depths is None


def test_a_config_of_fewer_layers_keeps_the_first_ones():
    config = gemma2(7)
    built = Subject("one", config=config).build(torch.float32, FakeTensorMode(allow_non_fake_inputs=True), layers=3)
    assert built.config.num_hidden_layers == len(built.model.layers) == len(built.config.layer_types) == 3
    assert built.config.layer_types == config.layer_types[:3]
    assert config.num_hidden_layers == 7


@pytest.mark.parametrize(
    ("config", "fold"),
    [
        (llama(6), False),
        pytest.param(gemma2(11), True, marks=pytest.mark.slow),
        pytest.param(qwen2_moe(6, dtype="bfloat16"), True, marks=pytest.mark.slow),
        pytest.param(qwen2_moe(12, decoder_sparse_step=2, dtype="bfloat16"), False, marks=pytest.mark.slow),
    ],
    ids=["llama", "gemma2", "qwen2_moe", "qwen2_moe every other"],
)
def test_a_step_of_two_depths_is_that_of_the_whole(config, fold, monkeypatch):
    subject, settings = Subject("one", config=config), Settings(tokens=16, batch=1, fold=fold)
    assert subject.depths is not None
    shallow = predict(subject, settings).memory
    monkeypatch.setitem(vars(subject), "depths", None)
    assert not differing(shallow.timeline, predict(subject, settings).memory.timeline)
