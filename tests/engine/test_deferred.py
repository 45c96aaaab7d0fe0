"""Accumulation and clipping: what torch does with stored gradients, from tapes."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfold
from gradfold.backends import DenseUse, GatherUse, MatmulUse, Reference, Scratch, norms
from gradfold.errors import FoldError
from tests.cases import SHAPES
from tests.zoo import CHECKPOINTS, SCENES, Net, batches, distance, no_gradients, ours, torchs, twins

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
each_mode = pytest.mark.parametrize("mode", MODES)


def step_plain(model, optimizer, losses, options):
    """What a user of torch writes; returns the norm before clipping."""
    for loss in losses:
        loss().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm_type = options.get("norm_type", 2.0)
    norm = torch.nn.utils.get_total_norm(grads, norm_type)
    if "clip_norm" in options:
        torch.nn.utils.clip_grad_norm_(model.parameters(), options["clip_norm"], norm_type)
    if "clip_value" in options:
        torch.nn.utils.clip_grad_value_(model.parameters(), options["clip_value"])
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)


def step_folded(fold, model, optimizer, losses, options):
    for loss in losses:
        fold.backward(loss())
        assert no_gradients(model)
    optimizer.step()
    optimizer.zero_grad()
    return fold.grad_norm


def check(make, loss, options, rule="AdamW", steps=3, tolerance=1e-10):
    """Three steps of both; the norms agree to 1e-12, the weights as in the foundation's tests."""
    plain, folded = twins(make)
    theirs, mine = torchs(plain, rule), ours(folded, rule)
    fold = gradfold.fold(folded, mine, **options)
    count = options.get("accumulate", 1)
    for step in range(steps):
        norms = []
        for model, go in ((plain, functools.partial(step_plain)), (folded, functools.partial(step_folded, fold))):
            torch.manual_seed(step)
            losses = [functools.partial(lambda m, i: loss(m, i) / count, model, step * count + i) for i in range(count)]
            norms.append(go(model, theirs if model is plain else mine, losses, options))
        assert norms[1] == pytest.approx(norms[0], rel=1e-12)
    assert distance(folded, plain) <= tolerance
    return folded, fold


def scene_loss(kind, model, step):
    ids = batches(20)[step % 20]
    return model.loss(ids[:, : 3 + step % 3], kind, step)  # micro-batches of different lengths


@each_mode
@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("kind", ["none", "reentrant", "non_reentrant"])
def test_scenes(scene, kind, mode):
    check(functools.partial(Net, scene), functools.partial(scene_loss, kind), MODES[mode])


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_both_with_every_checkpointing(kind):
    check(functools.partial(Net, "tied"), functools.partial(scene_loss, kind), MODES["both"])


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
        optimizer.zero_grad()


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


# tapes ---------------------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """q, k and v read one input."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.q, self.k, self.v = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.norm = nn.LayerNorm(32)

    def forward(self, ids):
        x = self.norm(self.embed(ids))
        return self.q(x).sigmoid() * self.k(x).tanh() * self.v(x)


def test_a_shared_input_is_counted_once():
    model = Shared()
    optimizer = gradfold.AdamW(model.parameters())
    fold = gradfold.fold(model, optimizer, accumulate=2)
    model(torch.arange(4)).square().sum().backward()
    rows = {row.name: row for row in fold.report().rows}
    tape = 4 * 32 * 4  # bytes of one [4, 32] in fp32
    costs = sorted(rows[f"{name}.weight"].tape_bytes for name in "qkv")
    assert costs == [tape, tape, 2 * tape]
    assert {rows[f"{name}.weight"].tape for name in "qkv"} == {"uses"}
    assert rows["norm.weight"].tape == "gradient"
    optimizer.step()
    assert not any(row.tape or row.tape_bytes for row in fold.report().rows)


def test_a_tape_never_costs_more_than_the_gradient():
    model = Shared()
    optimizer = gradfold.AdamW(model.parameters())
    fold = gradfold.fold(model, optimizer, accumulate=9)
    for step in range(8):
        model(torch.arange(7) + step).square().sum().backward()
        for row in fold.report().rows:
            assert row.tape_bytes <= math.prod(row.shape) * 4
    assert {row.tape for row in fold.report().rows} == {"gradient"}
    optimizer.zero_grad()


def test_low_precision_accumulates_in_fp32():
    """Eight gradients of which each alone is lost in bf16's rounding of the sum."""
    model = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    optimizer = gradfold.SGD(model.parameters(), lr=1.0, states="fp32", master="split16")
    nn.init.zeros_(model.weight)
    gradfold.fold(model, optimizer, accumulate=9)
    for scale in (1.0, *[2**-9] * 8):
        model(torch.full((1, 4), scale, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    masters = gradfold.export_masters(model, optimizer)["weight"]
    assert torch.equal(masters, torch.full((4, 4), -(1 + 8 * 2**-9)))


def test_an_input_changed_in_place_is_refused():
    model = nn.Linear(8, 8)
    optimizer = gradfold.AdamW(model.parameters())
    gradfold.fold(model, optimizer, accumulate=2)
    x = torch.randn(2, 8)
    model(x).sum().backward()
    x.copy_(torch.randn(2, 8))  # the next micro-batch, in the same memory
    with pytest.raises(FoldError, match=r"weight.*changed in place.*clone"):
        model(x).sum().backward()
    optimizer.zero_grad()


# norms ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_power_of_a_dense_gradient(shape, norm_type):
    weight, grad = torch.zeros(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    power = Reference(Scratch(500)).power(weight, [DenseUse(grad)], norm_type)
    want = grad.abs().max() if norm_type == math.inf and grad.numel() else grad.abs().pow(norm_type).sum()
    assert power == pytest.approx(float(want) if grad.numel() else 0.0, rel=1e-13)


@pytest.mark.parametrize("tokens", [1, 7, 40, 600])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gram_and_tiles_agree(tokens, dtype):
    left, right = torch.randn(tokens, 60, dtype=torch.float64), torch.randn(tokens, 50, dtype=torch.float64)
    uses = [MatmulUse(a.to(dtype), b.to(dtype)) for a, b in zip(left.split(250), right.split(250), strict=True)]
    exact = (left.to(dtype).double().t() @ right.to(dtype).double()).square().sum()
    squares, magnitudes = norms.gram(uses)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert squares == pytest.approx(float(exact), rel=tolerance) and magnitudes >= squares
    weight = torch.zeros(60, 50, dtype=dtype)
    assert Reference(Scratch(3_000)).power(weight, uses) == pytest.approx(float(exact), rel=tolerance)


def test_where_the_gram_form_cancels_the_tiles_are_summed():
    """Two tokens whose gradients all but cancel: fp32 Grams have no digits left for the difference."""
    x, dy = torch.randn(1, 64), torch.randn(1, 64)
    use = MatmulUse(torch.cat([dy, -dy * (1 + 1e-4)]), torch.cat([x, x]))
    exact = float((use.left.double().t() @ use.right.double()).square().sum())
    assert norms.gram_is_cheaper([use], (64, 64))
    assert norms.gram([use])[0] != pytest.approx(exact, rel=1e-3)
    assert Reference(Scratch(2**20)).power(torch.zeros(64, 64), [use]) == pytest.approx(exact, rel=1e-3)


def test_the_norm_of_large_gradients_does_not_overflow():
    grad = torch.full((8, 8), 1e30)
    assert norms.norm_of(grad) == pytest.approx(8e30)
    uses = [GatherUse(torch.arange(3), torch.full((3, 8), 1e30))]
    assert Reference(Scratch(100)).power(torch.zeros(5, 8), uses) == pytest.approx(24e60)


# what is not finite --------------------------------------------------------------------------------------------------

TIMINGS = {
    "immediate": {},
    "clipped": {"clip_norm": 1.0},
    "accumulated": {"accumulate": 2},
    "two passes": {"clip_norm": 1.0, "clip": "two_pass"},
    "delayed": {"clip_norm": 1.0, "clip": "delayed"},
}


class Injected(torch.autograd.Function):
    """Lets a value through, and spoils one element of it, or of its gradient."""

    @staticmethod
    def forward(ctx, x, value, where):
        ctx.value, ctx.where = value, where
        return spoilt(x, value) if where == "X" else x.clone()

    @staticmethod
    def backward(ctx, grad):
        return (spoilt(grad, ctx.value) if ctx.where == "dY" else grad), None, None


def spoilt(x, value):
    x = x.clone()
    x.view(-1)[1] = value
    return x


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("where", ["X", "dY"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"states": "int8", "small_size": 0}], ids=["plain", "int8"])
def test_nothing_that_is_not_finite_reaches_a_weight_or_state(timing, where, value, options):
    """Injected at every folded layer in turn."""
    names = [name for name, _ in Net("untied").named_modules() if name == "head" or name.endswith(("up", "down"))]
    for name in names:
        torch.manual_seed(0)
        model = Net("untied")
        optimizer = gradfold.AdamW(model.parameters(), lr=1e-2, **options)
        fold = gradfold.fold(model, optimizer, **TIMINGS[timing])
        count = TIMINGS[timing].get("accumulate", 1)

        def go(model=model, fold=fold, optimizer=optimizer, count=count):
            for ids in batches(count):
                fold.backward(model.loss(ids))
            optimizer.step()
            optimizer.zero_grad()

        go()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        module = model.get_submodule(name)
        if where == "X":
            handle = module.register_forward_pre_hook(lambda m, args: Injected.apply(args[0], value, where))
        else:
            handle = module.register_forward_hook(lambda m, args, y: Injected.apply(y, value, where))
        with pytest.raises(FoldError, match="not finite") as caught:
            go()
        optimizer.zero_grad()
        handle.remove()
        assert any(n in str(caught.value) for n in before)
        if where == "dY" and name == "head" and timing == "immediate":
            assert "head.weight" in str(caught.value)
        for param in model.parameters():
            assert param.isfinite().all()
            for key, state in optimizer.state[param].items():
                assert not state.is_floating_point() or state.isfinite().all(), key
        if timing in ("clipped", "two passes"):
            assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        go()  # and on
        assert all(p.isfinite().all() for p in model.parameters())
        assert math.isfinite(fold.grad_norm)


@pytest.mark.parametrize("timing", TIMINGS)
def test_skipping_goes_on(timing):
    model = Net("untied")
    optimizer = ours(model)
    fold = gradfold.fold(model, optimizer, on_nonfinite="skip", **TIMINGS[timing])
    for step, factor in enumerate((1.0, math.nan, 1.0)):
        for ids in batches(TIMINGS[timing].get("accumulate", 1)):
            fold.backward(model.loss(ids) * factor)
        optimizer.step()
        optimizer.zero_grad()
        assert math.isfinite(fold.grad_norm) == (step != 1)
    assert all(p.isfinite().all() for p in model.parameters())
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


def test_ignoring_is_torchs_way():
    model = nn.Linear(3, 3)
    optimizer = ours(model)
    gradfold.fold(model, optimizer, on_nonfinite="ignore")
    (model(torch.ones(1, 3)).sum() * math.nan).backward()
    optimizer.step()
    assert model.weight.isnan().all()


def test_a_product_that_overflows_is_not_finite():
    """dY and X are, their product is not: no tile of the weight may move."""
    model = nn.Linear(4, 300, bias=False)
    optimizer = gradfold.AdamW(model.parameters())
    gradfold.fold(model, optimizer, scratch_bytes=256)
    before = model.weight.detach().clone()
    scale = torch.ones(300)
    scale[-1] = 1e30
    (F.linear(torch.full((1, 4), 1e30), model.weight.detach()) * 0).sum()
    (model(torch.full((1, 4), 1e30)) * scale).sum().backward()
    with pytest.raises(FoldError, match="weight.*not finite"):
        optimizer.step()
    assert torch.equal(model.weight, before)


def test_large_but_finite_gradients_step():
    model = nn.Linear(4, 4, bias=False)
    optimizer = gradfold.SGD(model.parameters(), lr=1e-38)
    fold = gradfold.fold(model, optimizer)
    (model(torch.full((1, 4), 1e19)) * 1e18).sum().backward()
    optimizer.step()
    assert fold.grad_norm == pytest.approx(4e37, rel=1e-5)


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
    for action in (optimizer.state_dict, fold.remove, lambda: fold.paused().__enter__()):
        with pytest.raises(FoldError, match="middle of a step"):
            action()
    optimizer.step()
    optimizer.state_dict()
