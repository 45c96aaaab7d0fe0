"""A run whose weights stream: what it says and writes down, saves and continues, and what it leaves behind."""

import dataclasses
import io
import re
import subprocess
import sys

import pytest
import torch
import transformers
from rich.console import Console

import gradfold
from gradfold.train import model
from gradfold.train.checkpoint import find_checkpoint, read_checkpoint
from gradfold.train.display import Display
from gradfold.train.errors import RecipeError
from gradfold.train.loop import train
from gradfold.train.metrics import METRICS, read_metrics
from gradfold.train.recipe import Recipe
from gradfold.train.recipe_file import dump_recipe, load_recipe
from tests.train.test_resume import result, same
from tests.train.tiny import recipe

HOST = {"stream__offload": "cpu", "text__packing": False}
DISK = {**HOST, "stream__offload": "disk"}


def shown(width=300, terminal=False):
    return Display(Console(file=(text := io.StringIO()), width=width, force_terminal=terminal)), text


def losses(out):
    return [record["loss"] for record in read_metrics(out / METRICS) if "loss" in record]


@pytest.mark.parametrize("kind", [HOST, pytest.param(DISK, marks=pytest.mark.slow)], ids=["host", "disk"])
def test_it_trains_as_without(tiny, texts, tmp_path, no_pictures, kind):
    display, text = shown()
    settings = {"steps": 3, "optimizer__states": "int8", "gradient__accumulate": 2, "evaluation__interval_steps": 2}
    streamed = train(recipe(tiny, texts, **settings, **kind), tmp_path / "streamed", None, display)
    plain = train(recipe(tiny, texts, **settings, text__packing=False), tmp_path / "plain", None, shown()[0])
    assert losses(tmp_path / "streamed") == losses(tmp_path / "plain")
    for key in ("held_out_loss", "sample"):
        assert streamed[key] == plain[key]
    (said,) = (line for line in text.getvalue().splitlines() if line.startswith("streamed"))
    where = "in host memory" if kind is HOST else f"in files of {tmp_path / 'streamed'}"
    assert f"of weights and states {where}, 2 blocks at a time on the device" in said
    records = [record for record in read_metrics(tmp_path / "streamed" / METRICS) if "loss" in record]
    for record in records:
        assert 0 <= record["link_share"] <= 1
        assert record["link_to_device_bytes"] >= record["link_to_host_bytes"] > 0
    assert all("link_share" not in record for record in read_metrics(tmp_path / "plain" / METRICS))
    assert sum("  link " in line and "of the step, " in line for line in text.getvalue().splitlines()) == 3
    left = {path.name for path in (tmp_path / "streamed").iterdir()}
    assert left == {path.name for path in (tmp_path / "plain").iterdir()}


def test_a_folder_is_loaded_into_files(tiny, texts, tmp_path, no_pictures, monkeypatch):
    """With stream.folder, a model in safetensors goes into files a tensor at a time, and trains alike."""
    made = []
    load = model.load_streamed
    monkeypatch.setattr(model, "load_streamed", lambda *args, **options: made.append(load(*args, **options)) or made[0])
    settings = {"steps": 2, "text__packing": False}
    folder = {"stream__offload": "disk", "stream__folder": str(tmp_path / "scratch")}
    train(recipe(tiny, texts, **settings, **folder), tmp_path / "streamed", None, shown()[0])
    train(recipe(tiny, texts, **settings), tmp_path / "plain", None, shown()[0])
    assert len(made) == 1
    assert losses(tmp_path / "streamed") == losses(tmp_path / "plain")
    assert not list((tmp_path / "scratch").iterdir())


def test_resumed_it_is_the_run_that_was_not_stopped(tiny, texts, tmp_path, no_pictures):
    """From host memory, then from disk, and never streamed: the same bits."""
    settings = {"optimizer__states": "int8", "dtype": "bfloat16", "optimizer__rounding": "stochastic"}
    out = tmp_path / "parts"
    train(recipe(tiny, texts, steps=1, schedule__name="constant", **settings, **HOST), out, None, shown()[0])
    assert read_checkpoint(find_checkpoint(out)).recipe.stream.offload == "cpu"
    # a constant rate, so that a longer run begins with the same steps
    train(
        recipe(tiny, texts, steps=3, schedule__name="constant", **settings, **DISK),
        out,
        read_checkpoint(find_checkpoint(out)),
        shown()[0],
    )
    other = tmp_path / "other"
    train(
        recipe(tiny, texts, steps=3, schedule__name="constant", **settings, text__packing=False),
        other,
        None,
        shown()[0],
    )
    same(result(out)[:2], result(other)[:2])
    assert losses(out) == losses(other)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stream__blocks": 4}, "stream.blocks = 4: does nothing without stream.offload; say cpu or disk"),
        ({"stream__offload": "cpu", "stream__blocks": 1}, "stream.blocks = 1: give a whole number, 2 or more"),
        ({"stream__offload": "cpu", "stream__folder": "x"}, "stream.folder = 'x': goes with stream.offload = disk"),
        ({"stream__offload": "cpu", "fold": False}, "stream.offload with fold = False"),
        ({"stream__offload": "cpu", "parallel": "fsdp"}, "stream.offload with parallel = 'fsdp': one process streams"),
        ({"stream__offload": "gpu"}, "stream.offload = 'gpu': takes cpu, disk"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_refused(changes, said, tiny, texts):
    with pytest.raises(RecipeError, match=re.escape(said)):
        recipe(tiny, texts, **changes)


def test_layers_that_are_not_there(tiny, texts, tmp_path, no_pictures):
    with pytest.raises(RecipeError, match="stream: .*no module of the model matches 'no.such'"):
        train(recipe(tiny, texts, steps=1, **HOST, stream__layers=("no.such",)), tmp_path / "run", None, shown()[0])
    assert not (tmp_path / "run").exists()


def test_in_a_file(tmp_path):
    made = Recipe(
        stream=dataclasses.replace(Recipe().stream, offload="disk", folder="/fast", layers=("model.layers.?",))
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(made))
    assert load_recipe(tmp_path / "recipe.yaml") == made
    stream = made.plan_settings().stream
    assert (stream.offload, stream.folder, stream.layers) == ("disk", "/fast", ["model.layers.?"])
    assert Recipe().plan_settings().stream is None


SAVE = r"""
import re, resource, sys
from pathlib import Path
import torch, gradfold
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from gradfold.train.checkpoint import Progress, save_checkpoint
from gradfold.train.recipe import Recipe

def data():
    return int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

class Tokenizer:
    def save_pretrained(self, place): pass

def made(layers, hidden):
    config = LlamaConfig(vocab_size=64, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=4)
    stream = gradfold.Stream(offload="disk", folder=sys.argv[1], tile_bytes=2**20)
    with stream.building():
        model = LlamaForCausalLM(config)
    optimizer = gradfold.AdamW(model.parameters(), lr=1e-4)
    fold = gradfold.fold(model, optimizer, stream=stream)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, fold

def save(parts, name):
    model, optimizer, fold = parts
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    parts = (model, Tokenizer(), optimizer, scheduler, Recipe(), Progress(step=1), fold)
    save_checkpoint(Path(sys.argv[1]) / name, *parts)

save(made(2, 32), "small")  # what is imported and kept for good is there now
parts = made(8, 512)
size = 3 * 4 * sum(p.numel() for p in parts[0].parameters())
cap = data() + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
save(parts, "large")
print(size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts on Linux")
def test_saving_takes_no_second_copy(tmp_path):
    """Weights and states of 250 MB are saved with 40 MB of memory to spare."""
    command = [sys.executable, "-c", SAVE, str(tmp_path), str(40 * 10**6)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 200 * 10**6
    (folder,) = (tmp_path / "large").iterdir()
    assert sum(path.stat().st_size for path in folder.iterdir()) > 200 * 10**6


def test_the_fold_s_report_says_what_streams():
    from tests.llama import small_llama

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(small_llama(num_hidden_layers=3))
    optimizer = gradfold.AdamW(model.parameters(), lr=1e-3)
    fold = gradfold.fold(model, optimizer, stream=gradfold.Stream())
    ids = torch.zeros(1, 4, dtype=torch.int64)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    report = fold.report()
    routes = {row.name: row.route for row in report.rows}
    assert routes["model.layers.0.mlp.up_proj.weight"] == "folded, streamed"
    assert routes["lm_head.weight"] == "folded"
    total = sum(4 * p.numel() for p in model.parameters())
    blocks = sum(4 * p.numel() for p in model.model.layers.parameters())
    assert (report.streamed.blocks, report.streamed.held, report.streamed.disk_bytes) == (3, 2, 0)
    assert report.streamed.host_bytes == blocks + 2 * total
    assert report.streamed.traffic == fold.traffic
    assert "streamed: 3 blocks, 2 of them on the device at a time" in str(report)
    fold.remove()
    plain = gradfold.fold(model, optimizer)
    assert plain.report().streamed is None and "streamed" not in str(plain.report())
