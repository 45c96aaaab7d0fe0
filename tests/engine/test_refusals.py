"""What a fold cannot carry out exactly is refused by name, before a weight moves, with the way out."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfold
from tests.zoo import CHECKPOINTS, compare, no_gradients, ours, same_bits, twins

X = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class Folded:
    """A folded model, what it was, and whether it still is that."""

    def __init__(self, make=lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)), **options):
        self.start, self.model = twins(make)
        self.optimizer = ours(self.model)
        self.fold = gradfold.fold(self.model, self.optimizer, **options)

    def loss(self, x=X):
        return self.model(x).pow(2).sum()

    def refused(self, action, *words, untouched=True):
        """``action`` raises a FoldError that has all the words; the weights are those of before."""
        before = copy.deepcopy(self.model)
        with pytest.raises(gradfold.FoldError) as caught:
            action()
        for word in words:
            assert re.search(word, str(caught.value)), (word, str(caught.value))
        if untouched:
            assert same_bits(self.model, before)


# backward -------------------------------------------------------------------------------------------------------------

KINDS = pytest.mark.parametrize("kind", ["none", "reentrant", "non_reentrant"])


@KINDS
def test_second_backward(kind):
    f = Folded()
    x = X.clone().requires_grad_()
    value = CHECKPOINTS[kind](f.model, x, 0).pow(2).sum()
    value.backward(retain_graph=True)
    f.refused(value.backward, r"weight|bias", "second backward|read again", r"optimizer\.step\(\)|zero_grad")
    assert no_gradients(f.model)


def test_second_backward_on_another_graph_and_after_that_life_goes_on():
    f = Folded()
    f.loss().backward()
    f.refused(f.loss().backward, "second backward", "sum the losses")
    f.optimizer.step()
    f.loss().backward()
    f.optimizer.step()
    assert no_gradients(f.model)


@pytest.mark.parametrize(("accumulate", "which"), [(2, "third"), (4, "fifth"), (9, "10th")])
def test_one_backward_too_many(accumulate, which):
    f = Folded(accumulate=accumulate)
    for _ in range(accumulate):
        f.loss().backward()
    way_out = f"call optimizer.step\\(\\) after each {accumulate} backwards"
    f.refused(f.loss().backward, rf"\d\.(weight|bias): a {which} backward", way_out)


def test_second_backward_that_shares_only_a_part():
    f = Folded()
    hidden = f.model[0](X)
    hidden.sum().backward(retain_graph=True)
    f.refused(f.model[2](f.model[1](hidden)).sum().backward, r"0\.(weight|bias)", "second backward")


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)),
        lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)),
        lambda: nn.Sequential(nn.Linear(6, 6), Shift()),
        lambda: nn.Sequential(nn.LayerNorm(6)),
    ],
    ids=["linear", "norm", "shift", "hooked_only"],
)
@pytest.mark.filterwarnings("ignore:Using backward")
def test_create_graph(make):
    f = Folded(make)
    f.refused(lambda: f.model(X).sum().backward(create_graph=True), r"create_graph=True", r"fold\.paused\(\)")


class Shift(nn.Module):
    """Its gradient does not itself require a gradient, so only the mode tells that a graph is being made."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return x + self.shift


def test_double_backward():
    f = Folded()
    x = X.clone().requires_grad_()
    f.refused(lambda: torch.autograd.grad(f.loss(x), x, create_graph=True), "create_graph=True", r"fold\.paused\(\)")
    f.refused(lambda: torch.autograd.functional.hessian(f.loss, x), "create_graph=True", r"fold\.paused\(\)")


@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
@pytest.mark.parametrize("moment", ["before_forward", "before_backward"])
@pytest.mark.parametrize("how", ["register_hook", "register_post_accumulate_grad_hook", "multi"])
def test_hooks_on_a_folded_weight(name, moment, how):
    f = Folded()
    weight = f.model.get_parameter(name)

    def register():
        if how == "multi":
            return torch.autograd.graph.register_multi_grad_hook([weight], lambda grads: None)
        return getattr(weight, how)(lambda grad: None)

    value = f.loss() if moment == "before_backward" else None
    handle = register()
    f.refused(
        (value if value is not None else f.loss()).backward if value is not None else lambda: f.loss().backward(),
        re.escape(name),
        "hook",
        "remove it",
    )
    handle.remove()
    f.optimizer.zero_grad()
    f.loss().backward()
    f.optimizer.step()


def test_hooks_on_a_hooked_parameter():
    """A hook on the tensor sees its gradient and may change it; one after accumulation would find nothing."""

    def run(model, optimizer, step):
        handle = model[1].weight.register_hook(lambda grad: 2 * grad)
        model(X).pow(2).sum().backward()
        handle.remove()

    assert compare(lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)), run) <= 1e-10
    f = Folded()
    f.model[1].weight.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2))
    f.refused(lambda: f.loss().backward(), r"1\.weight", "hook")


@pytest.mark.parametrize("how", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_before_folding(how):
    model = nn.Sequential(nn.Linear(6, 6))
    getattr(model[0].weight, how)(lambda grad: None)
    with pytest.raises(gradfold.FoldError, match=r"0\.weight: a hook .* remove it before folding, or freeze"):
        gradfold.fold(model, ours(model))
    assert type(model[0]) is nn.Linear


def test_sparse_gradients():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(7, 6))

        def forward(self, ids):
            return F.embedding(ids, self.weight, sparse=True)

    f = Folded(Sparse)
    f.refused(lambda: f.loss(torch.tensor([1, 2])).backward(), "weight", "sparse", "sparse=False")


# the ledger -----------------------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def train(f):
    f.loss().backward()
    f.optimizer.step()


def test_an_adapter_added_after_folding():
    f = Folded()
    f.model[2] = Adapter(f.model[2]).double()
    f.refused(
        lambda: train(f), r"2\.down\.weight", "not in the optimizer", "add_param_group", r"requires_grad_\(False\)"
    )
    f.optimizer.zero_grad()
    f.optimizer.add_param_group({"params": [*f.model[2].down.parameters(), *f.model[2].up.parameters()]})
    train(f)
    assert no_gradients(f.model)


def test_an_optimizer_of_another_model():
    model, other = (nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)) for _ in range(2))
    match = r"optimizer= is of another model: none of its 4 parameters is one of this model's 4"
    for changed in (model, copy.deepcopy(other)):
        with pytest.raises(gradfold.FoldError, match=match):
            gradfold.fold(changed, gradfold.AdamW(other.parameters()))
    model.requires_grad_(False)  # then there is nothing to name
    with pytest.raises(gradfold.FoldError, match="not in the model"):
        gradfold.fold(model, gradfold.AdamW(other.parameters()))


def test_a_parameter_outside_the_optimizer():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    with pytest.raises(gradfold.FoldError, match=r"1\.weight: requires grad but is not in the optimizer.*freeze it"):
        gradfold.fold(model, gradfold.AdamW(model[0].parameters()))
    model[1].requires_grad_(False)
    optimizer = gradfold.AdamW(model[0].parameters())
    gradfold.fold(model, optimizer)
    model[1].requires_grad_(True)
    before = copy.deepcopy(model)
    with pytest.raises(gradfold.FoldError, match=r"1\.weight: requires grad but is not in the optimizer"):
        model(X.float()).sum().backward()
        optimizer.step()
    assert same_bits(model, before)


def test_a_parameter_outside_the_model():
    model, other = nn.Linear(6, 6), nn.Linear(2, 3)
    optimizer = gradfold.AdamW([{"params": model.parameters()}, {"params": other.parameters()}])
    with pytest.raises(
        gradfold.FoldError, match=r"param_groups\[1\] has a parameter of shape \(3, 2\).*not in the model"
    ):
        gradfold.fold(model, optimizer)
    optimizer = ours(model)
    gradfold.fold(model, optimizer)
    with pytest.raises(gradfold.FoldError, match="not in the folded model"):
        optimizer.add_param_group({"params": other.parameters()})
    model(X.float()).sum().backward()
    optimizer.step()


REPLACE = {
    "one": lambda m: setattr(m[0], "weight", nn.Parameter(torch.randn(6, 6, dtype=torch.float64))),
    "hooked": lambda m: setattr(m[1], "bias", nn.Parameter(torch.randn(6, dtype=torch.float64))),
    "assign": lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True),
    "module": lambda m: m.__setitem__(2, nn.Linear(6, 6).double()),
    "weight_norm": lambda m: nn.utils.parametrizations.weight_norm(m[0]),
    "removed": lambda m: m.__delitem__(2),
}


@pytest.mark.parametrize("how", REPLACE)
def test_a_replaced_parameter(how):
    f = Folded()
    REPLACE[how](f.model)
    f.refused(lambda: train(f), r"weight|bias", "replaced|no longer in the model|not in the optimizer")
    # the way out that the message names
    f.optimizer.zero_grad()
    f.fold.remove()
    f.optimizer = ours(f.model)
    gradfold.fold(f.model, f.optimizer)
    train(f)
    assert no_gradients(f.model)


MOVES = {
    "bf16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "one": lambda m: m[2].float(),
    "norm": lambda m: m[1].float(),
    "shape": lambda m: setattr(m[0].weight, "data", torch.randn(5, 6, dtype=torch.float64)),
    "meta": lambda m: m.to("meta"),
}


@pytest.mark.parametrize("how", MOVES)
def test_a_moved_parameter(how):
    f = Folded()
    MOVES[how](f.model)

    def attempt():
        first = next(f.model.parameters())
        train_on = X.to(first.dtype) if first.device.type == "cpu" else X.to("meta")
        f.loss(train_on).backward()
        f.optimizer.step()

    for _ in range(2):  # a second attempt, as in a notebook, is refused as well
        f.refused(attempt, r"weight|bias", "became|replaced", "fold again", untouched=how != "meta")


def test_a_leftover_gradient():
    f = Folded()
    f.model[0].weight.grad = torch.ones(6, 6, dtype=torch.float64)
    f.refused(f.optimizer.step, r"0\.weight", r"\.grad", "None")
    f.model[0].weight.grad = None
    f.optimizer.step()


@pytest.mark.parametrize(
    ("name", "action"),
    [
        (r"state_dict\(\)", lambda f: f.optimizer.state_dict()),
        (r"load_state_dict\(\)", lambda f: f.optimizer.load_state_dict(ours(f.model).state_dict())),
        (r"fold\.remove\(\)", lambda f: f.fold.remove()),
        (r"fold\.paused\(\)", lambda f: f.fold.paused().__enter__()),
    ],
)
def test_in_the_middle_of_a_step(name, action):
    f = Folded()
    f.loss().backward()
    f.refused(lambda: action(f), name, "in the middle of a step", r"optimizer\.step\(\) first")
    f.optimizer.step()
    action(f)


def test_gradscaler():
    f = Folded()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(f.loss()).backward()
    f.refused(lambda: scaler.step(f.optimizer), "GradScaler", "deferred", "bfloat16")
    off = torch.amp.GradScaler("cpu", enabled=False)
    f.optimizer.step()
    off.scale(f.loss()).backward()
    off.step(f.optimizer)


# fold() ---------------------------------------------------------------------------------------------------------------


def test_fold_twice():
    f = Folded()
    f.refused(lambda: gradfold.fold(f.model, f.optimizer), "folded", r"remove\(\)")
    f.refused(lambda: gradfold.fold(f.model, ours(f.model)), "is folded already", r"remove\(\)")
    outer = nn.Sequential(f.model, nn.Linear(6, 6).double())
    f.refused(lambda: gradfold.fold(outer, ours(outer)), "is folded already", r"remove\(\)")
    train(f)
    assert no_gradients(f.model)


def refusable(make, **change):
    model = make()
    optimizer = change.pop("optimizer", ours)(model)
    with pytest.raises((gradfold.FoldError, ValueError)) as caught:
        gradfold.fold(model, optimizer, **change)
    assert isinstance(caught.value, gradfold.FoldError)
    assert all(type(module).__module__.startswith(("torch", "tests")) for module in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    return str(caught.value)


REFUSED_MODULES = {
    "max_norm": (lambda: nn.Embedding(7, 6, max_norm=1.0), "max_norm=1.0.*set max_norm=None, or freeze"),
    "sparse": (lambda: nn.Embedding(7, 6, sparse=True), "sparse=True.*set sparse=False, or freeze"),
    "complex": (lambda: nn.Linear(6, 6, dtype=torch.complex64), "complex64 parameters cannot be folded; freeze it"),
    "lazy": (lambda: nn.LazyLinear(6), "lazy parameter has no shape yet; run one forward first"),
}


@pytest.mark.parametrize("kind", REFUSED_MODULES)
def test_modules_that_cannot_be_folded(kind):
    make, message = REFUSED_MODULES[kind]
    assert re.search(rf"^1(\.weight)?: .*{message}", refusable(lambda: nn.Sequential(nn.Linear(6, 6), make())))
    if kind in ("max_norm", "sparse"):
        frozen = nn.Sequential(make().requires_grad_(False), nn.Linear(6, 6))
        gradfold.fold(frozen, ours(frozen))


def test_two_parameters_on_one_memory():
    def make():
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
        model[2].weight = nn.Parameter(model[1].weight.data)
        return model

    assert re.search(r"[12]\.weight.*memory.*same Parameter", refusable(make))


def test_parameters_beside_each_other_in_one_memory_are_fine():
    flat = torch.randn(72, dtype=torch.float64)

    def make():
        model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
        both = flat.clone()
        model[0].weight, model[1].weight = nn.Parameter(both[:36].view(6, 6)), nn.Parameter(both[36:].view(6, 6))
        return model

    model = make()
    gradfold.fold(model, ours(model))


OPTIMIZERS = {
    "LBFGS": "LBFGS cannot be folded.*gradfold.AdamW",
    "SparseAdam": "SparseAdam cannot be folded.*sparse",
    "Adafactor": r"optimizer=Adafactor is not one of gradfold's; use gradfold\.Adafactor",
    "AdamW": r"optimizer=AdamW is not one of gradfold's; use gradfold\.AdamW",
    "SGD": r"optimizer=SGD is not one of gradfold's; use gradfold\.SGD",
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_that_are_not_ours(name):
    message = refusable(lambda: nn.Linear(6, 6), optimizer=lambda m: getattr(torch.optim, name)(m.parameters(), lr=0.1))
    assert re.search(OPTIMIZERS[name], message)


def test_unknown_backend():
    assert "backend='tritonn' is unknown; use" in refusable(lambda: nn.Linear(6, 6), backend="tritonn")


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"clip_norm": 1.0, "clip": "delayed"}, "clip='delayed'"),
        ({"clip_norm": 1.0, "clip": "two_pass"}, "clip='two_pass'"),
        ({"working_set": gradfold.WorkingSet(chunks=2, interval=1)}, "working set"),
    ],
    ids=["delayed", "two passes", "a working set"],
)
def test_a_cuda_graph_of_what_the_host_decides(monkeypatch, how, named):
    """Its replays would clip by the norm, or train the chunk, of the capture."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    optimizer = ours(model)
    fold = gradfold.fold(model, optimizer, **how)
    before = copy.deepcopy(model)
    monkeypatch.setattr("gradfold.engine.finish_step.capturing", lambda: True)
    with pytest.raises(gradfold.FoldError, match=f"CUDA graph is being captured of .*{named}.* train without a graph"):
        fold.backward(model(X).pow(2).sum())
    assert same_bits(before, model)
    monkeypatch.undo()
    optimizer.zero_grad()
    fold.backward(model(X).pow(2).sum())
    optimizer.step()
