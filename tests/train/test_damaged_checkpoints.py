"""Checkpoints that were damaged, or belong elsewhere: one message, and nothing changes."""

import json
import os

import pytest

from gradfold import _io
from gradfold.train.checkpoint import (
    STATES,
    TRAINER,
    read_checkpoint,
    restore_run,
)
from gradfold.train.errors import CheckpointError
from tests.train.tiny import tree_bytes


def damage_json(path, change):
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def reseal(path):
    """Make the manifest fit again, as an attacker or another tool would."""
    files = {}
    for file in sorted(path.rglob("*")):
        if file.name != _io.MANIFEST:
            files[file.name] = {"bytes": file.stat().st_size, "sha256": _io.sha256(file)}
    damage_json(path / _io.MANIFEST, lambda tree: tree.update(files=files))


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a file cut short": (lambda p: os.truncate(p / STATES, 100), "has 100 bytes instead of"),
    "one bit of the weights": (lambda p: flip(p / "model.safetensors", -1), "model.safetensors has changed"),
    "one bit of the recipe": (lambda p: flip(p / "recipe.yaml", 3), "recipe.yaml has changed"),
    "a missing file": (lambda p: (p / TRAINER).unlink(), "trainer.json is missing"),
    "a file that is not in the manifest": (
        lambda p: (p / "pytorch_model.bin").write_bytes(b"x"),
        "pytorch_model.bin is not in its manifest; move that file out of the folder",
    ),
    "a hidden file": (lambda p: (p / ".notes").write_text("x"), ".notes is not in its manifest"),
    "a file in a folder": (
        lambda p: ((p / "more").mkdir(), (p / "more" / "manifest.json").write_text("{}")),
        "more/manifest.json is not in its manifest",
    ),
    "a link that leads nowhere": (lambda p: (p / "x").symlink_to("nowhere"), "x is not in its manifest"),
    "a link to a folder": (lambda p: (p / "y").symlink_to(p.parent), "y is not in its manifest"),
    "a manifest that leads out of the folder": (
        lambda p: damage_json(
            p / _io.MANIFEST, lambda t: t["files"].update({"../step-000003/recipe.yaml": {"bytes": 1, "sha256": ""}})
        ),
        "its manifest lists ../step-000003/recipe.yaml, which is not inside of it",
    ),
    "an empty manifest": (lambda p: (p / _io.MANIFEST).write_text(""), "manifest.json cannot be read"),
    "no manifest": (lambda p: (p / _io.MANIFEST).unlink(), "is not a checkpoint of gradfold (no manifest.json)"),
    "another program's manifest": (
        lambda p: (p / _io.MANIFEST).write_text('{"name": "app"}'),
        "is not a checkpoint of gradfold (another kind",
    ),
    "a manifest without sizes": (
        lambda p: damage_json(p / _io.MANIFEST, lambda t: t["files"].update({STATES: {}})),
        "is damaged: 'bytes'",
    ),
    "a later format": (
        lambda p: damage_json(p / _io.MANIFEST, lambda t: t.update(version=99)),
        "has format version 99, this gradfold reads 1",
    ),
    "a trainer file that is no JSON": (
        lambda p: ((p / TRAINER).write_text("{"), reseal(p)),
        "is damaged: Expecting property name",
    ),
    "a trainer file without progress": (
        lambda p: (damage_json(p / TRAINER, lambda t: t.pop("progress")), reseal(p)),
        "is damaged: 'progress'",
    ),
    "states that are no safetensors": (
        lambda p: ((p / STATES).write_bytes(b"x" * 64), reseal(p)),
        "is damaged: ",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_checkpoint_is_one_message(parts, what):
    harm, message = DAMAGES[what]
    parts.save()
    parts.train(1)
    path = parts.save()
    harm(path)
    before = tree_bytes(parts.folder)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    if "is damaged:" in str(caught.value):
        assert "delete it to resume from step-000003" in str(caught.value)
    assert tree_bytes(parts.folder) == before


def pair_of(tree, key):
    """The value of one key in a packed dict."""
    return next(pair[1] for pair in tree["dict"] if pair[0] == key)


FOREIGN = {
    "the parameters' order": (
        lambda t: pair_of(t["optimizer"]["param_groups"][0], "params")["list"].reverse(),
        "of other parameters than this model's",
    ),
    "a group": (lambda t: t["optimizer"]["param_groups"].pop(), "of other parameters than this model's"),
    "another parameter's state": (
        lambda t: pair_of(t["optimizer"]["states"]["model.norm.weight"], "exp_avg").update(
            tensor="model.embed_tokens.weight/exp_avg"
        ),
        "has shape",
    ),
    "a state that is not there": (
        lambda t: pair_of(t["optimizer"]["states"]["model.norm.weight"], "exp_avg").update(tensor="nothing"),
        "'nothing'",
    ),
    "a later format": (
        lambda t: t["optimizer"]["param_groups"][0]["dict"].extend([["format", 9], ["gradfold", "9.8.7"]]),
        "cannot be continued from: param_groups[0] has format=9: gradfold 9.8.7 wrote it",
    ),
    "the random state": (lambda t: t["random"]["python"].pop(), "do not fit"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_states_that_do_not_fit_are_one_message(parts, what):
    path = parts.save()
    damage_json(path / TRAINER, FOREIGN[what][0])
    reseal(path)
    saved = read_checkpoint(path)
    with pytest.raises(CheckpointError) as caught:
        restore_run(saved, parts.model, parts.optimizer, parts.scheduler)
    assert FOREIGN[what][1] in str(caught.value)
    assert "\n" not in str(caught.value)
