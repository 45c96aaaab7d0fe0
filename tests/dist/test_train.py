"""`gradfold train` on two ranks: the run of one process, and its checkpoints go on with any number of ranks."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

for package in ("transformers", "datasets", "tyro", "rich", "yaml"):
    pytest.importorskip(package)

from safetensors.torch import load_file  # noqa: E402

from gradfold.train.checkpoint import find_checkpoint, read_checkpoint  # noqa: E402
from gradfold.train.loop import train  # noqa: E402
from tests.train.tiny import recipe, save_tiny, sentence  # noqa: E402


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tiny model without dropout, which differs from rank to rank, and texts."""
    folder = tmp_path_factory.mktemp("parts")
    text = folder / "texts.jsonl"
    text.write_text("".join(json.dumps({"text": sentence(seed, 8 + seed)}) + "\n" for seed in range(20)))
    return save_tiny(folder / "llama", attention_dropout=0.0), text


def recipe_of(parts, out, steps, parallel, states):
    fields = {"batch_size": 4, "sequence_length": 24, "evaluation__sequences": 3, "evaluation__sample_tokens": 0}
    fields |= {"gradient__accumulate": 2, "gradient__clip_norm": 0.5, "optimizer__states": states}
    return recipe(*parts, out=str(out), steps=steps, parallel=parallel, checkpoint__interval_steps=0, **fields)


def quietly(parts, out, steps, parallel, resume, states):
    """Train, or go on; returns whether this process is the one that writes."""
    from rich.console import Console

    from gradfold.train import report
    from gradfold.train.display import Display

    report._trace_memory = lambda run, display: {}
    report.draw_loss = lambda records, path, name: None
    wanted, saved = recipe_of(parts, out, steps, parallel, states), None
    if resume:
        saved = read_checkpoint(find_checkpoint(Path(out)))
        wanted = dataclasses.replace(saved.recipe, steps=steps, parallel=parallel)
    return bool(train(wanted, Path(out), saved, Display(Console(quiet=True))))


def results(out, step):
    """Losses by step, the held-out ones too; all tensors of a checkpoint; norms of gradients, which clipping hides."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    losses = [line.get("loss", line.get("held_out_loss")) for line in lines]
    folder = Path(out) / "checkpoints" / f"step-{step:06d}"
    tensors = load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")
    norms = [line["grad_norm"] for line in lines if "grad_norm" in line]
    return losses, {name: tensor for name, tensor in tensors.items() if not name.startswith("random/")}, norms


def check_alike(ours, theirs, within):
    assert len(ours[0]) == len(theirs[0])
    assert max(abs(a - b) for a, b in zip(ours[0], theirs[0], strict=True)) < 1e-3
    assert ours[2] == pytest.approx(theirs[2], rel=1e-3)
    assert ours[1].keys() == theirs[1].keys()
    for name, tensor in ours[1].items():
        assert tensor.shape == theirs[1][name].shape, name
        torch.testing.assert_close(tensor.double(), theirs[1][name].double(), rtol=0, atol=within, msg=name)


KINDS = [
    "fsdp",
    pytest.param("tp", marks=pytest.mark.slow),
    pytest.param("replicas", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("parallel", KINDS)
def test_one_run(two, parts, tmp_path, parallel):
    quietly(parts, tmp_path / "alone", 4, None, False, None)
    assert two.run(quietly, parts, tmp_path / "two", 4, parallel, False, None) == [True, False]
    check_alike(results(tmp_path / "two", 4), results(tmp_path / "alone", 4), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp", "tp", "replicas"])
@pytest.mark.parametrize("states", [None, "int8"])
def test_goes_on_with_another_number_of_ranks(two, parts, tmp_path, parallel, states):
    """Two ranks, then one, then two: as one process that was stopped there."""
    within = 1e-4 if states is None else 5e-2
    for steps in (2, 4, 6):  # the same, since the schedule follows from how many steps there are
        quietly(parts, tmp_path / "alone", steps, None, steps > 2, states)
    out = tmp_path / "changing"
    two.run(quietly, parts, out, 2, parallel, False, states)
    quietly(parts, out, 4, None, True, states)
    two.run(quietly, parts, out, 6, parallel, True, states)
    ours, theirs = results(out, 6), results(tmp_path / "alone", 6)
    assert abs(ours[0][-1] - theirs[0][-1]) < 1e-3
    check_alike((theirs[0], *ours[1:]), theirs, within)
