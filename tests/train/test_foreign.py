"""Recipes of axolotl and LLaMA-Factory: they train as they say; what cannot be taken over is named."""

import json

import pytest

from gradfold.cli.main import main
from gradfold.train.errors import RecipeError
from gradfold.train.foreign import AXOLOTL_DEFAULTS, FACTORY_DEFAULTS, load_foreign
from gradfold.train.recipe import Recipe
from gradfold.train.recipe_file import load_recipe, unflatten
from tests.train.templates import turns
from tests.train.tiny import sentence

AXOLOTL_CHATS = """
base_model: {model}
datasets:
  - path: chats.jsonl
    type: chat_template
    field_messages: conversations
    message_property_mappings: {{role: from, content: value}}
    roles_to_train: [assistant]
chat_template: tokenizer_default
val_set_size: 0.2
output_dir: {out}
sequence_len: 64
sample_packing: true
pad_to_sequence_len: true
gradient_accumulation_steps: 2
micro_batch_size: 2
max_steps: 3
optimizer: adamw_torch_fused
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
tf32: false
gradient_checkpointing: true
logging_steps: 1
flash_attention: true
warmup_ratio: 0.1
weight_decay: 0.01
deepspeed:
fsdp:
wandb_project:
special_tokens:
"""
AXOLOTL_ALPACA = """
base_model: {model}
load_in_8bit: false
load_in_4bit: false
adapter:
datasets:
  - path: alpaca.json
    type: alpaca
val_set_size: 0.1
output_dir: {out}
sequence_len: 96
train_on_inputs: true
num_epochs: 1
micro_batch_size: 4
optimizer: adamw_bnb_8bit
lr_scheduler: linear
learning_rate: 0.001
max_grad_norm: 0.5
warmup_steps: 1
saves_per_epoch: 1
"""
FACTORY_SFT = """
model_name_or_path: {model}
stage: sft
do_train: true
finetuning_type: full
deepspeed: examples/deepspeed/ds_z3_config.json
dataset: chats,answers
dataset_dir: sets
template: llama3
cutoff_len: 64
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: {out}
logging_steps: 10
save_steps: 2
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
learning_rate: 1.0e-5
max_steps: 3
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
val_size: 0.1
"""
FACTORY_DPO = """
model_name_or_path: {model}
stage: dpo
do_train: true
finetuning_type: full
pref_beta: 0.2
pref_loss: sigmoid
dataset: prefs
dataset_dir: sets
cutoff_len: 64
output_dir: {out}
per_device_train_batch_size: 4
learning_rate: 5.0e-6
num_train_epochs: 1.0
report_to: none
"""
INFO = {
    "chats": {"file_name": "chats.json", "formatting": "sharegpt", "columns": {"messages": "talk"},
              "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "user", "assistant_tag": "assistant"}},
    "answers": {"file_name": "answers.json", "formatting": "sharegpt", "columns": {"messages": "talk"},
                "tags": {"role_tag": "who", "content_tag": "what"}},
    "prefs": {"file_name": "prefs.json", "ranking": True, "columns": {"prompt": "question", "query": "more",
              "chosen": "good", "rejected": "bad"}},
}  # fmt: skip


@pytest.fixture
def place(tmp_path):
    """A folder with the data that the recipes name."""

    def chat(i):
        return turns(sentence(i, 3), sentence(i + 50, 3))

    share = {"user": "human", "assistant": "gpt"}
    chats = [{"conversations": [{"from": share[m["role"]], "value": m["content"]} for m in chat(i)]} for i in range(20)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    alpaca = [{"instruction": sentence(i, 3), "input": sentence(i, 2) if i % 2 else "", "output": sentence(i + 9, 3)}
              for i in range(12)]  # fmt: skip
    (tmp_path / "alpaca.json").write_text(json.dumps(alpaca))
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "dataset_info.json").write_text(json.dumps(INFO))
    talks = [{"talk": [{"who": m["role"], "what": m["content"]} for m in chat(i)]} for i in range(12)]
    (tmp_path / "sets" / "chats.json").write_text(json.dumps(talks))
    (tmp_path / "sets" / "answers.json").write_text(json.dumps(talks[:6]))
    prefs = [{"question": sentence(i, 3), "more": "", "good": sentence(i + 9, 2), "bad": sentence(i + 7, 2)}
             for i in range(8)]  # fmt: skip
    (tmp_path / "sets" / "prefs.json").write_text(json.dumps(prefs))
    return tmp_path


TRAINED = {
    "axolotl chats": (
        AXOLOTL_CHATS,
        {"dtype": "bfloat16", "steps": 3, "epochs": None, "batch_size": 2, "gradient.accumulate": 2, "seed": 42,
         "optimizer.lr": 2e-4, "text.packing": True, "text.held_out": 0.2, "gradient_checkpointing": True,
         "schedule.warmup": 0.1, "text.too_long": "drop", "gradient.clip_norm": 1.0},
    ),
    "axolotl alpaca": (
        AXOLOTL_ALPACA,
        {"optimizer.states": "int8", "text.loss_on": "all", "schedule.name": "linear", "schedule.warmup": 1.0,
         "gradient.clip_norm": 0.5, "epochs": 1.0, "text.packing": False, "dtype": "float32"},
    ),
    "LLaMA-Factory sft": (
        FACTORY_SFT,
        {"dtype": "bfloat16", "steps": 3, "checkpoint.interval_steps": 2, "gradient_checkpointing": True,
         "text.too_long": "truncate", "columns": ("conversations=talk", "role=who", "content=what")},
    ),
    "LLaMA-Factory dpo": (
        FACTORY_DPO,
        {"preference.beta": 0.2, "epochs": 1.0, "schedule.name": "linear", "schedule.warmup": 0.0,
         "columns": ("instruction=question", "input=more", "chosen=good", "rejected=bad")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("which", TRAINED)
def test_it_trains_as_it_says(which, place, tiny, monkeypatch, capsys, no_pictures):
    text, expected = TRAINED[which]
    monkeypatch.chdir(place)
    (place / "foreign.yml").write_text(text.format(model=tiny, out=place / "run"))
    assert main(["train", "--from", "foreign.yml", "--evaluation.sample-tokens", "2"]) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    recipe = load_recipe(place / "run" / "recipe.yaml")
    assert recipe == unflatten(expected, recipe)
    summary = json.loads((place / "run" / "summary.json").read_text())
    assert summary["steps"] == (recipe.steps or 2 if "dpo" in which else recipe.steps or 3)
    if which == "LLaMA-Factory sft":
        assert "deepspeed, template, overwrite_cache" in said.err and "left out, as they change nothing" in said.err


REFUSED = {
    "an adapter": ("adapter: lora\n", "adapter = 'lora': every weight is trained here"),
    "quantized weights": ("load_in_4bit: true\n", "load_in_4bit = True: weights are trained as they are"),
    "fp16": ("fp16: true\n", "fp16 = True: give bf16: true"),
    "another optimizer": ("optimizer: muon\n", "optimizer 'muon': there is adamw_torch"),
    "another schedule": ("lr_scheduler: rex\n", "lr_scheduler = 'rex': there is cosine"),
    "an unknown key": ("loss_scale: 3\n", "loss_scale = 3 is not known here"),
    "another reward": ("rl: kto\n", "rl = 'kto': there is dpo"),
    "a number of rows": ("val_set_size: 50\n", "val_set_size or val_size = 50: a number of rows"),
    "code of strangers": ("trust_remote_code: true\n", "trust_remote_code = True: code of a model's repository"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_cannot_be_taken_over_is_named(which, place, monkeypatch):
    line, message = REFUSED[which]
    monkeypatch.chdir(place)
    (place / "f.yml").write_text("base_model: m\ndatasets:\n  - path: alpaca.json\n    type: alpaca\n" + line)
    with pytest.raises(RecipeError, match="f.yml .axolotl.: cannot be taken over: ") as caught:
        load_foreign("f.yml")
    assert message in str(caught.value)


def test_all_of_them_are_named_at_once(place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "f.yml").write_text(
        "model_name_or_path: m\nstage: ppo\nfinetuning_type: lora\nquantization_bit: 4\nlora_rank: 8\n"
        "use_galore: true\nmystery: 1\ndataset: alpaca.json\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_foreign("f.yml")
    for word in ("stage", "finetuning_type", "quantization_bit", "use_galore", "mystery"):
        assert word in str(caught.value)
    assert "lora_rank" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("datasets:\n  - path: tatsu-lab/alpaca\n    type: alpaca\n", "is no file; data sets of a hub are downloaded"),
        ("datasets:\n  - path: none.jsonl\n    type: alpaca\n", "data none.jsonl: no such file"),
        ("datasets:\n  - path: alpaca.json\n    type: gpteacher\n", "type = 'gpteacher': there is alpaca"),
        ("datasets: alpaca.json\n", "datasets: is not a list"),
        ("", "datasets: there are none"),
    ],
)
def test_data_that_cannot_be_read(data, message, place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "f.yml").write_text("base_model: m\n" + data)
    with pytest.raises(RecipeError, match=message):
        load_foreign("f.yml")


def test_it_is_neither(tmp_path, capsys):
    (tmp_path / "f.yml").write_text("model: m\n")
    assert main(["train", "--from", str(tmp_path / "f.yml")]) == 2
    assert "is neither axolotl's (base_model) nor LLaMA-Factory's" in capsys.readouterr().err
    (tmp_path / "g.yml").write_text("model: m\n")
    words = ["--config", str(tmp_path / "g.yml"), "--from", str(tmp_path / "f.yml")]
    assert main(["train", *words]) == 2
    assert "both say what to begin with" in capsys.readouterr().err


def test_the_defaults_are_theirs_and_fields_of_ours():
    for defaults in (AXOLOTL_DEFAULTS, FACTORY_DEFAULTS):
        assert unflatten(defaults, Recipe()) != Recipe()


def test_flags_override_it(place, monkeypatch, tiny, capsys, no_pictures):
    monkeypatch.chdir(place)
    (place / "f.yml").write_text(AXOLOTL_ALPACA.format(model=tiny, out=place / "run"))
    words = ["--steps", "1", "--batch", "2", "--tokens", "80", "--out", "other", "--evaluation.sample-tokens", "0"]
    assert main(["train", "--from", "f.yml", *words]) == 0, capsys.readouterr().err
    recipe = load_recipe(place / "other" / "recipe.yaml")
    assert (recipe.steps, recipe.batch_size, recipe.sequence_length, recipe.optimizer.states) == (1, 2, 80, "int8")
