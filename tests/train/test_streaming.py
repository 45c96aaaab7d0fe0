"""Data that is read while it trains: the same run each time, after a resume too, in memory that files do not decide."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from gradfold.train.checkpoint import read_checkpoint
from gradfold.train.errors import CheckpointError, DataError, RecipeError
from gradfold.train.loop import train
from gradfold.train.recipe import Recipe
from gradfold.train.recipe_groups import TextRecipe
from gradfold.train.stream import StreamedData
from tests.train.tiny import recipe, sentence, tree_bytes

STREAM = {"text__streaming": True, "text__buffer": 20}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Texts, and prompts with completions."""
    folder = tmp_path_factory.mktemp("stream")
    texts = [{"text": sentence(i, 8 + i % 20)} for i in range(120)]
    pairs = [{"prompt": sentence(i, 4), "completion": " " + sentence(i + 1000, 4)} for i in range(60)]
    for name, rows in (("t", texts), ("p", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def streamed(tiny, files, names="t", weights=(), **more):
    chosen = recipe(tiny, files / "t.jsonl", **{"steps": 11, **STREAM, **more})
    paths = tuple(str(files / f"{name}.jsonl") for name in names)
    return dataclasses.replace(chosen, data=paths, data_weights=weights)


MIXES = {
    "one file": ("t", (), {}),
    "two files in a row": ("tp", (), {"text__buffer": 150}),
    "two files mixed": ("tp", (3.0, 1.0), {"gradient__accumulate": 2}),
    "not packed": ("p", (), {"text__packing": False, "text__buffer": 7}),
}


QUICK = "two files mixed"


@pytest.mark.parametrize(
    "mix", [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in MIXES if name != QUICK)]
)
def test_resumed_is_bit_identical(mix, tiny, files, tmp_path, silent, no_pictures):
    """From checkpoints in the middle of a block and where one has just begun."""
    names, weights, more = MIXES[mix]
    chosen = streamed(tiny, files, names, weights, checkpoint__interval_steps=4, checkpoint__keep=9, **more)
    train(chosen, tmp_path / "whole", display=silent)
    whole = tree_bytes(tmp_path / "whole" / "checkpoints" / "step-000011")
    for step in (4, 8):
        saved = read_checkpoint(tmp_path / "whole" / "checkpoints" / f"step-{step:06d}")
        out = tmp_path / f"from-{step}"
        train(saved.recipe, out, saved, silent)
        again = tree_bytes(out / "checkpoints" / "step-000011")
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert again[name] == whole[name]


def batches_of(data, count):
    return [np.concatenate([b.input_ids.ravel() for b in data.batches(step)]) for step in range(count)]


def test_each_row_comes_once_in_an_epoch_and_held_out_ones_never(tiny, files, tokenizer):
    chosen = streamed(tiny, files, "p", text__packing=False, text__held_out=0.3, batch_size=1)
    first = StreamedData(chosen, tokenizer)
    count = sum(not first._is_held_out(chosen.data[0], number) for number in range(60))
    chosen = dataclasses.replace(chosen, text=dataclasses.replace(chosen.text, buffer=count))
    data = StreamedData(chosen, tokenizer)
    held = {tokenizer.decode(data.held_out_tokens.ids[a:b]) for window in data.held_out for a, b in window}
    assert held
    rows = [json.loads(line) for line in (files / "p.jsonl").read_text().splitlines()]
    texts = [row["prompt"] + row["completion"] + "<eos>" for row in rows]
    kept = [text for number, text in enumerate(texts) if not data._is_held_out(chosen.data[0], number)]
    assert held <= set(texts) - set(kept) and 10 < len(texts) - len(kept) < 30
    seen = []
    for step in range(count):
        for batch in data.batches(step):
            for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
                size = max(i + 1 for i, label in enumerate(labels) if label != -100)
                seen.append(tokenizer.decode(ids[:size]))
    assert sorted(seen) == sorted(kept) and seen != kept


def test_weights_are_the_parts_of_the_mixture(tiny, files, tokenizer):
    chosen = streamed(tiny, files, "tp", (3.0, 1.0), text__held_out=0.0, text__packing=False, text__buffer=400)
    data = StreamedData(chosen, tokenizer)
    share = 1 - data.tokens.is_document.mean()
    assert 0.17 < share < 0.33


def test_a_short_file_begins_again(tiny, files, tokenizer):
    data = StreamedData(streamed(tiny, files, "p", batch_size=4), tokenizer)
    batches_of(data, 40)
    assert data._queue.positions[0][0] > 0


def test_the_order_is_the_seed_s(tiny, files, tokenizer):
    one, two, other = (StreamedData(streamed(tiny, files, seed=seed), tokenizer) for seed in (1, 1, 2))
    first, second, third = (batches_of(data, 5) for data in (one, two, other))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, third, strict=True))


def test_a_text_file_comes_in_parts(tiny, tmp_path, tokenizer, monkeypatch):
    from gradfold.train import readers

    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 64)
    text = "".join(sentence(i, 9) + "\n" for i in range(30))
    (tmp_path / "a.txt").write_text(text)
    pieces = [row.text for row in readers.stream_rows(str(tmp_path / "a.txt"), ())]
    assert "".join(pieces) == text and len(pieces) > 9 and all(piece.endswith("\n") for piece in pieces)
    assert [row.text for row in readers.stream_rows(str(tmp_path / "a.txt"), (), 4)] == pieces[4:]


def test_files_that_changed_are_noticed(tiny, files, tmp_path, silent, no_pictures):
    (tmp_path / "t.jsonl").write_bytes((files / "t.jsonl").read_bytes())
    train(streamed(tiny, tmp_path, steps=3), tmp_path / "run", display=silent)
    saved = read_checkpoint(tmp_path / "run" / "checkpoints" / "step-000003")
    lines = (tmp_path / "t.jsonl").read_text().splitlines()
    (tmp_path / "t.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    longer = dataclasses.replace(saved.recipe, steps=5)
    with pytest.raises(CheckpointError, match="no longer gives the tokens"):
        train(longer, tmp_path / "run", saved, silent)


def test_what_streaming_cannot_do(tiny, files, tmp_path, tokenizer):
    with pytest.raises(RecipeError, match="text.streaming = True: how many steps an epoch has is not.*give steps"):
        Recipe(text=TextRecipe(streaming=True))
    with pytest.raises(RecipeError, match="evaluation.sequences = 0 with text.streaming"):
        streamed(tiny, files, evaluation__sequences=0)
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 3)
    with pytest.raises(DataError, match="preferences are read whole"):
        StreamedData(streamed(tiny, tmp_path, "d", text__held_out=0.0), tokenizer)
    (tmp_path / "e.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match=r"e.jsonl: no row of many has anything to learn"):
        StreamedData(streamed(tiny, tmp_path, "e", text__held_out=0.0), tokenizer)


# ---- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import sys, resource
from pathlib import Path
from rich.console import Console
from gradfold.train import report
from gradfold.train.display import Display
from gradfold.train.loop import train
from tests.train.tiny import recipe
report._trace_memory = lambda run, display: {}
report.draw_loss = lambda records, path, name: None
model, data, out, streaming = sys.argv[1:]
chosen = recipe(Path(model), Path(data), steps=30, text__streaming=streaming == "yes", batch_size=8)
train(chosen, Path(out), display=Display(Console(quiet=True)))
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak_of(tiny, data, out, streaming="yes"):
    words = [sys.executable, "-c", PEAK, str(tiny), str(data), str(out), streaming]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return int(re.search(r"peak (\d+)", done.stdout)[1])


def write_rows(path, size_bytes):
    """A JSONL file of about that size."""
    block = "".join(json.dumps({"text": sentence(seed, 150)}) + "\n" for seed in range(400)).encode()
    with path.open("wb") as file:
        for _ in range(max(1, size_bytes // len(block))):
            file.write(block)
    return path


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tiny, tmp_path):
    """64 MB, which not streamed take several times as much."""
    small, large = write_rows(tmp_path / "s.jsonl", 2**18), write_rows(tmp_path / "l.jsonl", 2**26)
    base = peak_of(tiny, small, tmp_path / "a")
    assert peak_of(tiny, large, tmp_path / "b") - base < 200 * 2**20


@pytest.mark.slow
def test_two_gigabytes(tiny, tmp_path):
    small, large = write_rows(tmp_path / "s.jsonl", 2**18), write_rows(tmp_path / "l.jsonl", 2 * 10**9)
    more = peak_of(tiny, large, tmp_path / "b") - peak_of(tiny, small, tmp_path / "a")
    print(f"2 GB streamed: {more / 2**20:.0f} MiB more than 256 KB")
    assert more < 600 * 2**20
