"""All ranks raise, skip or step together: gradients that are not finite, ranks that fail, die or never come."""

import datetime
import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.dist.parts import Poison, alone, folded, furthest, held, inputs, moved, poisoned, said
from tests.dist.world import RankError, World

LIMIT_S = 4.0  # of a process group whose ranks do not come


def backward(model, fold, step, last=True):
    fold.backward(model(inputs(step))) if last else model(inputs(step)).backward()


def take(model, optimizer, fold, step):
    backward(model, fold, step)
    optimizer.step()
    optimizer.zero_grad()


# gradients that are not finite ----------------------------------------------------------------------------------------

NONFINITE = {
    "raise": {},
    "skip": {"on_nonfinite": "skip"},
    "deferred": {"timing": "deferred"},
    "deferred-skip": {"timing": "deferred", "on_nonfinite": "skip"},
    "clip": {"clip_norm": 0.5},
    "delayed": {"clip_norm": 0.5, "clip": "delayed"},
    "two_pass": {"clip_norm": 0.5, "clip": "two_pass"},
    "two_pass-skip": {"clip_norm": 0.5, "clip": "two_pass", "on_nonfinite": "skip"},
}


def nonfinite():
    found = {}
    for name, options in NONFINITE.items():
        model, optimizer, fold = folded(**options)
        take(model, optimizer, fold, 0)
        before = held(model)
        hook = poisoned(model.b, lambda grad: grad * (float("nan") if dist.get_rank() == 1 else 1.0))

        def step(model=model, fold=fold, optimizer=optimizer):
            backward(model, fold, 1)
            optimizer.step()

        raised = said(step)
        hook.remove()
        optimizer.zero_grad()
        changed = moved(model, before)
        take(model, optimizer, fold, 2)
        clip = {} if "clip_norm" not in options else {"clip": options["clip_norm"]}
        # "delayed" begins with an unclipped step and goes on with other factors than torch: only the others are exact
        away = None if options.get("clip") == "delayed" else furthest(model, alone((0, 2), **clip)[0])
        fold.remove()
        found[name] = raised, changed, away
    return found


def test_nonfinite_gradient_of_one_rank(two):
    all_found = two.run(nonfinite)
    for name, options in NONFINITE.items():
        waits = options.get("timing") == "deferred" or options.get("clip", "exact" if "clip_norm" in options else "")
        waits = waits in (True, "exact", "two_pass")
        for rank, found in enumerate(all_found):
            raised, changed, away = found[name]
            where = (name, rank, raised)
            if options.get("on_nonfinite") == "skip":
                assert not raised, where
            else:
                assert raised.startswith("NonFiniteError: b.weight" + ("" if rank == 1 else " on rank 1")), where
            if waits:
                assert not changed, where
                assert away <= 1e-11, where
            else:  # what has stepped in backward has; the shard that is not finite has stayed
                others = ["a.bias", "a.weight", "scale"]
                assert changed == (others if rank == 1 else sorted([*others, "b.weight"])), where


# ranks that fail ------------------------------------------------------------------------------------------------------


def fails(grad):
    if dist.get_rank() == 1:
        raise ValueError("no such batch")
    return grad


def failing(leave):
    """Rank 1 raises in its backward and goes on with ``leave``; then all train on."""
    model, optimizer, fold = folded(timing="deferred")
    take(model, optimizer, fold, 0)
    before = held(model)
    hook = poisoned(model.a, fails)
    try:
        backward(model, fold, 1)
        broken = ""
    except ValueError as error:
        broken = str(error)
        again = said(optimizer.step if leave == "step" else optimizer.zero_grad)
    if not broken:
        again = said(optimizer.step)
    hook.remove()
    optimizer.zero_grad()
    changed = moved(model, before)
    take(model, optimizer, fold, 2)
    found = broken, again, changed, furthest(model, alone((0, 2))[0])
    fold.remove()
    return found


def failing_ranks():
    return {leave: failing(leave) for leave in ("step", "zero_grad")}


def test_rank_that_raises_in_backward(two):
    first, second = two.run(failing_ranks)
    for leave, (broken, again, changed, away) in first.items():
        assert not broken and not changed and away <= 1e-11, leave
        assert again.startswith("FoldError: rank 1 has failed in this step"), again
        assert "ValueError: no such batch" in again and again.endswith("; no weight has moved in this step"), again
    for leave, (broken, again, changed, away) in second.items():
        assert broken == "no such batch" and not changed and away <= 1e-11, leave
        assert again.startswith("FoldError: optimizer.step() after a backward that raised") == (leave == "step"), again


def half_stepped():
    """Rank 1 raises in a backward in which weights step: copies have moved on one rank only, which is found."""
    model, optimizer, fold = folded()
    kept, states = held(model), [{k: t.clone() for k, t in optimizer.state[p].items()} for p in model.parameters()]
    hook = model.register_forward_hook(lambda module, args, loss: Poison.apply(loss, fails))
    raised = ""
    try:  # on rank 1 it raises before anything of the fold is reached
        backward(model, fold, 0)
    except ValueError as error:
        raised = f"ValueError: {error}"
        optimizer.zero_grad()
    first = "" if raised else said(optimizer.step)
    hook.remove()
    optimizer.zero_grad()
    said_now = [said(lambda step=step: take(model, optimizer, fold, step)) for step in (1, 2)]
    optimizer.zero_grad()
    with torch.no_grad():  # the last checkpoint
        for name, param in model.named_parameters():
            getattr(param, "_local_tensor", param).copy_(kept[name])
        for param, before in zip(model.parameters(), states, strict=True):
            for key, value in before.items():
                optimizer.state[param][key].copy_(value)
    said_now.append(said(lambda: take(model, optimizer, fold, 3)))
    fold.remove()
    return raised, first, said_now


def test_copies_after_a_step_that_failed(two):
    (_, first, said_by_first), (raised, _, said_by_second) = two.run(half_stepped)
    assert raised == "ValueError: no such batch"
    assert first.startswith("FoldError: rank 1 has failed in this step: FoldError: after its forward had begun,"), first
    assert "(after ValueError: no such batch); weights have stepped inside backward, and may not have on all" in first
    for *differ, after in (said_by_first, said_by_second):
        for one in differ:
            assert one.startswith("FoldError: scale: its copies on ranks 0, 1 have been different since a step"), one
        assert after == ""


def first_pass_fails():
    model, optimizer, fold = folded(clip="two_pass", clip_norm=1e9)
    take(model, optimizer, fold, 0)
    before = held(model)
    hook = poisoned(model.a, fails)
    raised = said(lambda: backward(model, fold, 1))
    hook.remove()
    changed = moved(model, before)
    optimizer.zero_grad()
    take(model, optimizer, fold, 2)
    away = furthest(model, alone((0, 2), 1e9)[0])
    fold.remove()
    return raised, changed, away


def test_rank_that_raises_in_the_first_pass(two):
    (first, *_), (second, *_) = found = two.run(first_pass_fails)
    assert first.startswith("FoldError: rank 1 has failed in this step: ValueError: no such batch"), first
    assert second == "ValueError: no such batch"
    for _, changed, away in found:
        assert not changed
        assert away <= 1e-11


def audit_fails():
    """On rank 1 something is wrong before the vote: its optimizer.step() raises, and so must all."""
    model, optimizer, fold = folded()
    take(model, optimizer, fold, 0)
    backward(model, fold, 1)
    if dist.get_rank() == 1:
        model.scale.grad = torch.zeros_like(model.scale)
    raised = said(optimizer.step)
    model.scale.grad = None
    optimizer.zero_grad()  # not refused, although weights have stepped in backward: the step is over
    take(model, optimizer, fold, 2)
    away = furthest(model, alone((0, 1, 2))[0])  # all weights had stepped in backward
    fold.remove()
    return raised, away


def test_rank_whose_step_raises(two):
    (first, away), (second, same) = two.run(audit_fails)
    assert first.startswith("FoldError: rank 1 has failed in this step: FoldError: scale: a .grad is left over"), first
    assert "weights have stepped inside backward, and may not have on all ranks" in first
    assert second.startswith("FoldError: scale: a .grad is left over"), second
    assert max(away, same) <= 1e-11


def dropping():
    """All ranks drop a deferred step by zero_grad(); then only rank 1 does."""
    model, optimizer, fold = folded(timing="deferred")
    take(model, optimizer, fold, 0)
    backward(model, fold, 1)
    optimizer.zero_grad()
    take(model, optimizer, fold, 2)
    backward(model, fold, 3)
    raised = said(optimizer.zero_grad if dist.get_rank() == 1 else optimizer.step)
    take(model, optimizer, fold, 4)
    away = furthest(model, alone((0, 2, 4))[0])
    fold.remove()
    return raised, away


def test_dropped_steps(two):
    (first, away), (second, same) = two.run(dropping)
    assert "its gradients waited for optimizer.step(), and zero_grad() has dropped the step" in first
    assert second == ""
    assert max(away, same) <= 1e-11


def never_comes(done):
    group = dist.new_group(timeout=datetime.timedelta(seconds=LIMIT_S))
    model, optimizer, fold = folded(group=group)
    take(model, optimizer, fold, 0)
    backward(model, fold, 1)
    if dist.get_rank() == 1:
        while not done.exists():  # it comes when the other has given up
            time.sleep(0.1)
    raised = said(optimizer.step)
    done.touch()
    return raised


def test_rank_that_never_comes(two, tmp_path):
    first, second = two.run(never_comes, tmp_path / "done")
    assert first.startswith(
        f"FoldError: optimizer.step() of step 1: rank 1 has not come within {LIMIT_S:g} s; weights "
    )
    assert second.startswith("FoldError: ")  # it is too late for it, too


def dies():
    torch.set_num_threads(1)
    model, optimizer, fold = folded()
    take(model, optimizer, fold, 0)
    backward(model, fold, 1)
    if dist.get_rank() == 1:
        os._exit(3)
    begun = time.monotonic()
    raised = said(optimizer.step)
    raise AssertionError(f"after {time.monotonic() - begun:.0f} s: {raised}")


def test_rank_that_dies():
    world = World(2, method="fork")
    with pytest.raises(RankError, match=r"after [0-9] s: FoldError: optimizer.step\(\) of step 1: rank 1 has left"):
        world.run(dies)


# fold() ---------------------------------------------------------------------------------------------------------------


def other_calls():
    """Ranks at different calls of their folds."""
    model, optimizer, fold = folded(timing="deferred")
    backward(model, fold, 0)
    raised = said(lambda: fold.clip_grad_norm_(1.0) if dist.get_rank() else optimizer.step())
    optimizer.zero_grad()
    fold.remove()
    return raised


def test_other_calls(two):
    first, second = two.run(other_calls)
    assert first.startswith("FoldError: optimizer.step() of step 0 on rank 0, while rank 1 is at another call"), first
    assert second.startswith("FoldError: fold.clip_grad_norm_(1) of step 0 on rank 1, while rank 0 is at another call")
