"""States that an older gradfold wrote (`fixtures/before_prepared`) load, and go on as that one did."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.before_prepared import make

FOLDER = make.HERE
MADE = json.loads((FOLDER / "made.json").read_text())
# Roots and fused multiply-adds of torch's own kernels differ between instruction sets, by a last bit.
SAME_CPU = torch.backends.cpu.get_cpu_capability() == MADE["cpu_capability"]
# Squares were summed in fp32 then; compiled steps sum them in fp64.
NORMS = torch.finfo(torch.float32).eps

LAST = f"step-{make.BEFORE + make.AFTER:06d}"
MIDDLE = f"step-{make.BEFORE:06d}"


def flat(value, path=""):
    """Every leaf of nested dicts, lists and tuples, by its path."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for key, item in items for name, leaf in flat(item, f"{path}/{key}").items()}
    return {path: value}


def same(found, wanted, exactly=True, rel=0.0):
    """``rel``: how far numbers that are not in tensors may be apart."""
    rel = rel if exactly else 1e-6
    found, wanted = flat(found), flat(wanted)
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        if path.startswith("/schedule/norms") and value is not None:
            # not used in this order of the chunks; then they were rounded to fp32, now squares add up in fp64
            assert found[path] == pytest.approx(value, rel=1e-7), path
            continue
        if not isinstance(value, torch.Tensor):
            assert found[path] == (pytest.approx(value, rel=rel) if rel and isinstance(value, float) else value), path
            continue
        assert found[path].dtype == value.dtype, path
        if exactly:
            assert torch.equal(found[path], value), path
        elif value.is_floating_point():
            torch.testing.assert_close(found[path], value, rtol=1e-6, atol=1e-6, msg=path)


def load(case):
    return torch.load(FOLDER / f"{case}.pt", weights_only=True)


def put(saved, model, optimizer, fold=None):
    """As a user does who resumes."""
    model.load_state_dict(saved["weights"])
    optimizer.load_state_dict(saved["optimizer"])
    if fold is not None:
        fold.load_state_dict(saved["fold"])


def of_groups(optimizer, wanted):
    """Its param_groups, of the keys that were saved: a newer gradfold may have more."""
    groups = optimizer.state_dict()["param_groups"]
    return [{key: group[key] for key in saved} for group, saved in zip(groups, wanted, strict=True)]


@pytest.mark.parametrize("case", make.CASES)
def test_all_states_come_back(case):
    saved = load(case)["before"]
    model, optimizer, fold = make.build(case)
    put(saved, model, optimizer, fold)
    found = make.snapshot(model, optimizer, fold)
    same(found["weights"], saved["weights"])
    same(found["fold"], saved["fold"])
    same(found["optimizer"]["state"], saved["optimizer"]["state"])
    same(of_groups(optimizer, saved["optimizer"]["param_groups"]), saved["optimizer"]["param_groups"])
    same(found["optimizer"].get("working_set"), saved["optimizer"].get("working_set"))


def goes_on(case, model, optimizer, fold):
    make.train(model, optimizer, make.BEFORE, make.AFTER)
    found, wanted = make.snapshot(model, optimizer, fold), load(case)["after"]
    same(found["weights"], wanted["weights"], SAME_CPU)
    same(found["optimizer"]["state"], wanted["optimizer"]["state"], SAME_CPU)
    same(found["fold"], wanted["fold"], SAME_CPU, NORMS)
    same(found["optimizer"].get("working_set"), wanted["optimizer"].get("working_set"), SAME_CPU, NORMS)


@pytest.mark.parametrize("case", make.CASES)
def test_the_next_steps_are_those_of_then(case):
    saved = load(case)["before"]
    model, optimizer, fold = make.build(case)
    make.train(model, optimizer, 7, 1)  # whatever was here before
    put(saved, model, optimizer, fold)
    goes_on(case, model, optimizer, fold)


@pytest.mark.parametrize("case", [case for case, row in make.CASES.items() if "working_set" not in row[2]])
def test_loaded_before_folding(case):
    saved = load(case)["before"]
    model, optimizer, _ = make.build(case, folded=False)
    put(saved, model, optimizer)
    fold = make.fold(case, model, optimizer)
    fold.load_state_dict(saved["fold"])
    goes_on(case, model, optimizer, fold)


def test_every_file_is_of_a_case():
    assert sorted(path.stem for path in FOLDER.glob("*.pt")) == sorted(make.CASES)


def test_the_gradients_are_exact():
    """Else the order of a sum could change the states, and the comparisons would be of luck."""
    for dtype in (torch.float32, torch.bfloat16):
        for step in range(make.BEFORE + make.AFTER):
            model, exact = make.Small(dtype), make.Small(torch.float64)
            model(step).backward()
            exact(step).backward()
            for param, twin in zip(model.parameters(), exact.parameters(), strict=True):
                assert torch.equal(param.grad.double(), twin.grad)
                assert twin.grad.any()


# checkpoints of `gradfold train` --------------------------------------------------------------------------------------


@pytest.fixture
def resume(tmp_path, monkeypatch):
    """A run that was stopped in the middle, resumed by today's command; gives what it was and what it became."""
    for package in ("transformers", "datasets", "tyro", "rich", "yaml"):
        pytest.importorskip(package)
    from gradfold.cli.main import main

    def resumed(run, *flags):
        shutil.copytree(FOLDER / run, tmp_path / "here")
        monkeypatch.chdir(tmp_path / "here")
        assert main(["train", "--resume", "run", *flags]) == 0
        return tmp_path / "here" / "run"

    return resumed


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def states(path):
    """All tensors of a checkpoint's states, without those of random-number generators."""
    return {name: t for name, t in load_file(path).items() if not name.startswith("random/")}


@pytest.mark.parametrize("run", make.CHECKPOINTS)
def test_a_checkpoint_resumes(resume, run):
    """Sums in a Llama are not exact, so losses are close; schedule, batches and chunks are the same."""
    out = resume(run)
    found, wanted = records(out / "metrics.jsonl"), records(FOLDER / run / "metrics.jsonl")
    assert len(found) == len(wanted)
    for new, old in zip(found, wanted, strict=True):
        for name in ("step", "lr", "tokens", "targets", "chunk", "chunks"):
            assert new.get(name) == old.get(name), name
        for name in ("loss", "held_out_loss", "grad_norm"):
            if name in old:
                assert new[name] == pytest.approx(old[name], rel=1e-3), name
    then, now = FOLDER / run / "after", out / "checkpoints" / LAST
    for name, old in load_file(then / "model.safetensors").items():
        new = load_file(now / "model.safetensors")[name]
        assert new.dtype == old.dtype
        torch.testing.assert_close(new.float(), old.float(), rtol=1e-2, atol=2e-3, msg=name)
    new, old = states(now / "optimizer.safetensors"), states(then / "optimizer.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in new.items()} == {n: (t.dtype, t.shape) for n, t in old.items()}
    for name, value in load_file(then / "optimizer.safetensors").items():
        if name.startswith("random/") or name.endswith("step"):  # as many draws, as many steps
            assert torch.equal(load_file(now / "optimizer.safetensors")[name], value), name


@pytest.mark.slow  # what resumes with the bits it would have had has come back with them
@pytest.mark.parametrize("run", make.CHECKPOINTS)
def test_a_checkpoint_comes_back_bit_for_bit(resume, run):
    """A run that ends at the step it was saved at writes what it read."""
    out = resume(run, "--steps", str(make.BEFORE), "--out", "again")
    now, then = out.parent / "again" / "checkpoints" / MIDDLE, FOLDER / run / "run" / "checkpoints" / MIDDLE
    for name in ("model.safetensors", "optimizer.safetensors"):
        same(load_file(now / name), load_file(then / name))
