"""States that an older gradfold wrote (`fixtures`) load, and go on as that one did.

Those of `before_prepared` are of format 1 (`gradfold/codecs/formats.py`): what depends on codes or random bits is
converted, a warning says so, and it goes on close to what it became then. All else goes on bit for bit, as all of
`format_2` does.
"""

import json
import math
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file

from gradfold.codecs import MASTERS, export_master
from tests.fixtures.before_prepared import make
from tests.fixtures.format_2 import make as format_2
from tests.format_1 import BOUND, EXACT, close, decoded_now, decoded_then, moments_of

FOLDER = make.HERE
# Squares were summed in fp32 then; compiled steps sum them in fp64.
NORMS = torch.finfo(torch.float32).eps

LAST = f"step-{make.BEFORE + make.AFTER:06d}"
MIDDLE = f"step-{make.BEFORE:06d}"

# of format 1, and not what it was: how many states are converted; all of them are rounded at random
CHANGED = {"adamw_int8": 5, "adamw_int4": 5, "adamw_split8": 0, "adamw_split16": 5, "working_set_int8": 4}
BIT_FOR_BIT = [
    *[pytest.param(make, case, id=case) for case in make.CASES if case not in CHANGED],
    *[pytest.param(format_2, case, id=f"format_2 {case}") for case in format_2.CASES],
]


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


def load(of, case):
    return torch.load(of.HERE / f"{case}.pt", weights_only=True)


def same_cpu(of):
    """Roots and fused multiply-adds of torch's own kernels differ between instruction sets, by a last bit."""
    return torch.backends.cpu.get_cpu_capability() == json.loads((of.HERE / "made.json").read_text())["cpu_capability"]


def put(saved, model, optimizer, fold=None):
    """As a user does who resumes."""
    model.load_state_dict(saved["weights"])
    optimizer.load_state_dict(saved["optimizer"])
    if fold is not None:
        fold.load_state_dict(saved["fold"])


def put_silently(saved, model, optimizer, fold=None):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        put(saved, model, optimizer, fold)


def of_groups(optimizer, wanted):
    """Its param_groups, of the keys that were saved, but for the version: a newer gradfold may have more."""
    groups = optimizer.state_dict()["param_groups"]
    return [{k: group[k] for k in saved if k != "gradfold"} for group, saved in zip(groups, wanted, strict=True)]


def turns(found):
    """A working set's place, without what it did not keep then: rates of a round, and how many steps it has taken."""
    kept = found["optimizer"].get("working_set")
    if kept is None:
        return None
    schedule = {name: value for name, value in kept["schedule"].items() if name != "steps"}
    return {**{name: value for name, value in kept.items() if name != "rates"}, "schedule": schedule}


@pytest.mark.parametrize("of, case", BIT_FOR_BIT)
def test_all_states_come_back(of, case):
    saved = load(of, case)["before"]
    model, optimizer, fold = make.build(case, cases=of.CASES)
    put_silently(saved, model, optimizer, fold)
    found = make.snapshot(model, optimizer, fold)
    same(found["weights"], saved["weights"])
    same(found["fold"], saved["fold"])
    same(found["optimizer"]["state"], saved["optimizer"]["state"])
    groups = [{k: v for k, v in group.items() if k != "gradfold"} for group in saved["optimizer"]["param_groups"]]
    same(of_groups(optimizer, groups), groups)
    same(turns(found), saved["optimizer"].get("working_set"))


def goes_on(of, case, model, optimizer, fold):
    make.train(model, optimizer, make.BEFORE, make.AFTER)
    found, wanted, exactly = make.snapshot(model, optimizer, fold), load(of, case)["after"], same_cpu(of)
    same(found["weights"], wanted["weights"], exactly)
    same(found["optimizer"]["state"], wanted["optimizer"]["state"], exactly)
    same(found["fold"], wanted["fold"], exactly, NORMS)
    same(turns(found), wanted["optimizer"].get("working_set"), exactly, NORMS)


@pytest.mark.parametrize("of, case", BIT_FOR_BIT)
def test_the_next_steps_are_those_of_then(of, case):
    saved = load(of, case)["before"]
    model, optimizer, fold = make.build(case, cases=of.CASES)
    make.train(model, optimizer, 7, 1)  # whatever was here before
    put_silently(saved, model, optimizer, fold)
    goes_on(of, case, model, optimizer, fold)


@pytest.mark.parametrize("of, case", [row for row in BIT_FOR_BIT if "working_set" not in row.values[1]])
def test_loaded_before_folding(of, case):
    saved = load(of, case)["before"]
    model, optimizer, _ = make.build(case, folded=False, cases=of.CASES)
    put_silently(saved, model, optimizer)
    fold = make.fold(case, model, optimizer, of.CASES)
    fold.load_state_dict(saved["fold"])
    goes_on(of, case, model, optimizer, fold)


# format 1 -------------------------------------------------------------------------------------------------------------


def kind_of(case):
    return make.CASES[case][1]["states"]


def put_with_warning(case, saved, model, optimizer, fold=None):
    with pytest.warns(UserWarning, match="optimizer states of format 1") as said:
        put(saved, model, optimizer, fold)
    (message,) = [str(one.message) for one in said]
    assert "stochastic rounding draws other bits" in message
    count, kind = CHANGED[case], kind_of(case)
    assert (f"{count} of them (exp_avg_sq) are converted to format 2" in message) == bool(count)
    assert (f"at most {100 * BOUND.get(kind, 0):.1f}% ({kind})" in message) == bool(count)


@pytest.mark.parametrize("case", CHANGED)
def test_states_of_format_1_are_converted(case):
    """Second moments to the nearest of today's levels; signed codes, residuals and counters are what they were."""
    saved = load(make, case)["before"]
    model, optimizer, fold = make.build(case)
    put_with_warning(case, saved, model, optimizer, fold)
    now, then = make.snapshot(model, optimizer, fold), saved
    same(now["weights"], then["weights"])
    same(turns(now), then["optimizer"].get("working_set"))
    then, now = then["optimizer"]["state"], now["optimizer"]["state"]
    kept = [{i: {k: v for k, v in one.items() if "_sq" not in k} for i, one in of.items()} for of in (now, then)]
    same(*kept)
    params, kind = list(model.parameters()), kind_of(case)
    moments = moments_of(now, params)
    assert moments.keys() == moments_of(then, params).keys() and len({index for index, _ in moments}) == CHANGED[case]
    for place, old in moments_of(then, params).items():
        close(kind, moments[place], old)


@pytest.mark.parametrize(
    "case, folded",
    [(case, folded) for case in CHANGED for folded in (True, False) if folded or "working_set" not in case],
)
def test_format_1_goes_on_closely(case, folded):
    """The gradients depend on no weight, so first moments become what they became then, within their levels' 1e-5.

    A second moment may be half a level off when it is loaded, and then each of the two runs rounds it up or down twice.
    A step of AdamW is at most 1.01 lr here (Cauchy-Schwarz over the few gradients), divided by a root that is that far
    off.
    """
    saved, wanted = load(make, case)["before"], load(make, case)["after"]
    model, optimizer, fold = make.build(case, folded=folded)
    if fold is not None:
        make.train(model, optimizer, 7, 1)
    put_with_warning(case, saved, model, optimizer, fold)
    if fold is None:
        fold = make.fold(case, model, optimizer)
        fold.load_state_dict(saved["fold"])
    make.train(model, optimizer, make.BEFORE, make.AFTER)
    found, kind = make.snapshot(model, optimizer, fold), kind_of(case)

    for index, old in wanted["optimizer"]["state"].items():
        for key, value in old.items():
            new = found["optimizer"]["state"][index][key]
            if key.startswith("exp_avg.codes"):
                apart = (new.int() - value.int()).abs()  # a moment in the middle of two may take the other, each step
                assert apart.max() <= make.AFTER and apart.count_nonzero() <= 2
            elif key.startswith(("exp_avg", "step")) and "_sq" not in key:
                torch.testing.assert_close(new, value, rtol=0 if "step" in key else 2 * EXACT, atol=0, msg=key)

    half, level = (math.sqrt(13 / 12), math.sqrt(7 / 6)) if kind == "int8" else (math.sqrt(3 / 2), math.sqrt(2))
    first = half - 1  # of the first step: only the conversion
    second = 1.06 * half * level * level - 1  # of the second: each run has rounded once; a first moment's level is 6%
    moved = 0.01 * 1.01 * (first + second) if kind in BOUND else 0.0
    new, old = masters(case, model, found), masters(case, model, wanted)
    for name, value in old.items():
        unit = 2.0**-15 if "split8" in case else 2.0**-23
        rounding = 4 * unit * (value.abs() + 0.02)  # of two steps in two runs; it may have been larger before them
        assert ((new[name] - value).abs() <= moved + rounding).all(), name
    assert any(not torch.equal(new[name], old[name]) for name in old), "else this test is of another case"

    params = list(model.parameters())
    then = moments_of(wanted["optimizer"]["state"], params)
    ratios = []
    for place, (codes, scales, columns) in moments_of(found["optimizer"]["state"], params).items():
        now, before = decoded_now(kind, codes, scales, columns), decoded_then(kind, *then[place])
        assert torch.equal(now == 0, before == 0)
        ratios.append((now[before > 0] / before[before > 0]).sqrt())
    if ratios:
        ratio = torch.cat(ratios)
        assert ratio.max() <= half * level**4 + EXACT and ratio.min() >= 1 / (half * level**4) - EXACT
        assert float(ratio.log().mean().abs()) < {"int8": 0.01, "int4": 0.05}[kind], "no drift"


def masters(case, model, snapshot):
    """The weights in fp32, with what their residuals keep."""
    name = make.CASES[case][1].get("master")
    states = snapshot["optimizer"]["state"]
    found = {}
    for index, (key, _) in enumerate(model.named_parameters()):
        weight, residual = snapshot["weights"][key], states.get(index, {}).get("weight.residual")
        found[key] = weight.float() if residual is None else export_master(MASTERS[name], weight, residual)
    return found


def test_converted_once():
    """What is saved after that is of today's format, and is loaded as it is."""
    saved = load(make, "adamw_int8")["before"]
    model, optimizer, fold = make.build("adamw_int8")
    put_with_warning("adamw_int8", saved, model, optimizer, fold)
    again = make.snapshot(model, optimizer, fold)
    assert again["optimizer"]["param_groups"][0]["format"] == 2
    other = make.build("adamw_int8")
    put_silently(again, *other)
    same(make.snapshot(*other)["optimizer"]["state"], again["optimizer"]["state"])


@pytest.mark.parametrize("of", [make, format_2], ids=["before_prepared", "format_2"])
def test_every_file_is_of_a_case(of):
    assert sorted(path.stem for path in of.HERE.glob("*.pt")) == sorted(of.CASES)


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


@pytest.mark.parametrize("run, converted", [("delayed", False), ("working_set", True)])
def test_a_checkpoint_resumes(resume, run, converted, capsys):
    """Sums in a Llama are not exact, so losses are close; schedule, batches and chunks are the same."""
    out = resume(run)
    assert capsys.readouterr().out.count("optimizer states of format 1") == converted
    found, wanted = records(out / "metrics.jsonl"), records(FOLDER / run / "metrics.jsonl")
    assert len(found) == len(wanted)
    for new, old in zip(found, wanted, strict=True):
        for name in ("step", "lr", "tokens", "targets", "chunk", "chunks"):
            assert new.get(name) == old.get(name), name
        for name in ("loss", "held_out_loss", "grad_norm"):
            if name in old:
                assert new[name] == pytest.approx(old[name], rel=1e-3), name
    then, now = FOLDER / run / "after", out / "checkpoints" / LAST
    groups = json.loads((now / "trainer.json").read_text())["optimizer"]["param_groups"]
    assert all((["format", 2] in group["dict"]) == converted for group in groups)
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
    """A run that ends at the step it was saved at writes what it read, but for second moments of format 1."""
    out = resume(run, "--steps", str(make.BEFORE), "--out", "again")
    now, then = out.parent / "again" / "checkpoints" / MIDDLE, FOLDER / run / "run" / "checkpoints" / MIDDLE
    for name in ("model.safetensors", "optimizer.safetensors"):
        found, wanted = load_file(now / name), load_file(then / name)
        same(*[{k: v for k, v in of.items() if "exp_avg_sq." not in k} for of in (found, wanted)])
        for key in (key for key in wanted if "exp_avg_sq.codes" in key):
            scales, columns = key.replace("codes", "scales"), found[key].shape[-1]
            old = decoded_then("int8", *[wanted[k].reshape(-1, wanted[k].shape[-1]) for k in (key, scales)], columns)
            new = decoded_now("int8", *[found[k].reshape(-1, found[k].shape[-1]) for k in (key, scales)], columns)
            assert torch.equal(new == 0, old == 0)
            assert ((new / old)[old > 0].sqrt() - 1).abs().max() <= BOUND["int8"] + EXACT
