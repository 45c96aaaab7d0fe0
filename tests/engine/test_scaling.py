"""torch's GradScaler over a folded model whose weights wait for optimizer.step()."""

import math

import pytest
import torch

import gradfold
from gradfold.errors import FoldError
from tests.pairs import each_pair
from tests.zoo import Net, batches, distance, no_gradients, ours, torchs, twins

OVERFLOWS = {1, 4}  # steps whose loss is multiplied by infinity


def run(model, optimizer, fold=None, clip=None, unscale=False, accumulate=1, steps=7):
    """What a user of torch writes; returns the scale after every step, and the norms."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scales, norms = [], []
    for step in range(steps):
        for i in range(accumulate):
            ids = batches(20)[(step * accumulate + i) % 20]
            loss = model.loss(ids) * (math.inf if step in OVERFLOWS and i == 0 else 1.0)
            scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        if clip is not None and fold is None:
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if clip is not None and fold is not None:
            norms.append(fold.grad_norm)
        scales.append(scaler.get_scale())
    return scales, norms


@each_pair(
    scene=["untied", "tied"],
    unscale=[False, True],
    options=[{}, {"accumulate": 3}, {"clip_norm": 0.05}, {"accumulate": 3, "clip_norm": 0.05}],
)
def test_steps_and_scales_are_torchs(scene, unscale, options):
    plain, folded = twins(lambda: Net(scene))
    theirs, mine = torchs(plain), ours(folded)
    clip, accumulate = options.get("clip_norm"), options.get("accumulate", 1)
    expected = run(plain, theirs, None, clip, unscale or clip is not None, accumulate)
    fold = gradfold.fold(folded, mine, timing="deferred", **options)
    scales, norms = run(folded, mine, fold, clip, unscale, accumulate)
    assert scales == expected[0] and len(set(scales)) > 1
    for norm, right in zip(norms, expected[1], strict=True):
        assert norm == pytest.approx(right, rel=1e-12) if math.isfinite(right) else math.isnan(norm)
    assert distance(folded, plain) <= 1e-10
    assert all(
        mine.state[p]["step"] == theirs.state[q]["step"] for p, q in zip(folded.parameters(), plain.parameters())
    )
    assert no_gradients(folded)


def test_fp16_autocast():
    """From a scale far too large: skipped steps, a scale that falls, then training as torch trains."""
    plain, folded = twins(lambda: Net("untied"), torch.float32)
    theirs, mine = torchs(plain), ours(folded)
    gradfold.fold(folded, mine, timing="deferred")
    found, steps = [], 24
    for model, optimizer in ((plain, theirs), (folded, mine)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)
        for step in range(steps):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = model.loss(batches(20)[step % 20])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert all(p.isfinite().all() for p in model.parameters())
        found.append(scaler.get_scale())
    # a weight's gradient may be summed in fp32 here, which overflows later than torch's fp16
    assert found[0] <= found[1] < 2.0**24
    taken = [int(o.state[m.head.weight]["step"]) for m, o in ((plain, theirs), (folded, mine))]
    assert 0 < taken[0] <= taken[1] < steps
    assert steps - taken[1] == math.log2(2.0**24 / found[1])  # one halving for each step left out


def test_weights_that_step_inside_backward():
    """A scaler comes too late for them."""
    model = Net("untied")
    optimizer = ours(model)
    gradfold.fold(model, optimizer)
    for act in ("step", "unscale_"):
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(model.loss(batches(1)[0])).backward()
        with pytest.raises(FoldError, match=r"GradScaler.*timing='deferred'"):
            getattr(scaler, act)(optimizer)
        optimizer.step()


def test_without_a_scaler_deferred_is_the_same_step():
    plain, folded = twins(lambda: Net("tied"))
    theirs, mine = torchs(plain), ours(folded)
    gradfold.fold(folded, mine, timing="deferred")
    for model, optimizer in ((plain, theirs), (folded, mine)):
        for ids in batches(3):
            model.loss(ids).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(folded, plain) <= 1e-10


def test_nothing_of_a_look_remains():
    """A scaler looked, its step was skipped; the next step without one is not scaled."""
    plain, folded = twins(lambda: Net("untied"))
    theirs, mine = torchs(plain), ours(folded)
    gradfold.fold(folded, mine, timing="deferred")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(folded.loss(batches(1)[0])).backward()
    scaler.unscale_(mine)
    mine.zero_grad()
    for model, optimizer in ((plain, theirs), (folded, mine)):
        model.loss(batches(2)[1]).backward()
        optimizer.step()
    assert distance(folded, plain) <= 1e-10


@pytest.mark.parametrize("options", [{"timing": "late"}, {"timing": "deferred", "clip": "delayed", "clip_norm": 1.0}])
def test_refused(options):
    model = Net("untied")
    with pytest.raises(FoldError, match="timing="):
        gradfold.fold(model, ours(model), **options)
