"""Folded models that step in kernels against the same models on the reference backend."""

import math

import pytest
import torch
from torch import nn

import gradfold
from benchmarks.gpu.graphs import as_captured
from benchmarks.gpu.training import Trainer
from gradfold.backends import Scratch
from gradfold.backends.triton import Triton, batched
from gradfold.backends.triton import backend as module
from gradfold.errors import NonFiniteError

pytestmark = pytest.mark.usefixtures("quick_tiles")


class Tied(nn.Module):
    """Biases of their own, shared ones and one with a second use, a norm, and a head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 12, padding_idx=3)
        self.up, self.down, self.again = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 20)
        self.again.bias = self.up.bias
        self.alone = nn.Linear(20, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        h = self.down(torch.tanh(self.up(self.embed(ids))))
        h = self.norm(h + self.alone(torch.tanh(self.again(h))))
        return nn.functional.cross_entropy(self.head(h).flatten(0, 1), ids.flatten()) + self.down.bias.pow(2).sum()


def train(backend, steps=2, dtype=torch.float32, options=None, accumulate=1, **how):
    torch.manual_seed(0)
    model = Tied().to(dtype)
    optimizer = gradfold.AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1, **(options or {}))
    fold = gradfold.fold(model, optimizer, backend=backend, accumulate=accumulate, **how)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for _ in range(accumulate):
            fold.backward(model(torch.randint(0, 11, (2, 5), generator=generator)))
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, fold


HOW = {
    "at once": {},
    "int8": {"options": {"states": "int8", "small_size": 0}},
    "clipped": {"clip_norm": 0.5, "clip_value": 0.2},
    "in two passes": {"clip_norm": 0.5, "clip": "two_pass"},
    "delayed": {"clip_norm": 0.5, "clip": "delayed"},
    "accumulated": {"accumulate": 2},
    "a working set": {"working_set": gradfold.WorkingSet(interval=1, chunks=2)},
    "capturable": {"options": {"capturable": True}},
    "not looked at": {"on_nonfinite": "ignore"},
}


@pytest.mark.oldest
@pytest.mark.parametrize("how", HOW)
def test_as_on_the_reference_backend(how):
    wanted, _, reference = train("reference", **HOW[how])
    got, _, fold = train("triton", **HOW[how])
    assert fold.grad_norm == pytest.approx(reference.grad_norm, rel=1e-5)
    for (name, a), b in zip(wanted.named_parameters(), got.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_by_row_blocks(monkeypatch):
    """``auto`` with fp32 products: what a library multiplies, a kernel steps."""
    wanted, _, reference = train("reference")
    blocks = []
    kept = Triton._by_rows
    monkeypatch.setattr(Triton, "_by_rows", lambda self, *args: blocks.append(1) or kept(self, *args))
    got, _, fold = train(Triton(Scratch(600), always=False))  # 600 bytes: several blocks a weight
    assert blocks
    assert fold.grad_norm == pytest.approx(reference.grad_norm, rel=1e-5)
    for a, b in zip(wanted.parameters(), got.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    assert "row blocks" in str(fold.report())


@pytest.mark.oldest
def test_a_bias_steps_in_its_weights_kernel(monkeypatch):
    """Where it has no other use and no other owner; without a gradient of its own, in one launch."""
    along, apart = [], []
    kept = Triton.step_along

    def step_along(self, job, bias):
        powers = kept(self, job, bias)
        (along if powers else apart).append(tuple(bias.stepper.weight.values.shape))
        return powers

    monkeypatch.setattr(Triton, "step_along", step_along)
    train("triton", steps=1)
    assert along == [(12,)] and apart == []  # alone.bias; down.bias is in the loss, up.bias has two owners


class Shared(nn.Module):
    """One weight with two biases, and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.twice = nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 9)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.twice(torch.tanh(self.twice(torch.tanh(self.other(torch.tanh(self.one(x))))))).square().sum()


def test_no_bias_is_lost_where_weights_are_shared_or_used_twice(monkeypatch):
    along = []
    kept = Triton.step_along
    monkeypatch.setattr(Triton, "step_along", lambda self, *jobs: along.append(kept(self, *jobs)) or along[-1])
    found = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        model = Shared()
        before = [param.detach().clone() for param in model.parameters()]
        optimizer = gradfold.SGD(model.parameters(), lr=0.01, momentum=0.9)
        fold = gradfold.fold(model, optimizer, backend=backend)
        for _ in range(2):
            model(torch.randn(5, 9, generator=torch.Generator().manual_seed(1))).backward()
            optimizer.step()
        assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        found.append([*model.parameters(), torch.tensor(fold.grad_norm)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    assert len(along) == 2 and None not in along  # of the layer that is called twice, in each step


@pytest.mark.parametrize(
    "options, how",
    [({"clip_value": 1e-3}, {}), ({"clip_norm": 1e-3}, {"clip_norm": 1.0, "clip": "delayed"}), ({"lr": 0.3}, {})],
    ids="-".join,
)
def test_a_bias_of_another_group(options, how):
    """What is clipped otherwise than its weight does not step in its kernel; another learning rate may."""
    found = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        model = nn.Linear(7, 9)
        optimizer = gradfold.SGD(
            [{"params": [model.weight]}, {"params": [model.bias], **options}], lr=0.01, momentum=0.9
        )
        fold = gradfold.fold(model, optimizer, backend=backend, **how)
        for _ in range(2):
            model(torch.randn(5, 7, generator=torch.Generator().manual_seed(1))).square().sum().backward()
            optimizer.step()
        found.append([*model.parameters(), torch.tensor(fold.grad_norm)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


def test_biases_round_as_on_the_reference_backend():
    """Exact sums: activations are ones, so that both backends step with the same gradients, and draw the same bits."""
    found = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        model = nn.Linear(7, 9).to(torch.bfloat16)
        options = {"states": "bf16", "rounding": "stochastic", "small_size": 0}
        optimizer = gradfold.AdamW(model.named_parameters(), lr=1e-2, **options)
        gradfold.fold(model, optimizer, backend=backend)
        for _ in range(3):
            model(torch.ones(4, 7, dtype=torch.bfloat16)).sum().backward()
            optimizer.step()
        found.append([*model.parameters(), *(s for p in model.parameters() for s in optimizer.state[p].values())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_small_parameters_step_in_one_launch(monkeypatch):
    launched = []
    kept = module.step_batched
    monkeypatch.setattr(module, "step_batched", lambda *args: launched.append(len(args[1])) or kept(*args))
    train("triton", steps=1)
    assert launched == [2]  # the norm's; biases that do not step along have two gradients to add up


def test_small_parameters_draw_bits_of_their_own():
    """Exact: autograd's gradients are the same on both backends as long as the weights are."""
    found = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.LayerNorm(7), nn.LayerNorm(7)).to(torch.bfloat16)
        options = {"states": "bf16", "rounding": "stochastic", "small_size": 0}
        optimizer = gradfold.AdamW(model.named_parameters(), lr=1e-2, **options)
        gradfold.fold(model, optimizer, backend=backend)
        for step in range(3):
            x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)
            model(x).square().sum().backward()
            optimizer.step()
        found.append([*model.parameters(), *(s for p in model.parameters() for s in optimizer.state[p].values())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_everything_has_stepped_when_backward_ends():
    """Small parameters wait for each other, not for ``optimizer.step()``: until then nobody holds their gradients."""
    model, _, fold = train("triton", steps=1)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    fold.backward(model(torch.tensor([[1, 2]])))
    assert [name for name, param in model.named_parameters() if torch.equal(param, before[name])] == []
    assert not fold._state.step.together


def test_row_blocks_draw_the_bits_of_their_own_rows():
    """Exact sums: inputs are ones. One block of all rows, several of them, and none."""
    found = []
    for backend in (Triton(Scratch()), Triton(Scratch(), always=False), Triton(Scratch(100), always=False)):
        torch.manual_seed(0)
        model = nn.Linear(7, 9, bias=False)
        optimizer = gradfold.AdamW(
            model.named_parameters(), lr=1e-2, states="bf16", rounding="stochastic", small_size=0
        )
        gradfold.fold(model, optimizer, backend=backend)
        for _ in range(3):
            model(torch.ones(4, 7)).sum().backward()
            optimizer.step()
        found.append([model.weight, *optimizer.state[model.weight].values()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.oldest
@pytest.mark.parametrize("how", [{}, {"clip_norm": 1.0}, {"on_nonfinite": "skip"}], ids=["raise", "clipped", "skip"])
def test_what_no_kernel_takes_is_guarded_too(how):
    """A double steps by the reference backend."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4).double())
    model[0].register_forward_hook(lambda module, args, out: out.double())
    optimizer = gradfold.AdamW(model.parameters(), lr=0.1)
    fold = gradfold.fold(model, optimizer, backend="triton", **how)
    before = [param.detach().clone() for param in model.parameters()]
    model(torch.ones(2, 5)).mul(math.nan).sum().backward()
    if "on_nonfinite" in how:
        optimizer.step()
    else:
        first = 0 if how else 1  # inside backward the last layer is met first
        with pytest.raises(NonFiniteError, match=rf"^{first}\.weight and 3 more: .* no weight has moved"):
            optimizer.step()
    assert math.isnan(fold.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.oldest
@pytest.mark.parametrize(
    "how", [{}, {"clip_norm": 1.0}, {"timing": "deferred"}], ids=["at once", "clipped", "deferred"]
)
def test_what_is_not_finite_is_named_and_stays_out(how):
    model, optimizer, fold = train("triton", steps=1, **how)
    before = [param.detach().clone() for param in model.parameters()]
    handle = model.norm.register_full_backward_pre_hook(lambda module, grads: (torch.full_like(grads[0], math.nan),))
    fold.backward(model(torch.tensor([[1, 2]])))
    with pytest.raises(NonFiniteError, match="not finite"):
        optimizer.step()
    handle.remove()
    assert math.isnan(fold.grad_norm)
    assert all(bool(param.isfinite().all()) for param in model.parameters())
    if how:
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    fold.backward(model(torch.tensor([[1, 2]])))
    optimizer.step()
    assert math.isfinite(fold.grad_norm)


def test_nobody_waits_for_the_norm_unless_asked(monkeypatch):
    waited = []
    monkeypatch.setattr("gradfold.engine.finish_step.resolve", lambda powers: waited.append(1) or [0.0] * len(powers))
    _, _, fold = train("triton", steps=1, on_nonfinite="skip")
    assert not waited and isinstance(fold._state.grad_norm, torch.Tensor)
    assert fold.grad_norm == pytest.approx(train("reference", steps=1)[2].grad_norm, rel=1e-5)


def test_capturable_counts_on_the_device_and_goes_on_after_loading():
    options = {"options": {"capturable": True, "states": "bf16", "rounding": "stochastic", "small_size": 0}}
    wanted, optimizer, _ = train("triton", steps=2, dtype=torch.bfloat16, **options)
    steps = [states["step"] for states in optimizer.state.values()]
    assert all(step.item() == 2 for step in steps)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["capturable"] is True
    other = gradfold.AdamW(wanted.named_parameters(), lr=1.0)
    other.load_state_dict(saved)
    assert other.param_groups[0]["capturable"] is True
    plain = {"options": {"states": "bf16", "rounding": "stochastic", "small_size": 0}}
    got, _, _ = train("triton", steps=2, dtype=torch.bfloat16, **plain)
    assert all(torch.equal(a, b) for a, b in zip(wanted.parameters(), got.parameters(), strict=True))


class OneUse(nn.Module):
    """An embedding, a Linear with a bias, a norm, and a head, tied or not."""

    def __init__(self, tied):
        super().__init__()
        self.embed, self.up, self.norm = nn.Embedding(11, 12), nn.Linear(12, 12), nn.LayerNorm(12)
        self.head = nn.Linear(12, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return nn.functional.cross_entropy(self.head(self.norm(self.up(self.embed(ids)))).flatten(0, 1), ids.flatten())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_captured_step_needs_nothing_of_the_host_and_launches_what_the_steps_before_it_did(monkeypatch, tied):
    """What ``docs/kernels.md`` promises: a kernel that is compiled or a number that is copied would end the capture."""
    launched, kernel = [], module.fold_step

    class Watched:
        arg_names = kernel.arg_names

        def __getitem__(self, grid):
            return lambda *args, **constants: launched[-1].append(constants) or kernel[grid](*args, **constants)

    monkeypatch.setattr(module, "fold_step", Watched())
    monkeypatch.setattr(batched, "fold_batched", None)  # its table of pointers comes from the host
    results = []
    for captures in (False, True):
        torch.manual_seed(0)
        model = OneUse(tied).to(torch.bfloat16)
        options = {"states": "bf16", "rounding": "stochastic", "capturable": True}
        optimizer = gradfold.AdamW(model.named_parameters(), lr=1e-2, **options)
        fold = gradfold.fold(model, optimizer, backend="triton")
        ids = torch.tensor([[1, 2, 7], [2, 9, 3]])

        def step_once(model=model, optimizer=optimizer, ids=ids):
            launched.append([])
            model(ids).backward()
            optimizer.step()
            optimizer.zero_grad()

        step_once()
        if captures:
            as_captured(Trainer(model, optimizer, "triton"), step_once)
        else:
            step_once()
        assert math.isfinite(fold.grad_norm)
        results.append([*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(len(one) == len(launched[0]) and all(made in launched[0] for made in one) for one in launched)


def test_report_says_who_steps_how():
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4).double())
    optimizer = gradfold.AdamW(model.parameters())
    report = str(gradfold.fold(model, optimizer, backend="triton").report())
    assert "backend triton: 2 in registers; 2 in reference (float64)" in report
