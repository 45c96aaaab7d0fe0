"""Coded states and stochastic rounding through an optimizer: what is stored, and that it is the same however a step is
cut, folded or resumed."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import gradfold
from gradfold.codecs import state_codec, weight_codec
from gradfold.errors import FoldError
from tests.cases import STATE_ROWS
from tests.optim.coded import (
    MASTERS,
    ROUNDINGS,
    STATES,
    Model,
    assert_same,
    each_combination,
    each_states,
    everything,
    make,
    train,
)
from tests.pairs import each_pair, in_turn


@each_combination
def test_folded_in_any_tiles_and_unfolded_are_bit_identical(states, rounding, master):
    options = {"states": states, "rounding": rounding, "master": master}
    runs = []
    for folded, scratch_bytes in ((False, None), (True, 4_000), (True, 50_000), (True, 8 * 2**20)):
        model, optimizer = make(options, folded=folded, scratch_bytes=scratch_bytes)
        train(model, optimizer, 2)
        runs.append(everything(model, optimizer))
    for run in runs[1:]:
        assert_same(runs[0], run)


TILED = [
    (torch.float64, {}, 1e-13),
    (torch.float32, {}, 1e-5),
    (torch.float32, {"states": "int8"}, 1e-3),
    (torch.bfloat16, {"states": "int8", "rounding": "stochastic"}, 1e-3),
]


@pytest.mark.parametrize(("dtype", "storage", "most"), TILED, ids=str)
@pytest.mark.parametrize("tokens", [16, 300])
def test_tiles_change_no_more_than_the_rounding_of_sums(dtype, storage, most, tokens):
    """docs/bytes_per_parameter.md says how much: gradients are sums, and other tiles may add in another order."""
    weights = []
    for scratch_bytes in (8 * 2**20, 2**16, 1):
        torch.manual_seed(0)
        model = nn.Linear(60, 70).to(dtype)
        start = model.weight.detach().double().clone()
        optimizer = gradfold.AdamW(model.parameters(), lr=1e-3, **storage)
        gradfold.fold(model, optimizer, scratch_bytes=scratch_bytes)
        for _ in range(3):
            model(torch.randn(tokens, 60).to(dtype)).pow(2).mean().backward()
            optimizer.step()
        weights.append(model.weight.detach().double())
    for weight in weights[1:]:
        assert (weight - weights[0]).norm() <= most * (weights[0] - start).norm()


@each_pair(states=STATES, rounding=ROUNDINGS, master=MASTERS, named=[False, True])
def test_resuming_is_bit_identical(states, rounding, master, named):
    options = {"states": states, "rounding": rounding, "master": master}
    model, optimizer = make(options, named=named)
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 3, start=3)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, resumed = make({}, named=False)  # the options come with the state_dict, the names of the streams too
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, 3, start=3)
    assert_same(everything(model, optimizer), everything(other, resumed))


@pytest.mark.filterwarnings("ignore:Lion with states='int4'")
@in_turn(2, row=STATE_ROWS, states=STATES)
def test_any_rule_with_any_states(row, states):
    if states not in (None, "fp32") and row.hyper.get("centered"):
        with pytest.raises(ValueError, match="centered=False"):
            make({"states": states}, row)
        return
    if states not in (None, "fp32") and row.name in ("ASGD", "Rprop"):
        with pytest.raises(ValueError, match=f"states='{states}': state '(ax|prev)' must be fp32: .*use states='fp32'"):
            make({"states": states}, row)
        return
    options = {"states": states, "rounding": "stochastic", "small_size": 0}
    runs = []
    for folded, scratch_bytes in ((False, None), (True, 5_000)):
        model, optimizer = make(options, row, folded=folded, scratch_bytes=scratch_bytes)
        before = everything(model, optimizer)
        train(model, optimizer, 3)
        runs.append(everything(model, optimizer))
        assert all(t.isfinite().all() for t in runs[-1].values() if t.is_floating_point())
        assert all(not torch.equal(before[name], runs[-1][name]) for name, _ in model.named_parameters())
    assert_same(*runs)


def test_random_bits_depend_on_seed_step_and_parameter():
    def stepped(seed, start=0):
        model = nn.Linear(256, 64, bias=False, dtype=torch.bfloat16)
        nn.init.ones_(model.weight)
        optimizer = gradfold.SGD(model.parameters(), lr=1e-4, rounding="stochastic", seed=seed)
        if start:
            model.weight.grad = torch.zeros_like(model.weight)
            for _ in range(start):
                optimizer.step()
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        return model.weight.detach()

    one, again, seeded, later = stepped(0), stepped(0), stepped(1), stepped(0, start=1)
    assert torch.equal(one, again) and 0 < (one != 1).sum() < one.numel()
    assert not torch.equal(one, seeded) and not torch.equal(one, later)


def test_a_renamed_stream_survives_the_other_way_of_giving_parameters():
    """Saved with places, loaded by an optimizer that has names, saved again, loaded by one that has none."""
    model, optimizer = make({"states": "int8", "rounding": "stochastic"})
    train(model, optimizer, 1)
    for named in (True, False, True):
        other, resumed = make({}, named=named)
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert [resumed.stream_of(p) for p in other.parameters()] == [
            str(i) for i in range(len(list(other.parameters())))
        ]
        model, optimizer = other, resumed


# what is stored ------------------------------------------------------------------------------------------------------


def test_what_adamw_stores():
    model, optimizer = make({"states": "int8", "master": "split8"})
    state = optimizer.state[model.embed.weight]
    kinds = {key: (tuple(t.shape), t.dtype) for key, t in state.items()}
    assert kinds == {
        "step": ((), torch.float32),
        "exp_avg.codes": ((50, 200), torch.int8),
        "exp_avg.scales": ((50, 2), torch.float32),
        "exp_avg_sq.codes": ((50, 200), torch.uint8),
        "exp_avg_sq.scales": ((50, 2), torch.float32),
        "weight.residual": ((50, 200), torch.int8),
    }
    for small in (model.small.weight, model.norm.weight, model.conv.bias):
        assert {key: t.dtype for key, t in optimizer.state[small].items()} == {
            "step": torch.float32,
            "exp_avg": torch.float32,
            "exp_avg_sq": torch.float32,
            "weight.residual": torch.int8,
        }


def test_small_tensors_can_be_told_otherwise():
    model, optimizer = make({"states": "int8", "small_size": 0})
    for param in model.parameters():
        assert optimizer.state[param]["exp_avg.codes"].dtype == torch.int8


def test_options_by_group():
    model = Model()
    groups = [
        {"params": [model.embed.weight], "states": "bf16"},
        {"params": [model.wide.weight], "states": "int4", "master": "split16"},
        {"params": [model.small.weight], "states": None},
    ]
    optimizer = gradfold.AdamW(groups, states="int8")
    for param in (model.wide.bias, *model.norm.parameters(), *model.conv.parameters(), model.small.bias):
        param.requires_grad_(False)
    gradfold.fold(model, optimizer)
    assert optimizer.state[model.embed.weight]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[model.wide.weight]["exp_avg.codes"].shape == (70, 150)
    assert optimizer.state[model.wide.weight]["weight.residual"].dtype == torch.int16
    assert optimizer.state[model.small.weight]["exp_avg"].dtype == torch.bfloat16


def test_without_options_the_groups_are_torchs():
    ours = gradfold.AdamW([nn.Parameter(torch.zeros(2))])
    theirs = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    assert ours.state_dict()["param_groups"][0].keys() == theirs.state_dict()["param_groups"][0].keys()


def test_a_bf16_second_moment_decays_only_when_rounded_stochastically():
    def decayed(rounding):
        param = nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
        optimizer = gradfold.AdamW([param], lr=0.0, states="bf16", rounding=rounding)
        param.grad = torch.ones_like(param)
        optimizer.step()
        start = optimizer.state[param]["exp_avg_sq"].float().mean()
        param.grad = torch.zeros_like(param)
        for _ in range(500):
            optimizer.step()
        return float(optimizer.state[param]["exp_avg_sq"].float().mean() / start)

    assert decayed("nearest") == 1.0
    assert decayed(None) == pytest.approx(0.999**500, rel=0.02)  # 8,192 elements


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"states": "int7"}, "states='int7'.*'int8'"),
        ({"rounding": "up"}, "rounding='up'.*'stochastic'"),
        ({"master": "split4"}, "master='split4'.*'split8'"),
        ({"small_size": -1}, "small_size=-1"),
        ({"seed": 1.5}, "seed=1.5"),
    ],
    ids=str,
)
def test_unknown_names(options, message):
    with pytest.raises(ValueError, match=message):
        make(options, folded=False)
    model = Model()
    optimizer = gradfold.AdamW([model.embed.weight])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [model.wide.weight], **options})
    assert len(optimizer.param_groups) == 1


def test_lion_with_int4_is_warned_of_where_it_is_made():
    with pytest.warns(UserWarning, match="states='int8'") as caught:
        gradfold.Lion([nn.Parameter(torch.zeros(2, 2))], states="int4")
    assert caught[0].filename == __file__


def test_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError, match="state_dtype"):
        gradfold.AdamW([nn.Parameter(torch.zeros(2))], state_dtype="int8")


def test_float64_weights_and_codecs():
    with pytest.raises(ValueError, match=r"float64.*fp32|fp32.*float64"):
        make({"states": "int8"}, dtype=torch.float64)


def test_changing_states_in_a_group_is_refused_before_anything_moves():
    model, optimizer = make({"states": "fp32"}, folded=False)
    train(model, optimizer, 2)
    before = everything(model, optimizer)
    for states in ("int8", "bf16"):
        optimizer.param_groups[0]["states"] = states
        model.loss(5).backward()
        with pytest.raises(FoldError, match="torch_state_dict"):
            optimizer.step()
        optimizer.zero_grad()
        changed = {k for k, v in everything(model, optimizer).items() if k in before and not torch.equal(v, before[k])}
        assert not {k for k in changed if not k.endswith("step")}


def test_the_report_says_how_states_are_stored_and_stepped(monkeypatch, capsys):
    model = Model()
    fold = gradfold.fold(model, gradfold.AdamW(model.parameters(), states="int8", master="split8"))
    rows = {row.name: row.states for row in fold.report().rows}
    assert rows["wide.weight"] == "int8 + split8"
    assert rows["norm.weight"] == "fp32 + split8"
    assert "int8 + split8" in str(fold.report()) and not capsys.readouterr().out
    monkeypatch.setenv("GRADFOLD_COMPILE", "0")
    assert fold.report().backend == "reference, not compiled (GRADFOLD_COMPILE=0)"
    fold.remove()
    model = Model()
    fold = gradfold.fold(model, gradfold.AdamW(model.parameters()))
    assert fold.report().backend == "reference"
    assert {row.states for row in fold.report().rows} == {"bfloat16"}


@each_states
def test_bytes_per_parameter_as_the_codecs_say(states):
    """Counted from what is stored, for the large weights."""
    model, optimizer = make({"states": states, "master": "split8"})
    for param in (model.embed.weight, model.wide.weight, model.conv.weight):
        stored = sum(t.numel() * t.element_size() for key, t in optimizer.state[param].items() if key != "step")
        codecs = [state_codec(states or "bf16", signed=signed) for signed in (True, False)]
        expected = sum(codec.bytes_per_element(param.shape) for codec in codecs) + 1
        assert math.isclose(stored / param.numel(), expected)
    assert weight_codec(torch.bfloat16, "split8").bytes_per_element((2, 2)) == 3


@pytest.mark.parametrize("states", ["bf16", "int8", "int4"])
def test_second_moments_to_nearest_warn(states):
    """They would stay where they are: their scales are powers of two."""
    w = torch.nn.Parameter(torch.zeros(64, 128))
    with pytest.warns(UserWarning, match=rf"rounding='nearest' with states='{states}'.*exp_avg_sq"):
        gradfold.AdamW([w], states=states, rounding="nearest")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "make",
    [
        lambda w: gradfold.AdamW([w], states="int8"),
        lambda w: gradfold.AdamW([w], states="int8", rounding="stochastic"),
        lambda w: gradfold.AdamW([w], rounding="nearest"),
        lambda w: gradfold.AdamW([w], states="fp32", rounding="nearest"),
        lambda w: gradfold.Lion([w], states="int8", rounding="nearest"),
        lambda w: gradfold.AdamW([w], states="int8", rounding="nearest", small_size=10**6),
    ],
)
def test_other_states_do_not_warn(make):
    make(torch.nn.Parameter(torch.zeros(64, 128)))
