"""Mixtures of experts of transformers: their 3-D weights fold in every experts implementation, and step as torch's."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

import gradfold
from tests.moe import MODELS, loss_of
from tests.workset.test_steps import check as check_working_set
from tests.zoo import distance, no_gradients, ours, torchs

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("precise", "all_in_fp64")

HOWS = ["eager", "batched_mm", "grouped_mm"]  # the last one by transformers' own fallback, as torch's is not for fp64
OPTIONS = {
    "plain": {},
    "accumulate": {"accumulate": 2},
    "clip": {"clip_norm": 0.05},
    "two_pass": {"clip_norm": 0.05, "clip": "two_pass"},
    "clip_value": {"clip_value": 1e-3},
    "accumulate and clip": {"accumulate": 2, "clip_norm": 0.05},
    "non_reentrant": {},
    "reentrant": {},
    "reentrant and clip": {"clip_norm": 0.05},
}


@pytest.fixture
def all_in_fp64(monkeypatch):
    """Routers compute in fp32, whose roundings would hide a difference: in these tests they stay in fp64."""
    to_type, to = torch.Tensor.type, torch.Tensor.to

    def wide(t):
        return t.dtype == torch.float64

    def without_dtype(softmax):
        return lambda x, *args, **kw: softmax(x, *args, **{k: v for k, v in kw.items() if k != "dtype" or not wide(x)})

    for place in (F, torch, torch.Tensor):
        monkeypatch.setattr(place, "softmax", without_dtype(place.softmax))
    monkeypatch.setattr(
        torch.Tensor, "type", lambda t, *args: t if wide(t) and args == (torch.float32,) else to_type(t, *args)
    )
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda t, *args, **kw: t if wide(t) and (*args, *kw.values()) == (torch.float32,) else to(t, *args, **kw),
    )


@pytest.fixture(autouse=True)
def grouped_in_fp64(monkeypatch):
    """Let transformers take its own grouped product for fp64, which torch's does not multiply."""
    import transformers.integrations.moe as moe

    able = moe._can_use_grouped_mm
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda x, w, offs: w.dtype != torch.float64 and able(x, w, offs))


def pair(name, how):
    model = MODELS[name](how).double()
    return model, copy.deepcopy(model)


def share(fold):
    """The part of the parameters' elements that are folded, after backwards."""
    rows = fold.report().rows
    sizes = {row.name: torch.Size(row.shape).numel() for row in rows}
    return sum(sizes[row.name] for row in rows if row.route == "folded") / sum(sizes.values())


def train(plain, folded, options, steps=10, checkpointed=None):
    optimizers = torchs(plain), ours(folded)
    fold = gradfold.fold(folded, optimizers[1], **options)
    if checkpointed is not None:
        for model in (plain, folded):
            model.gradient_checkpointing_enable({"use_reentrant": checkpointed})
    count = options.get("accumulate", 1)
    for step in range(steps):
        for i in range(count):
            loss_of(plain, step * count + i).backward()
            fold.backward(loss_of(folded, step * count + i))
            assert no_gradients(folded)
        if "clip_norm" in options:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), options["clip_norm"])
        if "clip_value" in options:
            torch.nn.utils.clip_grad_value_(plain.parameters(), options["clip_value"])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return fold


def combinations(*axes):
    """All of them; quick are those where every value of the longest axis occurs once."""
    count = max(map(len, axes))
    quick = {tuple(axis[i % len(axis)] for axis in axes) for i in range(count)}
    return [pytest.param(*row, marks=() if row in quick else pytest.mark.slow) for row in itertools.product(*axes)]


@pytest.mark.parametrize(("name", "how", "what"), combinations(list(MODELS), HOWS, list(OPTIONS)))
def test_steps_are_torchs(name, how, what):
    plain, folded = pair(name, how)
    checkpointed = {"non": False, "ree": True}.get(what[:3])
    fold = train(plain, folded, OPTIONS[what], checkpointed=checkpointed)
    assert share(fold) >= 0.95
    assert distance(folded, plain) <= 1e-10


@pytest.mark.parametrize(
    ("name", "how", "axis", "what"), combinations(list(MODELS), HOWS, ["out", "in"], ["plain", "accumulate and clip"])
)
def test_working_sets(name, how, axis, what):
    """Slices of few experts, of a part of one, and of rows of all of them."""
    check_working_set(lambda: MODELS[name](how), loss_of, 6, chunks=7, axis=axis, fold_options=OPTIONS[what])


def test_a_saved_model_is_plain(tmp_path):
    plain, folded = pair("mixtral", "eager")
    train(plain, folded, {}, steps=2)
    folded.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert distance(loaded, folded) == 0
    assert {type(module) for module in loaded.modules()} == {type(module) for module in plain.modules()}


def test_torchs_own_grouped_product():
    """It runs in fp32; the update is torch's to fp32's digits."""
    plain = MODELS["qwen3_moe"]("grouped_mm")
    folded = copy.deepcopy(plain)
    fold = train(plain, folded, {"clip_norm": 0.5}, steps=3)
    assert share(fold) >= 0.95
    assert distance(folded, plain) <= 1e-4
