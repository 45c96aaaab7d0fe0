"""Coded states, stochastic rounding and masters through an optimizer: what is stored, and that it is the same however
a step is cut, folded or resumed."""

import copy
import io
import itertools
import math

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import gradfold
from gradfold.codecs import state_codec, weight_codec
from gradfold.errors import FoldError
from tests.cases import each_state_set

STATES = [None, "fp32", "bf16", "int8", "int4"]
ROUNDINGS = [None, "nearest", "stochastic"]
MASTERS = [None, "split8", "split16"]
each_states = pytest.mark.parametrize("states", STATES, ids=str)
COMBINATIONS = [
    dict(states=states, rounding=rounding, master=master)
    for states, rounding, master in itertools.product(STATES, ROUNDINGS, MASTERS)
]
each_combination = pytest.mark.parametrize("options", COMBINATIONS, ids=lambda o: "-".join(map(str, o.values())))


class Model(nn.Module):
    """Integers for gradients: dY and X are small whole numbers, so that every GEMM and every order of sums is exact."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 200)  # 1.56 blocks a row
        self.wide = nn.Linear(300, 70)
        self.small = nn.Linear(8, 4)
        self.norm = nn.LayerNorm(130)
        self.conv = nn.Conv2d(16, 40, 3)
        self.to(dtype)

    def loss(self, seed):
        g = torch.Generator().manual_seed(seed)
        dtype = self.wide.weight.dtype

        def whole(*shape):
            return torch.randint(-3, 4, shape, generator=g).to(dtype)

        ids = torch.randint(0, 50, (12,), generator=g)
        terms = [
            (self.embed(ids) * whole(12, 200)).sum(),
            (self.wide(whole(9, 300)) * whole(9, 70)).sum(),
            (self.small(whole(5, 8)) * whole(5, 4)).sum(),
            (self.norm.weight * whole(130)).sum() + (self.norm.bias * whole(130)).sum(),
            (self.conv.weight * whole(40, 16, 3, 3)).sum() + (self.conv.bias * whole(40)).sum(),
        ]
        return torch.stack(terms).sum()


def make(options, row=None, folded=True, scratch_bytes=None, named=False, dtype=torch.bfloat16):
    model = Model(dtype)
    parameters = model.named_parameters() if named else model.parameters()
    kind, hyper = (gradfold.AdamW, {"lr": 1e-2}) if row is None else (getattr(gradfold, row.name), row.arguments())
    optimizer = kind(parameters, **hyper, **options)
    if folded:
        gradfold.fold(model, optimizer, **({} if scratch_bytes is None else {"scratch_bytes": scratch_bytes}))
    return model, optimizer


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        model.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model, optimizer):
    """Every stored bit: weights, and each state's tensors by parameter and key."""
    names = {id(p): n for n, p in model.named_parameters()}
    bits = {f"{name}": p.detach().clone() for name, p in model.named_parameters()}
    for param, states in optimizer.state.items():
        bits |= {f"{names[id(param)]}/{key}": value.clone() for key, value in states.items()}
    return bits


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype, key
        assert torch.equal(one[key], other[key]), key


# the same bits -------------------------------------------------------------------------------------------------------


@each_combination
def test_folded_in_any_tiles_and_unfolded_are_bit_identical(options):
    runs = []
    for folded, scratch_bytes in ((False, None), (True, 4_000), (True, 50_000), (True, 8 * 2**20)):
        model, optimizer = make(options, folded=folded, scratch_bytes=scratch_bytes)
        train(model, optimizer, 4)
        runs.append(everything(model, optimizer))
    for run in runs[1:]:
        assert_same(runs[0], run)


@each_combination
@pytest.mark.parametrize("named", [False, True], ids=["places", "names"])
def test_resuming_is_bit_identical(options, named):
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
@each_state_set
@each_states
def test_any_rule_with_any_states(row, states):
    if states not in (None, "fp32") and row.hyper.get("centered"):
        with pytest.raises(ValueError, match="centered=False"):
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


def test_split16_is_fp32_training():
    """fp32 master weights, bit for bit, seen through their bf16 rounding."""
    options = {"states": "fp32", "master": "split16", "small_size": 0, "rounding": "nearest"}
    model, optimizer = make(options, folded=False)
    twin = Model().float()
    plain = gradfold.AdamW(twin.parameters(), lr=1e-2, states="fp32")
    for step in range(5):
        model.loss(step).backward()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            theirs.grad = ours.grad.float()
        optimizer.step()
        plain.step()
        optimizer.zero_grad()
    masters = gradfold.export_masters(model, optimizer)
    for name, theirs in twin.named_parameters():
        torch.testing.assert_close(masters[name], theirs.detach(), rtol=1e-6, atol=2e-8)
        assert torch.equal(dict(model.named_parameters())[name].float(), masters[name].bfloat16().float())


@pytest.mark.parametrize("master", ["split8", "split16"])
def test_new_masters_lie_anywhere_within_the_rounding_of_their_weights(master):
    """So that weights follow them in the mean; and all of a model's weights stay as they are."""
    model, optimizer = make({"master": master})
    before = Model()
    masters = gradfold.export_masters(model, optimizer)
    for name, param in before.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], param), name
        ulp = param.detach().float().abs().log2().floor().exp2() * 2**-7
        place = ((masters[name] - param.detach().float()) / ulp)[param.detach() != 0]
        assert (place.abs() <= 0.5).all()
        if place.numel() > 5_000:
            assert abs(place.mean()) < 0.02 and place.var() == pytest.approx(1 / 12, rel=0.05)
    for rounding, dithered in (("nearest", False), ("stochastic", True)):
        _, optimizer = make({"master": master, "rounding": rounding})
        assert any(state["weight.residual"].any() for state in optimizer.state.values()) == dithered


@pytest.mark.parametrize("master", ["split8", "split16"])
def test_masters_go_out_and_in(master):
    model, optimizer = make({"master": master})
    train(model, optimizer, 3)
    masters = gradfold.export_masters(model, optimizer)
    assert masters.keys() == dict(model.named_parameters()).keys()
    assert all(t.dtype == torch.float32 for t in masters.values())
    other, resumed = make({"master": master})
    gradfold.import_masters(other, resumed, load(save(masters)))
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(optimizer.state[a]["weight.residual"], resumed.state[b]["weight.residual"]), name


def test_masters_that_do_not_fit_change_nothing():
    model, optimizer = make({"master": "split8"})
    before = everything(model, optimizer)
    masters = gradfold.export_masters(model, optimizer)
    for bad, message in (
        ({**masters, "wide.weight": torch.zeros(3, 3)}, "wide.weight.*shape"),
        ({k: v for k, v in masters.items() if k != "norm.bias"}, "norm.bias"),
        ({**masters, "other": torch.zeros(1)}, "other"),
    ):
        with pytest.raises(ValueError, match=message):
            gradfold.import_masters(model, optimizer, bad)
        assert_same(before, everything(model, optimizer))


# to and from torch ---------------------------------------------------------------------------------------------------


@each_states
def test_to_torch_and_back(states):
    model, optimizer = make({"states": states, "rounding": "stochastic"})
    train(model, optimizer, 3)
    exported = optimizer.torch_state_dict()
    theirs = torch.optim.AdamW([nn.Parameter(p.detach().float()) for p in model.parameters()])
    assert exported["param_groups"][0].keys() == theirs.state_dict()["param_groups"][0].keys()
    theirs.load_state_dict(exported)
    for ours, param in zip(model.parameters(), theirs.param_groups[0]["params"], strict=True):
        state = theirs.state[param]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(
            state[key].shape == ours.shape and state[key].dtype == torch.float32 for key in state.keys() - {"step"}
        )
        assert state["exp_avg"].any() and state["step"] == 3

    other, back = make({"states": states, "rounding": "stochastic"})
    before = everything(model, optimizer)
    other.load_state_dict(model.state_dict())
    back.load_state_dict(theirs.state_dict())
    after = everything(other, back)
    if states is None:  # as documented: plain states keep the dtype they come in
        after = {key: value.to(before[key].dtype) for key, value in after.items()}
    assert_same(before, after)  # a decoded state is encoded again as it was
    train(other, back, 1)


def test_loading_fp32_states_into_int8_is_close():
    theirs_model, theirs = make({"states": "fp32"})
    train(theirs_model, theirs, 4)
    _, optimizer = make({"states": "int8"})
    optimizer.load_state_dict(theirs.torch_state_dict())
    decoded = optimizer.torch_state_dict()["state"]
    exact = theirs.torch_state_dict()["state"]
    for index in exact:
        m, v = (exact[index][key] for key in ("exp_avg", "exp_avg_sq"))
        dm, dv = (decoded[index][key] for key in ("exp_avg", "exp_avg_sq"))
        assert (dm - m).norm() <= 0.05 * m.norm()
        assert (dv[v > 0].rsqrt() - v[v > 0].rsqrt()).abs().div(v[v > 0].rsqrt()).max() < 0.09


@each_combination
def test_state_dict_survives_safetensors(options):
    model, optimizer = make(options)
    train(model, optimizer, 2)
    packed = optimizer.state_dict()
    flat = {f"{index}/{key}": value for index, state in packed["state"].items() for key, value in state.items()}
    loaded = load(save(flat))
    packed["state"] = {
        index: {key: loaded[f"{index}/{key}"] for key in state} for index, state in packed["state"].items()
    }
    other, resumed = make({})
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(packed)
    assert_same(everything(model, optimizer), everything(other, resumed))


def test_state_dict_survives_distributed_checkpoint(tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    options = {"states": "int8", "rounding": "stochastic", "master": "split8"}
    model, optimizer = make(options)
    train(model, optimizer, 2)
    before = everything(model, optimizer)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path)
    assert_same(before, everything(model, optimizer))

    other, resumed = make(options)
    other.load_state_dict(model.state_dict())
    train(other, resumed, 1)
    target = {"optimizer": get_optimizer_state_dict(other, resumed)}
    dcp.load(target, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other, resumed, target["optimizer"])
    other.load_state_dict(model.state_dict())
    assert_same(before, everything(other, resumed))


# refusals ------------------------------------------------------------------------------------------------------------


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


def test_a_master_is_for_16_bits_alone():
    with pytest.raises(ValueError, match="float16"):
        make({"master": "split8"}, dtype=torch.float16)
    _, optimizer = make({"master": "split8"}, dtype=torch.float32)  # an fp32 weight is its own master
    assert not any(key.startswith("weight") for state in optimizer.state.values() for key in state)


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


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("exp_avg.scales"), "exp_avg"),
        (lambda s: s.update({"exp_avg.codes": s["exp_avg.codes"].float()}), "exp_avg.codes.*float32"),
        (lambda s: s.update({"exp_avg.codes": s["exp_avg.codes"][:, :-1]}), "exp_avg.codes.*shape"),
        (lambda s: s.update({"weight.residual": s["weight.residual"].short()}), "weight.residual.*int16"),
        (lambda s: s.update({"stranger": torch.zeros(1)}), "stranger"),
    ],
    ids=["a part missing", "dtype", "shape", "residual", "stranger"],
)
def test_spoilt_states_are_refused_and_nothing_changes(spoil, message):
    options = {"states": "int8", "master": "split8"}
    model, optimizer = make(options)
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    spoil(saved["state"][0])
    other, target = make(options)
    before = everything(other, target)
    with pytest.raises(ValueError, match=message):
        target.load_state_dict(saved)
    assert_same(before, everything(other, target))


def test_the_report_says_how_states_are_stored_and_stepped(monkeypatch, capsys):
    model = Model()
    fold = gradfold.fold(model, gradfold.AdamW(model.parameters(), states="int8", master="split8"))
    rows = {row.name: row.states for row in fold.report().rows}
    assert rows["wide.weight"] == "int8 + split8"
    assert rows["norm.weight"] == "fp32 + split8"
    assert "int8 + split8" in capsys.readouterr().out
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
