"""State_dicts of an earlier format, and of a later one, through every door that states come in by."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

import gradfold
from gradfold.codecs import FORMAT, state_codec, written_by
from gradfold.errors import FoldError, FormatError
from tests.format_1 import BOUND, EXACT, TOP, as_format_1, close, decoded_then, level_of_then, moments_of
from tests.optim.coded import assert_same, everything, make, train

KINDS = pytest.mark.parametrize("kind", ["int8", "int4"])
CONVERTED = "are converted to format 2, once"


def saved_by(options, **kwargs):
    """A model that has trained, its optimizer, and its state_dict with codes of format 1."""
    model, optimizer = make(options, **kwargs)
    train(model, optimizer, 2)
    return model, optimizer, as_format_1(optimizer.state_dict())


def silently(load, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(*args)


def check(kind, found, saved, model, name="exp_avg_sq"):
    params = list(model.parameters())
    now, then = moments_of(found["state"], params, name), moments_of(saved["state"], params, name)
    assert now.keys() == then.keys() and then
    for place in then:
        close(kind, now[place], then[place])


# the codes ------------------------------------------------------------------------------------------------------------


@KINDS
def test_levels_of_format_1(kind):
    """Decoded as they were; and today's codec reads them within 1e-5, as where a store of one's own keeps them."""
    count = TOP[kind] + 1
    wanted = torch.tensor([level_of_then(kind, code) * 3.0 for code in range(count)], dtype=torch.float64)
    now, codes = state_codec(kind, False), torch.arange(count)[None]
    stored = codes if kind == "int8" else codes[:, : count // 2] | codes[:, count // 2 :] << 4
    parts = {"codes": stored.to(torch.uint8), "scales": torch.full((1, -(-count // 128)), 3.0)}
    before = written_by(now, 1)
    torch.testing.assert_close(before.decode(parts, count)[0].double(), wanted, rtol=2e-7, atol=0)
    torch.testing.assert_close(now.decode(parts, count)[0].double(), wanted, rtol=1.1e-5, atol=0)
    assert written_by(now, FORMAT) is now
    with pytest.raises(NotImplementedError, match="no longer written"):
        before.encode(torch.ones(1, 4))


@KINDS
def test_how_far_a_conversion_changes_a_root(kind):
    """For every code beside every size of the block's largest; the bounds that the warning and formats.py state."""
    levels = torch.tensor([level_of_then(kind, code) for code in range(1, TOP[kind] + 1)])
    values = levels * (1 + torch.arange(1024)[:, None] / 1024)  # the last of each is the block's largest, in (1, 2)
    codec = state_codec(kind, False)
    blocks = torch.cat([values[:, i : i + 100] for i in range(0, values.shape[1], 100)], dim=1)
    change = []
    for start in range(0, values.shape[1], 100):
        block = torch.cat([blocks[:, start : start + 100], values[:, -1:]], dim=1)
        parts = codec.encode(block)
        new = codec.decode(parts, block.shape[1])
        least = codec.decode(codec.encode(torch.cat([block[:, -1:], block[:, -1:] * 1e-30], dim=1)), 2)[:, 1:]
        inside = new > least
        change.append(((new.double() / block.double()).sqrt() - 1)[inside])
    change = torch.cat(change)
    assert change.abs().max() == pytest.approx(BOUND[kind], rel=0.01)
    assert f"{100 * BOUND[kind]:.1f}%" == {"int8": "3.9%", "int4": "18.4%"}[kind]
    assert f"{100 * (1 / (1 + change.min()) - 1):.2g}%" == {"int8": "4.1%", "int4": "22%"}[kind]


# what state_dict says -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "numbered"),
    [({}, False), ({"capturable": True}, False), ({"states": "int8"}, True), ({"rounding": "stochastic"}, True)],
    ids=str,
)
def test_the_number_stands_where_it_matters(options, numbered):
    model, optimizer = make(options)
    train(model, optimizer, 1)
    group = optimizer.state_dict()["param_groups"][0]
    wanted = (FORMAT, gradfold.__version__) if numbered else (None, None)
    assert (group.get("format"), group.get("gradfold")) == wanted
    assert not {"format", "gradfold"} & optimizer.param_groups[0].keys()
    assert not {"format", "gradfold"} & optimizer.torch_state_dict()["param_groups"][0].keys()


def test_the_number_of_a_loaded_group_does_not_stay():
    """Else what is written later would say the number of what was read."""
    _, optimizer, saved = saved_by({"states": "int8"})
    with pytest.warns(UserWarning, match=CONVERTED):
        optimizer.load_state_dict(saved)
    saved = optimizer.state_dict()
    silently(optimizer.load_state_dict, saved)
    for group in optimizer.param_groups:
        assert not {"format", "gradfold"} & group.keys()


# format 1 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "hyper", "names", "kind"),
    [
        ("AdamW", {}, ["exp_avg_sq"], "int8"),
        ("AdamW", {"amsgrad": True}, ["exp_avg_sq", "max_exp_avg_sq"], "int4"),
        ("RMSprop", {"momentum": 0.9}, ["square_avg"], "int8"),
        ("Adagrad", {}, ["sum"], "int4"),
        ("NAdam", {}, ["exp_avg_sq"], "int4"),
    ],
    ids=["AdamW", "AMSGrad", "RMSprop", "Adagrad", "NAdam"],
)
def test_every_rule_with_second_moments(rule, hyper, names, kind):
    """Blocks that are short, odd and several to a row; convolutions; params with names."""
    model = make({}, folded=False)[0]
    optimizer = getattr(gradfold, rule)(model.named_parameters(), lr=1e-3, states=kind, small_size=0, **hyper)
    train(model, optimizer, 1)
    saved = as_format_1(optimizer.state_dict())
    with pytest.warns(UserWarning, match=CONVERTED) as said:
        optimizer.load_state_dict(saved)
    count = len(names) * len(list(model.parameters()))
    assert f"{count} of them ({', '.join(names)})" in str(said[0].message) and len(said) == 1
    found = optimizer.state_dict()
    for name in names:
        check(kind, found, saved, model, name)
    for index, states in saved["state"].items():  # signed codes, counters
        for key in (key for key in states if key.partition(".")[0] not in names):
            assert torch.equal(found["state"][index][key], states[key]), key


@pytest.mark.parametrize("rule", ["Lion", "SGD"])
def test_rules_without_second_moments_have_nothing_to_convert(rule):
    model = make({}, folded=False)[0]
    arguments = {"momentum": 0.9} if rule == "SGD" else {}
    optimizer = getattr(gradfold, rule)(model.parameters(), lr=1e-3, states="int8", small_size=0, **arguments)
    train(model, optimizer, 1)
    before = everything(model, optimizer)
    silently(optimizer.load_state_dict, as_format_1(optimizer.state_dict()))
    assert_same(before, everything(model, optimizer))


@pytest.mark.parametrize(
    ("options", "random"),
    [
        ({"rounding": "stochastic"}, True),
        ({"states": "bf16", "rounding": "nearest"}, False),
        ({"states": "fp32"}, False),
        ({"states": "fp32", "rounding": "stochastic"}, True),
        ({"master": "split8"}, True),
        ({"master": "split16"}, False),
        ({"seed": 3}, False),
        ({"states": None}, False),
    ],
    ids=str,
)
def test_without_codes_only_random_bits_differ(options, random):
    """And where none are drawn it is as it was, without a word. Every bit of the states comes back."""
    model, optimizer, saved = saved_by({"small_size": 0, **options})
    before = everything(model, optimizer)
    if random:
        with pytest.warns(UserWarning, match="draws other bits") as said:
            optimizer.load_state_dict(saved)
        assert len(said) == 1 and CONVERTED not in str(said[0].message)
    else:
        silently(optimizer.load_state_dict, saved)
    assert_same(before, everything(model, optimizer))
    silently(optimizer.load_state_dict, {**saved, "state": {}})  # nothing has been drawn yet


def test_codes_of_format_1_beside_another_number():
    """As where a checkpoint is read into a dictionary that had one: scales of format 2 are powers of two."""
    model, optimizer, saved = saved_by({"states": "int8", "small_size": 0})
    saved["param_groups"] = optimizer.state_dict()["param_groups"]
    with pytest.warns(UserWarning, match=CONVERTED) as said:
        optimizer.load_state_dict(saved)
    assert "draws other bits" not in str(said[0].message)
    check("int8", optimizer.state_dict(), saved, model)


def test_codes_of_format_2_without_their_number():
    """As where a framework keeps the keys that it knows: codes that mean the same keep their bytes."""
    model, optimizer = make({"states": "int8", "small_size": 0})
    train(model, optimizer, 2)
    saved, before = copy.deepcopy(optimizer.state_dict()), everything(model, optimizer)
    del saved["param_groups"][0]["format"], saved["param_groups"][0]["gradfold"]
    with pytest.warns(UserWarning, match="draws other bits") as said:
        optimizer.load_state_dict(saved)
    assert CONVERTED not in str(said[0].message)
    assert_same(before, everything(model, optimizer))


def test_groups_are_looked_at_one_by_one():
    """One of torch's, one of format 1, one of format 2."""
    layers = [nn.Linear(40, 30, bias=False) for _ in range(3)]
    groups = [
        {"params": layers[0].parameters()},
        {"params": layers[1].parameters(), "states": "int8", "small_size": 0},
        {"params": layers[2].parameters(), "states": "int4", "small_size": 0},
    ]
    optimizer = gradfold.AdamW(groups)
    sum(layer(torch.ones(2, 40)).square().sum() for layer in layers).backward()
    optimizer.step()
    new = optimizer.state_dict()
    old = copy.deepcopy(new)
    old["param_groups"] = [{k: v for k, v in g.items() if k not in ("format", "gradfold")} for g in old["param_groups"]]
    old["param_groups"][2] = new["param_groups"][2]
    old["state"][1]["exp_avg_sq.scales"] *= 0.7
    with pytest.warns(UserWarning, match=r"1 of them \(exp_avg_sq\) .* at most 3.9% \(int8\), and"):
        optimizer.load_state_dict(old)
    found = optimizer.state_dict()["state"]
    close("int8", *[moments_of(of, [layer.weight for layer in layers])[1, ""] for of in (found, old["state"])])
    for index in (0, 2):
        assert all(torch.equal(found[index][key], value) for key, value in old["state"][index].items())


def test_blocks_of_zeros_and_of_what_is_not_finite():
    _, optimizer, saved = saved_by({"states": "int8", "small_size": 0})
    scales = saved["state"][0]["exp_avg_sq.scales"]
    scales[:4, 0] = torch.tensor([0.0, math.inf, math.nan, 1e-40])
    saved["state"][0]["exp_avg_sq.codes"][4] = 0
    with pytest.warns(UserWarning, match=CONVERTED):
        optimizer.load_state_dict(saved)
    values = optimizer.torch_state_dict()["state"][0]["exp_avg_sq"]
    assert not values[0, :128].any() and not values[4].any()
    assert not values[1:3, :128].isfinite().any()
    assert values[5:].isfinite().all()


@KINDS
@pytest.mark.parametrize("into", ["fp32", None, "bf16", "int4", "int8"], ids=str)
def test_format_1_into_another_form(kind, into):
    """A saved group's options are taken over; where the user has changed them, states are decoded as they were."""
    model, _, saved = saved_by({"states": kind, "small_size": 0}, dtype=torch.float32)
    group = saved["param_groups"][0]
    if into is None:
        del group["states"]
    else:
        group["states"] = into
    twin, other = make({"states": into} if into else {}, dtype=torch.float32)
    if into in ("fp32", None):
        silently(other.load_state_dict, saved)
    else:
        with pytest.warns(UserWarning, match=CONVERTED if into == kind else "draws other bits"):
            other.load_state_dict(saved)
    decoded = other.torch_state_dict()["state"]
    for (index, _), then in moments_of(saved["state"], list(model.parameters())).items():
        old, new = decoded_then(kind, *then), decoded[index]["exp_avg_sq"].double().flatten()
        change = (new[old > 0] / old[old > 0]).sqrt() - 1
        allowed = {"fp32": EXACT, None: EXACT, "bf16": 2.0**-8, "int8": BOUND["int8"]}
        if into in allowed:
            assert change.abs().quantile(0.95) <= allowed[into] + EXACT, "all but what is below int8's range"
        assert torch.equal(new == 0, old == 0)
    train(twin, other, 1)


def test_what_cannot_be_told_apart_is_refused_and_changes_nothing():
    """A weight of one column has as many codes in int8 as in int4."""
    layer = nn.Linear(1, 8, bias=False)
    optimizer = gradfold.Adagrad(layer.parameters(), states="int8", small_size=0)
    layer(torch.ones(2, 1)).sum().backward()
    optimizer.step()
    saved = as_format_1(optimizer.state_dict())
    saved["param_groups"][0]["states"] = "fp32"
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="'sum' is saved as sum.codes, sum.scales"):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    assert all(torch.equal(before["state"][0][key], value) for key, value in optimizer.state_dict()["state"][0].items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("exp_avg_sq.scales"), "exp_avg_sq"),
        (lambda s: s.update({"exp_avg_sq.codes": s["exp_avg_sq.codes"].float()}), "exp_avg_sq.codes.*float32"),
        (lambda s: s.update({"exp_avg_sq.codes": s["exp_avg_sq.codes"][:-1]}), "exp_avg_sq.codes.*shape"),
        (lambda s: s.update({"exp_avg_sq.codes[0:9999]": s["exp_avg_sq.codes"]}), "slices"),
    ],
    ids=["a part missing", "dtype", "shape", "a slice"],
)
def test_spoilt_states_of_format_1_are_refused_and_nothing_changes(spoil, message):
    model, optimizer, saved = saved_by({"states": "int8", "small_size": 0})
    spoil(saved["state"][3])
    before, kept = everything(model, optimizer), copy.deepcopy(saved)
    with pytest.raises(ValueError, match=message):
        silently(optimizer.load_state_dict, saved)
    assert_same(before, everything(model, optimizer))
    assert saved["param_groups"] == kept["param_groups"]


def test_the_dictionary_that_is_loaded_stays_as_it_is():
    _, optimizer, saved = saved_by({"states": "int4", "small_size": 0})
    kept = copy.deepcopy(saved)
    with pytest.warns(UserWarning, match=CONVERTED):
        optimizer.load_state_dict(saved)
    assert saved["param_groups"] == kept["param_groups"]
    for index, states in kept["state"].items():
        assert saved["state"][index].keys() == states.keys()
        assert all(torch.equal(saved["state"][index][key], value) for key, value in states.items())


# working sets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, axis", [("int8", "in"), ("int8", "out"), ("int4", "in")])
@pytest.mark.parametrize("whole", [False, True], ids=["slices", "whole states"])
def test_working_sets(kind, axis, whole):
    """Slices are converted one by one, active or not; whole states are converted, then cut."""

    def built(working_set):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(300, 24, bias=False), nn.Linear(24, 5, bias=False))
        optimizer = gradfold.AdamW(model.parameters(), states=kind, small_size=0)
        return model, optimizer, gradfold.fold(model, optimizer, working_set=working_set)

    def sets():
        return gradfold.WorkingSet(chunks=3, interval=1, axis=axis, offload="cpu")

    model, optimizer, _ = built(None if whole else sets())
    for _ in range(3):
        model(torch.ones(2, 300)).square().sum().backward()
        optimizer.step()
    saved = as_format_1(optimizer.state_dict())
    for when in ("folded", "before folding"):
        if when == "folded":
            model, optimizer, _ = built(sets())
            with pytest.warns(UserWarning, match=CONVERTED) as said:
                optimizer.load_state_dict(saved)
        elif whole:
            model, optimizer, fold = built(None)
            fold.remove()
            with pytest.warns(UserWarning, match=CONVERTED) as said:
                optimizer.load_state_dict(saved)
            silently(lambda: gradfold.fold(model, optimizer, working_set=sets()))  # noqa: B023
        assert len(said) == 1
        if not whole:
            check(kind, optimizer.state_dict(), saved, model)
            continue
        params = list(model.parameters())
        found = moments_of(optimizer.state_dict()["state"], params)
        assert any(suffix for _, suffix in found)
        decoded = optimizer.torch_state_dict()["state"]
        for (index, _), then in moments_of(saved["state"], params).items():
            old = decoded_then(kind, *then)
            change = (decoded[index]["exp_avg_sq"].double().flatten()[old > 0] / old[old > 0]).sqrt() - 1
            assert change.abs().quantile(0.9) <= BOUND[kind] + EXACT and change.max() < 0.4143


# copies and pickles ---------------------------------------------------------------------------------------------------


def old_pickle(optimizer, saved):
    """The optimizer as a gradfold of format 1 would have pickled it."""
    state = optimizer.__getstate__()
    state.pop("_format")
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state["state"] = {param: saved["state"][index] for index, param in enumerate(params)}
    fresh = type(optimizer).__new__(type(optimizer))
    return fresh, copy.deepcopy(state)


def test_a_pickle_of_format_1():
    model, optimizer, saved = saved_by({"states": "int8", "small_size": 0, "rounding": "stochastic"})
    fresh, state = old_pickle(optimizer, saved)
    with pytest.warns(UserWarning, match=CONVERTED) as said:
        fresh.__setstate__(state)
    assert len(said) == 1
    check("int8", fresh.state_dict(), saved, model)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_of_today_are_copies(copied):
    """Also of states that a conversion would change: nothing says that they are of format 1."""
    model, optimizer = make({"states": "int8", "small_size": 0, "rounding": "stochastic"}, folded=False)
    train(model, optimizer, 1)
    other = silently(copied, optimizer)
    mine, theirs = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert all(torch.equal(theirs[index][key], value) for index, of in mine.items() for key, value in of.items())


def test_torchs_own_load_state_dict_is_refused_for_codes():
    """It casts them to the weight's dtype, and scales with them."""
    for options, key in (({"states": "int8"}, "exp_avg.codes"), ({"master": "split8"}, "weight.residual")):
        model, optimizer = make({**options, "small_size": 0})
        train(model, optimizer, 1)
        before = everything(model, optimizer)
        with pytest.raises(FoldError, match=f"{key}.*call optimizer.load_state_dict"):
            torch.optim.Optimizer.load_state_dict(optimizer, copy.deepcopy(optimizer.state_dict()))
        assert_same(before, everything(model, optimizer))


def test_torchs_own_load_state_dict_of_plain_states():
    model, optimizer = make({"rounding": "stochastic"})
    train(model, optimizer, 1)
    silently(torch.optim.Optimizer.load_state_dict, optimizer, copy.deepcopy(optimizer.state_dict()))
    assert not {"format", "gradfold"} & optimizer.param_groups[0].keys()
    with pytest.warns(UserWarning, match="draws other bits"):
        torch.optim.Optimizer.load_state_dict(optimizer, as_format_1(optimizer.state_dict()))


# later formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format": FORMAT + 1, "gradfold": "9.8.7"},
            rf"param_groups\[0\] has format={FORMAT + 1}: gradfold 9.8.7 wrote",
        ),
        ({"format": FORMAT + 1, "states": "int2"}, f"format={FORMAT + 1}"),  # before an option that is unknown here
        ({"format": "2"}, "format='2': a number from 1 to 2"),
        ({"format": 0}, "format=0"),
        ({"format": True}, "format=True"),
        ({"format": None}, "format=None"),
    ],
    ids=str,
)
@pytest.mark.parametrize("folded", [True, False], ids=["folded", "unfolded"])
def test_a_later_format_is_refused_and_nothing_changes(change, message, folded):
    model, optimizer = make({"states": "int8", "small_size": 0}, folded=folded)
    train(model, optimizer, 1)
    saved, before = copy.deepcopy(optimizer.state_dict()), everything(model, optimizer)
    saved["param_groups"][0] |= change
    groups = optimizer.state_dict()["param_groups"]
    with pytest.raises(FormatError, match=message) as caught:
        optimizer.load_state_dict(saved)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, FoldError)
    with pytest.raises(FormatError, match=message):
        torch.optim.Optimizer.load_state_dict(optimizer, saved)
    assert_same(before, everything(model, optimizer))
    assert optimizer.state_dict()["param_groups"] == groups


def test_a_pickle_of_a_later_format_is_refused():
    _, optimizer = make({"states": "int8"}, folded=False)
    file = io.BytesIO()
    state = {**optimizer.__getstate__(), "_format": FORMAT + 1}
    torch.save(state, file)
    file.seek(0)
    with pytest.raises(FormatError, match=f"format={FORMAT + 1}"):
        type(optimizer).__new__(type(optimizer)).__setstate__(torch.load(file, weights_only=False))
