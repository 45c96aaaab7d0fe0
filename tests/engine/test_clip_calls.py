"""Clipping between backward and step(): ``fold.clip_grad_norm_``, and the functions of torch.nn.utils.

These are imported by name before any model is folded, as scripts do.
"""

import gc
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

import gradfold
from gradfold.engine import unwatch_clipping
from gradfold.engine.live import live_folds
from gradfold.errors import NonFiniteError
from tests.pairs import in_turn
from tests.zoo import Net, batches, distance, no_gradients, ours, same_bits, torchs, twins

CLOSE = 1e-12
INF = math.inf
NAN = math.nan
X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def mlp():
    return nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6, bias=False))


def backward(model, step=0):
    model((step + 1) * X).pow(2).sum().backward()


def folded(**options):
    """A torch model after one backward, and a folded one before it."""
    plain, model = twins(mlp)
    optimizer = ours(model)
    fold = gradfold.fold(model, optimizer, **options)
    backward(plain)
    return plain, model, optimizer, fold


# fold.clip_grad_norm_ -------------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "host": {"tape": "host"},
    "accumulate": {"accumulate": 2},
    "value": {"clip_value": 0.01},
    "skip": {"on_nonfinite": "skip"},
    "ignore": {"on_nonfinite": "ignore"},
}


@in_turn(2, how=OPTIONS, norm_type=[2.0, 1, 3.0, INF, "inf"])
def test_it_measures_at_once_and_clips_in_step(how, norm_type):
    """With another limit in each step: below the norm, above it, zero, none."""
    options = OPTIONS[how]
    plain, model = twins(lambda: Net("tied"))
    theirs, optimizer = torchs(plain, "SGD"), ours(model, "SGD")
    fold = gradfold.fold(model, optimizer, timing="deferred", **options)
    for step, limit in enumerate([0.05, 1e3, 0.5, 0.0, INF, 0.1]):
        for ids in batches(step + 2)[-options.get("accumulate", 1) :]:
            plain.loss(ids).backward()
            model.loss(ids).backward()
        before = float(get_total_norm([p.grad for p in plain.parameters()]))
        norm = fold.clip_grad_norm_(limit, norm_type)
        wanted = clip_grad_norm_(plain.parameters(), limit, norm_type)
        assert norm.shape == () and norm.dtype == wanted.dtype and norm.device == wanted.device
        assert float(norm) == pytest.approx(float(wanted), rel=CLOSE) and no_gradients(model)
        if "clip_value" in options:
            clip_grad_value_(plain.parameters(), options["clip_value"])
        for one in (theirs, optimizer):
            one.step()
            one.zero_grad()
        assert fold.grad_norm == pytest.approx(before, rel=CLOSE)
    assert distance(model, plain) < CLOSE


def test_the_dtype_of_the_norm():
    for dtype, wanted in [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)]:
        _, model = twins(mlp, dtype)
        optimizer = ours(model)
        fold = gradfold.fold(model, optimizer, timing="deferred")
        model(X.to(dtype)).sum().backward()
        assert fold.clip_grad_norm_(1.0).dtype == wanted
        optimizer.step()


def test_called_again_it_sees_what_the_first_call_left():
    plain, model, optimizer, fold = folded(timing="deferred")
    theirs = torchs(plain)
    backward(model)
    for limit, norm_type in [(0.5, 2.0), (0.7, 2.0), (0.1, INF), (INF, 1.0)]:
        norm = fold.clip_grad_norm_(limit, norm_type)
        assert float(norm) == pytest.approx(float(clip_grad_norm_(plain.parameters(), limit, norm_type)), rel=CLOSE)
    optimizer.step()
    theirs.step()
    assert distance(model, plain) < CLOSE


def test_it_clips_one_step_only():
    plain, model = twins(mlp)
    theirs, optimizer = torchs(plain, "SGD"), ours(model, "SGD")
    fold = gradfold.fold(model, optimizer, timing="deferred")
    for step in range(4):
        backward(plain, step)
        backward(model, step)
        if step % 2 == 0:
            clip_grad_norm_(plain.parameters(), 0.1)
            fold.clip_grad_norm_(0.1)
        for one in (theirs, optimizer):
            one.step()
            one.zero_grad()
    assert distance(model, plain) < CLOSE


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant", "mixed"])
def test_with_checkpoints(kind):
    """Hooked weights in reentrant segments wait for the call, or for step()."""
    plain, model = twins(lambda: Net("bptt"))
    theirs, optimizer = torchs(plain, "SGD"), ours(model, "SGD")
    fold = gradfold.fold(model, optimizer, timing="deferred")
    for step, ids in enumerate(batches(3)):
        plain.loss(ids, kind, step).backward()
        model.loss(ids, kind, step).backward()
        wanted = float(clip_grad_norm_(plain.parameters(), 0.3))
        assert float(fold.clip_grad_norm_(0.3)) == pytest.approx(wanted, rel=CLOSE)
        for one in (theirs, optimizer):
            one.step()
            one.zero_grad()
    assert distance(model, plain) < CLOSE


@pytest.mark.parametrize("master", [None, "split8"])
def test_with_a_working_set_and_coded_states(master):
    """As the fold's own clip_norm does: over the slices that are active."""
    models = [twins(mlp, torch.bfloat16)[0] for _ in range(2)]
    options = [{"timing": "deferred"}, {"clip_norm": 0.5}]
    folds = []
    for model, more in zip(models, options, strict=True):
        optimizer = gradfold.AdamW(model.parameters(), lr=1e-2, states="int8", master=master, small_size=0)
        folds.append(gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(chunks=3, interval=1), **more))
    for step in range(6):
        norms = []
        for model, fold in zip(models, folds, strict=True):
            model((step + 1) * X.bfloat16()).pow(2).sum().backward()
            norms.append(float(fold.clip_grad_norm_(0.5)))
            fold._state.optimizer.step()
            fold._state.optimizer.zero_grad()
        assert norms[0] == norms[1] == pytest.approx(folds[0].grad_norm, rel=1e-6)
    assert same_bits(*models)


def test_zero_grad_drops_it():
    plain, model, optimizer, fold = folded(timing="deferred")
    backward(model)
    fold.clip_grad_norm_(1e-3)
    optimizer.zero_grad()
    backward(model)
    optimizer.step()
    torchs(plain).step()
    assert distance(model, plain) < CLOSE


def test_before_any_backward_the_norm_is_zero():
    _, _, _, fold = folded(timing="deferred")
    assert fold.clip_grad_norm_(1.0) == 0


def test_a_parameter_unfrozen_after_the_forward_is_measured():
    plain, model = twins(mlp)
    theirs, optimizer = torchs(plain), ours(model)
    model[1].bias.requires_grad_(False)
    fold = gradfold.fold(model, optimizer, timing="deferred")
    hidden = model[0](X)
    model[1].bias.requires_grad_(True)
    model[2](model[1](hidden)).pow(2).sum().backward()
    backward(plain)
    wanted = clip_grad_norm_(plain.parameters(), 0.5)
    assert float(fold.clip_grad_norm_(0.5)) == pytest.approx(float(wanted), rel=CLOSE)
    optimizer.step()
    theirs.step()
    assert distance(model, plain) < CLOSE


@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("unscales", [True, False], ids=["unscale_", "scaled"])
def test_with_a_grad_scaler(unscales, overflow):
    """Without ``unscale_`` torch clips gradients that are still scaled, and so does this."""
    plain, model = twins(mlp)
    optimizers = torchs(plain, "SGD"), ours(model, "SGD")
    fold = gradfold.fold(model, optimizers[1], timing="deferred", on_nonfinite="skip")
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in optimizers]
    for step in range(4):
        norms = []
        for one, optimizer, scaler in zip((plain, model), optimizers, scalers, strict=True):
            scaler.scale((one((step + 1) * X).pow(2).sum()) * (INF if overflow and step == 1 else 1.0)).backward()
            if unscales:
                scaler.unscale_(optimizer)
            clips = fold.clip_grad_norm_ if one is model else lambda limit: clip_grad_norm_(plain.parameters(), limit)
            norms.append(float(clips(0.5)))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert norms[0] == pytest.approx(norms[1], rel=CLOSE, nan_ok=True)
    assert scalers[0].get_scale() == scalers[1].get_scale() and distance(model, plain) < CLOSE


@pytest.mark.parametrize("how", ["raise", "skip"])
def test_a_gradient_that_is_not_finite(how):
    _, model, optimizer, fold = folded(timing="deferred", on_nonfinite=how)
    start = [param.detach().clone() for param in model.parameters()]
    (model(X).sum() * NAN).backward()
    assert math.isnan(fold.clip_grad_norm_(1.0))
    with pytest.raises(gradfold.FoldError, match=r"fold\.clip_grad_norm_\(1\).*is nan, and error_if_nonfinite=True"):
        fold.clip_grad_norm_(1.0, error_if_nonfinite=True)
    if how == "raise":
        with pytest.raises(NonFiniteError):
            optimizer.step()
    else:
        optimizer.step()
    assert all(map(torch.equal, start, model.parameters()))


def test_inside_paused_it_clips_plain_gradients():
    plain, model, optimizer, fold = folded()
    with fold.paused():
        backward(model)
        assert float(fold.clip_grad_norm_(0.5)) == float(clip_grad_norm_(plain.parameters(), 0.5))
        optimizer.step()
    torchs(plain).step()
    assert distance(model, plain) < CLOSE


GROUP = {"clip_norm": 2.0}
# options of the fold, keys of its groups, arguments of the call, what the message says
REFUSED = {
    "auto": ({}, {}, (1.0,), r"clip_grad_norm_\(1\): weights step inside backward.*timing='deferred'.*clip_norm=1"),
    "two_pass": ({"clip_norm": 2.0, "clip": "two_pass"}, {}, (1.0,), r"clips by itself \(clip_norm=2.0\)"),
    "clip_norm": ({"clip_norm": 2.0, "timing": "deferred"}, {}, (1.0,), r"clips by itself \(clip_norm=2.0\)"),
    "other order": ({"clip_norm": 2.0}, {}, (2.0, 1.0), r"clips by itself \(clip_norm=2.0\)"),
    "group": ({"timing": "deferred"}, GROUP, (1.0,), r"clips by itself \(clip_norm=2.0\)"),
    "group None": ({"timing": "deferred"}, {"clip_norm": None}, (1.0,), "a param_group has clip_norm of its own"),
    "negative": ({"timing": "deferred"}, {}, (-1.0,), "max_norm is 0 or more"),
    "nan": ({"timing": "deferred"}, {}, (NAN,), "max_norm is 0 or more"),
    "order": ({"timing": "deferred"}, {}, (1.0, 0.0), "norm_type above 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_refuses_changes_nothing(name):
    options, keys, arguments, message = REFUSED[name]
    _, model = twins(mlp)
    _, again = twins(mlp)
    optimizers = ours(model), ours(again)
    for optimizer in optimizers:
        optimizer.param_groups[0].update(keys)
    folds = [gradfold.fold(one, o, **options) for one, o in zip((model, again), optimizers, strict=True)]
    for one, fold in zip((model, again), folds, strict=True):
        fold.backward(one(X).pow(2).sum())
    with pytest.raises(gradfold.FoldError, match=message):
        folds[0].clip_grad_norm_(*arguments)
    for optimizer in optimizers:
        optimizer.step()
    assert same_bits(model, again) and folds[0].grad_norm == folds[1].grad_norm


def test_a_backward_after_it_is_refused_before_anything_moves():
    _, model, optimizer, fold = folded(timing="deferred", accumulate=2)
    start = [param.detach().clone() for param in model.parameters()]
    backward(model)
    fold.clip_grad_norm_(1.0)
    with pytest.raises(gradfold.FoldError, match=r"a backward after fold.clip_grad_norm_\(1\)"):
        backward(model)
    assert all(map(torch.equal, start, model.parameters()))
    optimizer.zero_grad()
    backward(model)
    optimizer.step()


def test_after_a_norm_alone_more_backwards_may_come():
    plain, model = twins(mlp)
    theirs, optimizer = torchs(plain), ours(model)
    fold = gradfold.fold(model, optimizer, accumulate=2)
    for step in range(2):
        backward(plain, step)
        backward(model, step)
        wanted = float(clip_grad_norm_(plain.parameters(), INF))
        assert float(fold.clip_grad_norm_(INF)) == pytest.approx(wanted, rel=CLOSE)
    optimizer.step()
    theirs.step()
    assert fold.grad_norm == pytest.approx(wanted, rel=CLOSE) and distance(model, plain) < CLOSE


def test_a_running_backward_has_no_norm():
    _, model, optimizer, fold = folded(timing="deferred")

    def hook(grad):
        with pytest.raises(gradfold.FoldError, match="inside a backward"):
            fold.clip_grad_norm_(1.0)

    hidden = model[0](X)
    hidden.register_hook(hook)
    model[2](model[1](hidden)).sum().backward()
    optimizer.step()


def test_after_remove():
    _, _, _, fold = folded(timing="deferred")
    fold.remove()
    with pytest.raises(gradfold.FoldError, match=r"after fold.remove\(\): call torch.nn.utils.clip_grad_norm_"):
        fold.clip_grad_norm_(1.0)


# torch.nn.utils on folded parameters ----------------------------------------------------------------------------------

CALLS = {
    "clip_grad_norm_": lambda params: clip_grad_norm_(params, 1.0),
    "by keywords": lambda params: clip_grad_norm_(max_norm=1.0, parameters=params),
    "of a module": lambda params: nn.utils.clip_grad_norm_(params, 1.0),
    "deprecated": lambda params: nn.utils.clip_grad_norm(params, 1.0),
    "clip_grads_with_norm_": lambda params: clip_grads_with_norm_(params, 1.0, torch.tensor(2.0)),
    "clip_grad_value_": lambda params: clip_grad_value_(params, 1.0),
    "get_total_norm": lambda params: get_total_norm([p.grad for p in params if p.grad is not None]),
    "generator": lambda params: get_total_norm(p.grad for p in params if p.grad is not None),
    "one": lambda params: clip_grad_norm_(next(iter(params)), 1.0),
}
FOLDS = {
    "auto": {},
    "deferred": {"timing": "deferred"},
    "clip_norm": {"clip_norm": 0.5},
    "delayed": {"clip_norm": 0.5, "clip": "delayed"},
    "order": {"clip_norm": 1.0, "norm_type": 1.0},
    "clip_value": {"clip_value": 0.5},
    "accumulate": {"accumulate": 2},
}


@pytest.mark.filterwarnings("ignore:.*clip_grad_norm.*deprecated")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("options", FOLDS.values(), ids=FOLDS)
def test_torchs_functions_say_what_to_do(options, call):
    _, model, optimizer, fold = folded(**options)
    backward(model)
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(gradfold.FoldError) as raised:
        CALLS[call](model.parameters())
    message = str(raised.value)
    assert message.startswith("torch.nn.utils.")
    assert ("clip_value=1" if call == "clip_grad_value_" else "fold.clip_grad_norm_(") in message
    assert all(map(torch.equal, before, model.parameters())) and no_gradients(model)
    optimizer.step()
    fold.remove()


@pytest.mark.parametrize("options", [*FOLDS.values(), {"clip_norm": 0.5, "clip": "two_pass"}], ids=[*FOLDS, "two_pass"])
def test_a_norm_that_clips_nothing_is_answered(options):
    """Trainers take the norm of all gradients, or of some, by clipping to infinity."""
    order = options.get("norm_type", 2.0)
    plain, model, optimizer, fold = folded(**options)
    fold.backward(model(X).pow(2).sum())
    for named in (lambda m: m.parameters(), lambda m: list(m[0].parameters()), lambda m: m[2].weight):
        wanted = float(clip_grad_norm_(named(plain), INF, order))
        assert float(clip_grad_norm_(named(model), INF, order)) == pytest.approx(wanted, rel=CLOSE)
    optimizer.step()
    wanted = float(clip_grad_norm_(plain.parameters(), INF, order))
    assert fold.grad_norm == pytest.approx(wanted, rel=CLOSE)


def test_another_order_than_the_one_that_was_taken():
    plain, model, optimizer, _ = folded()
    backward(model)
    with pytest.raises(gradfold.FoldError, match="the norm of order 2 only; fold with timing='deferred'"):
        clip_grad_norm_(model.parameters(), INF, 1.0)
    optimizer.step()
    _, model, optimizer, fold = folded(timing="deferred")
    backward(model)
    wanted = float(clip_grad_norm_(plain.parameters(), INF, 1.0))
    assert float(clip_grad_norm_(model.parameters(), INF, 1.0)) == pytest.approx(wanted, rel=CLOSE)
    optimizer.step()
    assert fold.grad_norm == pytest.approx(float(clip_grad_norm_(plain.parameters(), INF)), rel=CLOSE)


SAME = {
    "clip_norm": ({"clip_norm": 0.5}, {}),
    "order": ({"clip_norm": 0.5, "norm_type": 1.0}, {}),
    "two_pass": ({"clip_norm": 0.5, "clip": "two_pass"}, {}),
    "deferred": ({"clip_norm": 0.5, "timing": "deferred"}, {}),
    "group": ({}, {"clip_norm": 0.5}),
    "with a value": ({"clip_norm": 0.5, "clip_value": 0.01}, {}),
}


@pytest.mark.parametrize("name", SAME)
def test_a_call_for_what_the_fold_does_anyway_is_answered(name):
    """A script that keeps its ``clip_grad_norm_`` and says the same to ``fold`` is right, and is told the norm."""
    options, keys = SAME[name]
    order = options.get("norm_type", 2.0)
    plain, model = twins(mlp)
    theirs, optimizer = torchs(plain, "SGD"), ours(model, "SGD")
    optimizer.param_groups[0].update(keys)
    fold = gradfold.fold(model, optimizer, **options)
    for step in range(3):
        backward(plain, step)
        fold.backward(model((step + 1) * X).pow(2).sum())
        for limit in (0.5, INF):  # the second sees what the first has left
            wanted = float(clip_grad_norm_(plain.parameters(), limit, order))
            assert float(clip_grad_norm_(model.parameters(), limit, order)) == pytest.approx(wanted, rel=CLOSE)
        if "clip_value" in options:
            clip_grad_value_(plain.parameters(), 0.01)
            clip_grad_value_(model.parameters(), 0.01)
        for one in (theirs, optimizer):
            one.step()
            one.zero_grad()
    assert distance(model, plain) < CLOSE


def test_a_second_time_is_refused():
    """Torch scales again, by 1 - 2e-6: it adds 1e-6 to the norm."""
    _, model, _, fold = folded(clip_norm=0.5)
    backward(model)
    clip_grad_norm_(model.parameters(), 0.5)
    for again in (lambda: clip_grad_norm_(model.parameters(), 0.5), lambda: fold.clip_grad_norm_(0.5)):
        with pytest.raises(gradfold.FoldError, match="for the second time in this step"):
            again()


def test_a_part_of_what_the_fold_clips_together_is_refused():
    _, model, _, _ = folded(clip_norm=0.5)
    backward(model)
    with pytest.raises(gradfold.FoldError, match=r"clip_grad_norm_\(max_norm=0.5\): 0.weight is folded"):
        clip_grad_norm_(model[0].parameters(), 0.5)


def test_values_before_the_norm_are_another_order_than_the_folds():
    _, model, _, _ = folded(clip_norm=0.5, clip_value=0.1)
    backward(model)
    clip_grad_value_(model.parameters(), 0.1)
    with pytest.raises(gradfold.FoldError, match="after clip_grad_value_: the fold clips the norm first"):
        clip_grad_norm_(model.parameters(), 0.5)


def test_error_if_nonfinite_is_heard():
    _, model, _, _ = folded(clip_norm=0.5)
    (model(X).sum() * NAN).backward()
    with pytest.raises(gradfold.FoldError, match="error_if_nonfinite=True"):
        clip_grad_norm_(model.parameters(), 0.5, error_if_nonfinite=True)


# torch.nn.utils on everything else ------------------------------------------------------------------------------------


def test_other_parameters_are_clipped_as_ever():
    _, model, _, _ = folded()
    backward(model)
    one, two = twins(mlp)
    for other in (one, two):
        backward(other)
    norm = get_total_norm([p.grad for p in two.parameters()])
    assert torch.equal(clip_grad_norm_(one.parameters(), 0.5), norm)
    clip_grads_with_norm_(two.parameters(), 0.5, norm)
    for params in (one.parameters(), two.parameters()):
        clip_grad_value_(params, 0.01)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    for other in (one, two):
        other.zero_grad()
    assert clip_grad_norm_(one.parameters(), 0.5) == 0  # a plain model without gradients: as torch
    with pytest.warns(UserWarning, match="empty generator"):
        clip_grad_norm_((p for p in ()), 0.5)


@pytest.mark.parametrize("when", ["after backward", "after step", "after zero_grad"])
def test_a_norm_of_no_gradients(when):
    """Where plain parameters would have gradients it is the folded ones that have none; else nobody has."""
    gc.collect()  # folds of other tests, which nobody has removed
    _, model, optimizer, fold = folded()
    assert get_total_norm([]) == 0
    backward(model)
    if when != "after backward":
        optimizer.step()
    if when == "after zero_grad":
        optimizer.zero_grad()
        assert get_total_norm([]) == 0
    else:
        with pytest.raises(gradfold.FoldError, match=r"get_total_norm of no gradients.*\(0.weight \.\.\.\)"):
            get_total_norm([])
        assert get_total_norm([torch.ones(4)]) == 2
    optimizer.step()
    fold.remove()
    assert get_total_norm([]) == 0


def test_frozen_parameters_count_nowhere():
    plain, model = twins(mlp)
    other = nn.Linear(3, 3).requires_grad_(False)
    for one in (plain, model):
        one[0].requires_grad_(False)
    optimizer = ours(model)
    gradfold.fold(model, optimizer)
    backward(plain)
    backward(model)
    mixed = [*model.parameters(), *other.parameters()]
    wanted = float(clip_grad_norm_(plain.parameters(), INF))
    assert float(clip_grad_norm_(mixed, INF)) == pytest.approx(wanted, rel=CLOSE)
    assert clip_grad_norm_(model[0].parameters(), 1.0) == 0
    optimizer.step()


@pytest.mark.parametrize("function", [clip_grad_norm_, clip_grad_value_])
@pytest.mark.parametrize("limit", [1.0, INF])
def test_a_mix_is_refused(function, limit):
    _, model, _, _ = folded(clip_norm=1.0, clip_value=1.0)
    backward(model)
    other = nn.Linear(3, 3)
    other(torch.ones(1, 3)).sum().backward()
    grad = other.weight.grad.clone()
    with pytest.raises(gradfold.FoldError, match=r"0.weight is folded.*of shape \(3, 3\) is not folded"):
        function([*model.parameters(), *other.parameters()], limit)
    assert torch.equal(other.weight.grad, grad)


def test_gradients_made_inside_paused_are_plain():
    gc.collect()  # folds of other tests, which nobody has removed
    plain, model, optimizer, fold = folded()
    with fold.paused():
        backward(model)
        assert clip_grad_norm_(model.parameters(), 0.5) == clip_grad_norm_(plain.parameters(), 0.5)
        clip_grad_value_(model.parameters(), 0.01)
        assert get_total_norm([]) == 0
    assert clip_grad_norm_(model.parameters(), 0.01) > 0.01  # and after it, as long as they are there
    clip_grad_value_(plain.parameters(), 0.01)
    clip_grad_norm_(plain.parameters(), 0.01)
    with fold.paused():
        optimizer.step()
    torchs(plain).step()
    assert distance(model, plain) < CLOSE


def test_two_folds_are_measured_together_and_clipped_apart():
    plain, model, _, fold = folded()
    fold.remove()
    one, two = ours(model[0]), ours(model[2])
    model[1].requires_grad_(False)
    plain[1].requires_grad_(False)
    gradfold.fold(model[0], one, clip_norm=0.5, joint=True)
    gradfold.fold(model[2], two, joint=True)
    plain.zero_grad()
    backward(plain)
    backward(model)
    wanted = float(clip_grad_norm_(plain.parameters(), INF))
    assert float(clip_grad_norm_(model.parameters(), INF)) == pytest.approx(wanted, rel=CLOSE)
    with pytest.raises(gradfold.FoldError, match="weight, weight are of folds apart"):
        clip_grad_norm_(model.parameters(), 0.5)
    wanted = float(clip_grad_norm_(plain[0].parameters(), 0.5))
    assert float(clip_grad_norm_(model[0].parameters(), 0.5)) == pytest.approx(wanted, rel=CLOSE)
    for optimizer in (one, two):
        optimizer.step()


def inner(function):
    return function.__closure__[0].cell_contents


def test_with_the_last_fold_they_are_torchs_again():
    gc.collect()
    for left in list(live_folds()):  # by a test before whose backward raised
        left.release()
    unwatch_clipping()
    functions = [clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm]
    before = [inner(function) for function in functions]
    folds = [folded()[-1] for _ in range(2)]
    assert all(inner(function) is not torchs for function, torchs in zip(functions, before, strict=True))
    folds.pop().remove()
    assert all(inner(function) is not torchs for function, torchs in zip(functions, before, strict=True))
    folds.pop().remove()
    assert [inner(function) for function in functions] == before
    assert get_total_norm([]) == 0
    _, model, _, fold = folded()
    del model, fold, _  # not removed, but gone
    gc.collect()
    assert [inner(function) for function in functions] == before


def test_a_fold_that_fails_leaves_them_as_they_were():
    gc.collect()
    before = inner(clip_grad_norm_)
    _, model = twins(mlp)
    with pytest.raises(gradfold.FoldError):
        gradfold.fold(model, ours(model[0]))
    assert inner(clip_grad_norm_) is before
