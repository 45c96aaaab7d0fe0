"""Accumulation and clipping: what torch does with stored gradients, from tapes."""

import contextlib
import functools
import json
import math

import pytest
import torch

import gradfold
from gradfold.errors import FoldError
from tests.accumulated import check, step_plain
from tests.pairs import each_pair
from tests.zoo import CHECKPOINTS, SCENES, Net, batches, distance, ours, torchs, twins

MICRO = 4
MODES = {
    "accumulated": {"accumulate": MICRO},
    "clipped": {"clip_norm": 0.05},
    "both": {"accumulate": MICRO, "clip_norm": 0.05},
    "largest": {"clip_norm": 0.01, "norm_type": math.inf},
    "order 3": {"clip_norm": 0.02, "norm_type": 3.0},
    "by value": {"clip_value": 1e-3},
    "accumulated, by value": {"accumulate": MICRO, "clip_value": 1e-3},
    "two passes": {"clip_norm": 0.05, "clip": "two_pass"},
}


def scene_loss(kind, model, step):
    ids = batches(20)[step % 20]
    return model.loss(ids[:, : 3 + step % 3], kind, step)  # micro-batches of different lengths


@each_pair(scene=SCENES, mode=MODES, kind=["none", "reentrant", "non_reentrant"])
def test_scenes(scene, kind, mode):
    check(functools.partial(Net, scene), functools.partial(scene_loss, kind), MODES[mode], steps=2)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_both_with_every_checkpointing(kind):
    check(functools.partial(Net, "tied"), functools.partial(scene_loss, kind), MODES["both"], steps=2)


@pytest.mark.parametrize("rule", ["Adam", "SGD", "RMSprop", "Adagrad", "NAdam", "RAdam"])
def test_both_with_every_rule(rule):
    check(functools.partial(Net, "tied"), functools.partial(scene_loss, "none"), MODES["both"], rule)


def test_a_norm_below_the_limit_changes_nothing():
    check(functools.partial(Net, "untied"), functools.partial(scene_loss, "none"), {"clip_norm": 1e6})


def test_accumulating_context():
    """For every micro-batch but the last, and any number of them."""
    plain, folded = twins(lambda: Net("tied"))
    theirs, mine = torchs(plain), ours(folded)
    fold = gradfold.fold(folded, mine)
    for step, count in enumerate((1, 3, 2, 5)):
        parts = [batches(20)[(5 * step + i) % 20] for i in range(count)]
        for ids in parts:
            plain.loss(ids).backward()
        theirs.step()
        theirs.zero_grad()
        with fold.accumulating():
            for ids in parts[:-1]:
                folded.loss(ids).backward()
        folded.loss(parts[-1]).backward()
        mine.step()
        mine.zero_grad()
    assert distance(folded, plain) <= 1e-10


def test_fewer_backwards_than_accumulate_play_what_is_there():
    """The last step of an epoch."""
    plain, folded = twins(lambda: Net("tied"))
    theirs, mine = torchs(plain), ours(folded)
    gradfold.fold(folded, mine, accumulate=4)
    for model, optimizer in ((plain, theirs), (folded, mine)):
        for ids in batches(2):
            model.loss(ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert distance(folded, plain) <= 1e-10


def test_more_backwards_than_accumulate_are_refused():
    for options in ({"accumulate": 2}, {"accumulate": 2, "clip_norm": 1.0}, {"clip_norm": 1.0}):
        model = Net("untied")
        optimizer = ours(model)
        gradfold.fold(model, optimizer, **options)
        for ids in batches(options.get("accumulate", 1)):
            model.loss(ids).backward()
        with pytest.raises(FoldError, match="second backward|optimizer.step"):
            model.loss(batches(1)[0]).backward()
        optimizer.step()


def test_zero_grad_discards_the_tape():
    """As torch discards accumulated gradients."""
    plain, folded = twins(lambda: Net("tied"))
    theirs, mine = torchs(plain), ours(folded)
    gradfold.fold(folded, mine, accumulate=2, clip_norm=0.05)
    folded.loss(batches(1)[0]).backward()
    mine.zero_grad()
    step_plain(plain, theirs, [lambda ids=ids: plain.loss(ids) for ids in batches(2)], {"clip_norm": 0.05})
    for ids in batches(2):
        folded.loss(ids).backward()
    mine.step()
    assert distance(folded, plain) <= 1e-10


def test_groups_have_their_own_norm_or_none():
    plain, folded = twins(lambda: Net("untied"))
    optimizers = []
    for model, kind in ((plain, torch.optim.AdamW), (folded, gradfold.AdamW)):
        apart = [*model.head.parameters()]
        never = [*model.embed.parameters()]
        rest = [*model.blocks.parameters()]
        extra = ({}, {"clip_norm": 0.01}, {"clip_norm": None}) if model is folded else ({}, {}, {})
        groups = [{"params": p, **e} for p, e in zip((rest, apart, never), extra, strict=True)]
        optimizers.append(kind(groups, lr=1e-2))
    fold = gradfold.fold(folded, optimizers[1], clip_norm=0.02)
    for ids in batches(3):
        plain.loss(ids).backward()
        total = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
        torch.nn.utils.clip_grad_norm_(plain.blocks.parameters(), 0.02)
        torch.nn.utils.clip_grad_norm_(plain.head.parameters(), 0.01)
        optimizers[0].step()
        optimizers[0].zero_grad()
        folded.loss(ids).backward()
        optimizers[1].step()
        assert fold.grad_norm == pytest.approx(float(total), rel=1e-12)
    assert distance(folded, plain) <= 1e-10


def test_delayed_clipping_uses_the_last_norm():
    plain, folded = twins(lambda: Net("tied"))
    theirs, mine = torchs(plain), ours(folded)
    fold = gradfold.fold(folded, mine, clip_norm=0.05, clip="delayed")
    last = None
    for ids in batches(4):
        plain.loss(ids).backward()
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()]))
        for p in plain.parameters():
            p.grad *= 1.0 if last is None else min(1.0, 0.05 / (last + 1e-6))
        theirs.step()
        theirs.zero_grad()
        folded.loss(ids).backward()
        mine.step()
        assert fold.grad_norm == pytest.approx(norm, rel=1e-12)
        last = norm
    assert distance(folded, plain) <= 1e-10


def test_delayed_clipping_goes_on_from_a_saved_fold():
    """The factor of the next step is neither in a weight nor in the optimizer's states."""
    whole, parts = twins(lambda: Net("tied"))
    options = {"clip_norm": 0.05, "clip": "delayed"}
    optimizers = [ours(whole), ours(parts)]
    gradfold.fold(whole, optimizers[0], **options)
    fold = gradfold.fold(parts, optimizers[1], **options)
    assert fold.state_dict() == {"following": {}}
    for count, ids in enumerate(batches(4)):
        if count == 2:
            saved = json.loads(json.dumps(fold.state_dict()))
            fold.remove()
            fold = gradfold.fold(parts, optimizers[1], **options)
            fold.load_state_dict(saved)
            assert fold.state_dict() == saved
        for model, optimizer in zip((whole, parts), optimizers, strict=True):
            model.loss(ids).backward()
            optimizer.step()
    assert distance(parts, whole) == 0
    with pytest.raises(FoldError, match="state_dict has param_group 7"):
        fold.load_state_dict({"following": {"7": 1.0}})
    assert fold.state_dict()["following"]


def test_delayed_clipping_of_a_group_by_its_own_last_norm():
    plain, folded = twins(lambda: Net("untied"))
    optimizers = []
    for model, kind, own in ((plain, torch.optim.AdamW, {}), (folded, gradfold.AdamW, {"clip_norm": 0.01})):
        rest = [p for name, p in model.named_parameters() if not name.startswith("head")]
        optimizers.append(kind([{"params": rest}, {"params": [*model.head.parameters()], **own}], lr=1e-2))
    gradfold.fold(folded, optimizers[1], clip_norm=0.05, clip="delayed")
    limits, last = (0.05, 0.01), (None, None)
    for ids in batches(3):
        plain.loss(ids).backward()
        groups = [[p.grad for p in group["params"] if p.grad is not None] for group in optimizers[0].param_groups]
        norms = tuple(float(torch.nn.utils.get_total_norm(grads)) for grads in groups)
        for grads, limit, norm in zip(groups, limits, last, strict=True):
            for grad in grads:
                grad *= 1.0 if norm is None else min(1.0, limit / (norm + 1e-6))
        last = norms
        folded.loss(ids).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert distance(folded, plain) <= 1e-10


def test_grad_norm_is_there_without_clipping():
    model = Net("tied").double()
    optimizer = ours(model)
    fold = gradfold.fold(model, optimizer)
    assert fold.grad_norm is None
    twin = twins(lambda: Net("tied"))[0]
    twin.load_state_dict(model.state_dict())
    twin.loss(batches(1)[0]).backward()
    model.loss(batches(1)[0]).backward()
    optimizer.step()
    norm = torch.nn.utils.get_total_norm([p.grad for p in twin.parameters() if p.grad is not None])
    assert fold.grad_norm == pytest.approx(float(norm), rel=1e-12)


# refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate=0"),
        ({"accumulate": 2.0}, "accumulate=2.0"),
        ({"clip_norm": 0}, "clip_norm=0"),
        ({"clip_norm": math.nan}, "clip_norm=nan"),
        ({"clip_value": -1.0}, "clip_value=-1.0"),
        ({"clip_norm": 1.0, "norm_type": 0}, "norm_type=0"),
        ({"clip_norm": 1.0, "clip": "sometimes"}, "clip='sometimes'.*'two_pass'"),
        ({"clip": "two_pass"}, "clip='two_pass' without clip_norm"),
        ({"clip_norm": 1.0, "clip": "two_pass", "accumulate": 2}, "clip='two_pass' with accumulate=2"),
        ({"clip_norm": 1.0, "clip": "delayed", "norm_type": 1.0}, "norm_type=1.0"),
        ({"clip_norm": 1.0, "clip": "delayed", "error_if_nonfinite": True}, "error_if_nonfinite"),
        ({"on_nonfinite": "warn"}, "on_nonfinite='warn'.*'skip'"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    model = Net("untied")
    with pytest.raises(FoldError, match=message):
        gradfold.fold(model, ours(model), **options)
    gradfold.fold(model, ours(model))  # nothing was changed


def test_two_passes_need_their_own_backward():
    model = Net("untied")
    gradfold.fold(model, ours(model), clip_norm=1.0, clip="two_pass")
    with pytest.raises(FoldError, match=r"fold.backward\(loss\)"):
        model.loss(batches(1)[0]).backward()


def test_a_norm_that_is_not_finite_can_raise():
    model = Net("untied")
    optimizer = ours(model)
    gradfold.fold(model, optimizer, clip_norm=1.0, error_if_nonfinite=True, on_nonfinite="ignore")
    (model.loss(batches(1)[0]) * math.nan).backward()
    with pytest.raises(FoldError, match="error_if_nonfinite"):
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_state_dict_and_pause_wait_for_the_step():
    model = Net("untied")
    optimizer = ours(model)
    fold = gradfold.fold(model, optimizer, accumulate=2)
    model.loss(batches(1)[0]).backward()
    for action in (optimizer.state_dict, fold.state_dict, fold.remove, lambda: fold.paused().__enter__()):
        with pytest.raises(FoldError, match="middle of a step"):
            action()
    optimizer.step()
    optimizer.state_dict()


def test_sharpness_aware_minimization():
    """Two backwards a step: the first inside paused() moves the weights away, the second steps where they were."""
    plain, folded = twins(lambda: Net("tied"))
    theirs, mine = torchs(plain), ours(folded)
    fold = gradfold.fold(folded, mine, timing="deferred")
    for step in range(3):
        for model, optimizer, first in ((plain, theirs, contextlib.nullcontext), (folded, mine, fold.paused)):
            with first():
                model.loss(batches(20)[step]).backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            away = [0.05 * p.grad / norm if p.grad is not None else 0.0 for p in model.parameters()]
            optimizer.zero_grad()
            for sign in (1, -1):
                with torch.no_grad():
                    for p, e in zip(model.parameters(), away):
                        p += sign * e
                if sign == 1:
                    model.loss(batches(20)[step]).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(folded, plain) <= 1e-10


def test_its_second_backward_is_refused_where_weights_step_at_once():
    model = Net("untied")
    gradfold.fold(model, ours(model))
    model.loss(batches(1)[0]).backward()
    with pytest.raises(FoldError, match=r"SAM.*timing='deferred'"):
        model.loss(batches(1)[0]).backward()


@pytest.mark.parametrize("kind", ["non_reentrant", "nested", "reentrant", "reentrant_in_non_reentrant"])
@pytest.mark.parametrize("aside", ["paused", "autograd.grad"])
def test_backwards_that_are_no_micro_batch(kind, aside):
    """A paused one, and one that wants no weight's gradient, through checkpoints that read the weights again."""
    if aside == "autograd.grad" and "reentrant" in kind.removeprefix("non_"):
        return  # torch refuses that itself
    plain, folded = twins(lambda: Net("untied"))
    theirs, mine = torchs(plain), ours(folded)
    fold = gradfold.fold(folded, mine, accumulate=2)
    if aside == "paused":
        with fold.paused():
            folded.loss(batches(3)[2], kind).backward()
            mine.zero_grad()
    else:
        x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
        torch.autograd.grad(CHECKPOINTS[kind](folded.blocks[0], x, 0).sum(), x)
    for model, optimizer in ((plain, theirs), (folded, mine)):
        for ids in batches(2):
            model.loss(ids, kind).backward()
        optimizer.step()
    assert distance(folded, plain) <= 1e-10
