"""Norms are those of all ranks together, however they are asked for; copies that get different gradients are found."""

import functools
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gradfold
from tests.dist.parts import Parts, alone, folded, furthest, held, inputs, moved, said, spread
from tests.dist.tiny import HYPER


def trained(steps, act=None, **options):
    """Return the distance from one process, the norms, and what ``act`` returned before each step."""
    model, optimizer, fold = folded(**options)
    norms, acted = [], []
    for step in steps:
        fold.backward(model(inputs(step)))
        if act is not None:
            acted.append(act(model, fold, optimizer))
        optimizer.step()
        optimizer.zero_grad()
        norms.append(fold.grad_norm)
    fold.remove()
    return model, norms, [float(found) for found in acted if found is not None]


CLIP = 2.0
WAYS = {
    "exact": {"clip_norm": CLIP},
    "two_pass": {"clip_norm": CLIP, "clip": "two_pass"},
    "infinity": {"clip_norm": 0.5, "norm_type": math.inf},
    "third": {"clip_norm": CLIP, "norm_type": 3.0},
    "none": {},
}


def clipped():
    found = {}
    for name, options in WAYS.items():
        model, norms, _ = trained(range(3), **options)
        reference, wanted = alone(range(3), options.get("clip_norm", math.inf), options.get("norm_type", 2.0))
        found[name] = furthest(model, reference), max(map(lambda a, b: abs(a - b) / b, norms, wanted))
    return found


def asked():
    """fold.clip_grad_norm_, torch.nn.utils.clip_grad_norm_, with and without clipping: what they return is global."""
    found = {}
    reference, wanted = alone(range(3), CLIP)
    calls = {
        "fold": lambda model, fold, _: fold.clip_grad_norm_(CLIP),
        "torch": lambda model, fold, _: nn.utils.clip_grad_norm_(model.parameters(), CLIP),
    }
    for name, call in calls.items():
        options = {"timing": "deferred"} if name == "fold" else {"clip_norm": CLIP}
        model, _norms, returned = trained(range(3), call, **options)
        apart = max(abs(a - b) / b for a, b in zip(returned, wanted, strict=True))
        found[name] = furthest(model, reference), apart
    plain, wanted = alone(range(3))
    model, _, returned = trained(range(3), lambda m, f, _: nn.utils.clip_grad_norm_(m.parameters(), math.inf))
    found["measured"] = furthest(model, plain), max(map(lambda a, b: abs(a - b) / b, returned, wanted))
    return found


@pytest.mark.parametrize("function", [clipped, asked], ids=["clip_norm", "clip_grad_norm_"])
def test_global_norm(two, function):
    for found in two.run(function):
        for name, (away, norms) in found.items():
            assert away <= 1e-11, name
            assert norms <= 1e-12, name


def pools():
    """Groups that are clipped by their own norm, by none, and the rest together."""
    limits = {"a": 0.5, "b": None}

    def groups(model):
        named = dict(model.named_parameters())
        own = [{"params": [(n, p) for n, p in named.items() if n.startswith(k)], **e} for k, e in limits_of().items()]
        return own

    def limits_of():
        return {"a": {"clip_norm": limits["a"]}, "b": {"clip_norm": limits["b"]}, "scale": {}}

    model = spread()
    optimizer = gradfold.AdamW(groups(model), **HYPER)
    fold = gradfold.fold(model, optimizer, clip_norm=0.25)
    reference = Parts()
    plain = torch.optim.AdamW(reference.parameters(), **HYPER)
    norms = []
    for step in range(3):
        model(inputs(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference(inputs(step)).backward()
        norms.append(abs(fold.grad_norm - float(nn.utils.get_total_norm([p.grad for p in reference.parameters()]))))
        nn.utils.clip_grad_norm_(reference.a.parameters(), 0.5)
        nn.utils.clip_grad_norm_([reference.scale], 0.25)
        plain.step()
        plain.zero_grad()
    fold.remove()
    return furthest(model, reference), max(norms)


def delayed():
    """The factor of the step before, kept over fold.state_dict() and equal on all ranks."""
    whole = Parts()
    one = gradfold.AdamW(whole.named_parameters(), **HYPER)
    by_itself = gradfold.fold(whole, one, clip_norm=CLIP, clip="delayed", group="alone")
    model, optimizer, fold = folded(clip_norm=CLIP, clip="delayed")
    factors = []
    for step in range(4):
        for each, of in ((model, optimizer), (whole, one)):
            each(inputs(step)).backward()
            of.step()
            of.zero_grad()
        kept = fold.state_dict()
        factors.append((kept["following"]["-1"], by_itself.state_dict()["following"]["-1"]))
        if step == 1:  # as if resumed
            fold.load_state_dict(kept)
    away = furthest(model, whole)
    fold.remove()
    by_itself.remove()
    return away, max(abs(a - b) for a, b in factors), min(a for a, _ in factors)


def test_pools(two):
    for away, norms in two.run(pools):
        assert away <= 1e-11
        assert norms <= 1e-12


def test_delayed_norm(two):
    for away, apart, least in two.run(delayed):
        assert away <= 1e-11
        assert apart <= 1e-12
        assert least < 1.0


def scaled():
    """A GradScaler: an overflow on one rank makes all skip the step, and lowers the scale on all."""
    model, optimizer, fold = folded(timing="deferred")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    changes = []
    for step in range(3):
        before = held(model)
        factor = float("inf") if step == 1 and dist.get_rank() == 1 else 1.0
        loss = model(inputs(step))
        handle = model.b.weight  # only this rank's part of one weight overflows
        (
            scaler.scale(loss) + (handle._local_tensor * 0).sum() if factor == 1.0 else scaler.scale(loss) * factor
        ).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        changes.append(bool(moved(model, before)))
    fold.remove()
    return changes, scaler.get_scale(), furthest(model, alone((0, 2))[0])


def test_grad_scaler(two):
    for changes, scale, away in two.run(scaled):
        assert changes == [True, False, True]
        assert scale == 2.0
        assert away <= 1e-11


def erring():
    """error_if_nonfinite, although gradients are not guarded: all ranks raise."""
    model, optimizer, _fold = folded(clip_norm=1.0, error_if_nonfinite=True, on_nonfinite="ignore")
    before = held(model)
    (model(inputs(0)) * (float("nan") if dist.get_rank() == 1 else 1.0)).backward()
    raised = said(optimizer.step)
    return raised, moved(model, before)


def test_error_if_nonfinite(two):
    for raised, changed in two.run(erring):
        assert "scale: its copies" in raised or "error_if_nonfinite=True" in raised, raised
        assert not changed


# copies ---------------------------------------------------------------------------------------------------------------


def drifting():
    """A plain parameter whose copies see different inputs; then one that only some of them have a gradient of."""
    found = {}
    for timing in ("auto", "deferred"):
        for kind in ("other", "none", "same"):
            model, optimizer, fold = folded(timing=timing)
            before = held(model)
            x = inputs(0)
            other = 1.0 if kind == "same" else 1.0 + dist.get_rank() if kind == "other" else float(dist.get_rank())
            loss = model.a(x).sum() + model.b(x).sum()
            if other:
                loss = loss + (model.scale * x * other).pow(2).sum()
            loss.backward()
            found[timing, kind] = said(optimizer.step), moved(model, before)
            optimizer.zero_grad()
            fold.remove()
    return found


def test_copies_that_drift(two):
    for found in two.run(drifting):
        for (timing, kind), (raised, changed) in found.items():
            if kind == "same":
                assert not raised
                continue
            assert raised.startswith("FoldError: scale: its copies have got different gradients (norm "), raised
            assert (" 0 on rank 0, " in raised) == (kind == "none"), raised
            assert ("they have stepped apart" in raised) == (timing == "auto"), raised
            assert changed == [] or timing == "auto"


# parameters that join -------------------------------------------------------------------------------------------------


def joining():
    model = spread()
    named = dict(model.named_parameters())
    late = named.pop("b.weight")
    late.requires_grad_(False)
    optimizer = gradfold.AdamW(list(named.items()), **HYPER)
    fold = gradfold.fold(model, optimizer, clip_norm=CLIP)
    reference = Parts()
    reference.b.weight.requires_grad_(False)
    first = [p for n, p in reference.named_parameters() if n != "b.weight"]
    plain = torch.optim.AdamW(first, **HYPER)
    apart, refused = [], ""
    for step in range(3):
        if step == 1:
            late.requires_grad_(True)
            reference.b.weight.requires_grad_(True)
            if dist.get_rank() == 1:
                hook = late.register_hook(lambda grad: grad)
            group = {"params": [("b.weight", late)], "lr": 1e-3}
            refused = said(functools.partial(optimizer.add_param_group, dict(group)))
            if dist.get_rank() == 1:
                hook.remove()
            other = {**group, "lr": 1e-3 * (1 + dist.get_rank())}
            unequal = said(functools.partial(optimizer.add_param_group, dict(other)))
            count = len(optimizer.param_groups), len(fold._state.params)
            optimizer.add_param_group(dict(group))
            plain.add_param_group({"params": [reference.b.weight], "lr": 1e-3})
        model(inputs(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference(inputs(step)).backward()
        norm = float(nn.utils.clip_grad_norm_(reference.parameters(), CLIP))
        plain.step()
        plain.zero_grad()
        apart.append(abs(fold.grad_norm - norm) / norm)
    away = furthest(model, reference)
    fold.remove()
    return refused, unequal, count, away, max(apart)


def test_add_param_group(two):
    for refused, unequal, count, away, apart in two.run(joining):
        assert "b.weight" in refused
        assert "b.weight: its param_group has lr=0.001 on rank 0, and lr=0.002 on rank 1" in unequal
        assert count == (1, 3)
        assert away <= 1e-11
        assert apart <= 1e-12
