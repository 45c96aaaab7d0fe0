"""Schedule-free AdamW: against its formula in plain loops, its two weights, and states that sleep."""

import copy
import math

import pytest
import torch
from torch import nn

import gradfold
from tests.zoo import Net, batches, distance

KINDS = ["none", "reentrant", "non_reentrant"]
BUSY = {"lr": 0.03, "betas": (0.8, 0.95), "weight_decay": 0.1, "warmup_steps": 4, "r": 0.5}


class Plain:
    """The paper's algorithm 1, element by element: x, y and z of every weight, each with its own count of steps."""

    def __init__(self, params, lr, betas, weight_decay=0.0, warmup_steps=0, r=0.0, eps=1e-8, weight_lr_power=2.0):
        self.params = list(params)
        self.given = lr, *betas, eps, weight_decay, warmup_steps, r, weight_lr_power
        self.x = [p.detach().reshape(-1).tolist() for p in self.params]
        self.z = copy.deepcopy(self.x)
        self.v = [[0.0] * len(x) for x in self.x]
        self.counts = [[0, 0.0, 0.0] for _ in self.params]

    def step(self):
        lr, beta1, beta2, eps, decay, warmup, r, power = self.given
        for index, param in enumerate(self.params):
            if param.grad is None:
                continue
            count, largest, total = self.counts[index]
            count += 1
            now = lr * min(1.0, count / warmup) if warmup else lr
            largest = max(largest, now)
            share = count**r * largest**power
            total += share
            self.counts[index] = [count, largest, total]
            x, z, v = self.x[index], self.z[index], self.v[index]
            y = param.detach().reshape(-1).tolist()
            for at, g in enumerate(param.grad.reshape(-1).tolist()):
                v[at] = beta2 * v[at] + (1 - beta2) * g * g
                z[at] -= now * (g / (math.sqrt(v[at] / (1 - beta2**count)) + eps) + decay * y[at])
                x[at] = (1 - share / total) * x[at] + share / total * z[at]
                y[at] = (1 - beta1) * z[at] + beta1 * x[at]
            param.data.copy_(torch.tensor(y, dtype=torch.float64).view_as(param))

    def averages(self):
        return [torch.tensor(x, dtype=torch.float64).view_as(p) for x, p in zip(self.x, self.params, strict=True)]


def pair(scene="tied", **hyper):
    torch.manual_seed(0)
    model = Net(scene).double()
    plain = copy.deepcopy(model)
    hyper = BUSY | hyper
    return model, plain, gradfold.AdamWScheduleFree(model.parameters(), **hyper), Plain(plain.parameters(), **hyper)


def gap(model, tensors):
    return max(float((p.detach() - t).abs().max()) for p, t in zip(model.parameters(), tensors, strict=True))


WAYS = {
    "plain": {},
    "clipping": {"clip_norm": 0.05, "accumulate": 2},
    "blocks": {"scratch_bytes": 600},
    "deferred": {"timing": "deferred"},
}
CASES = [(way, "none") for way in WAYS] + [("clipping", "reentrant"), ("clipping", "non_reentrant")]


@pytest.mark.parametrize(("way", "kind"), CASES)
def test_it_equals_the_paper(way, kind):
    model, plain, optimizer, theirs = pair()
    options = WAYS[way]
    fold = gradfold.fold(model, optimizer, **options)
    micro = options.get("accumulate", 1)
    for index, ids in enumerate(batches(20 * micro)):
        fold.backward(model.loss(ids, kind) / micro)
        (plain.loss(ids) / micro).backward()
        if (index + 1) % micro:
            continue
        if "clip_norm" in options:
            nn.utils.clip_grad_norm_(plain.parameters(), options["clip_norm"])
        theirs.step()
        optimizer.step()
        for one in (model, plain):
            one.zero_grad()
        if index == 9:  # there and back is nowhere
            optimizer.eval()
            optimizer.train()
    assert distance(model, plain) < 1e-10
    optimizer.eval()
    assert gap(model, theirs.averages()) < 1e-10
    optimizer.train()
    assert distance(model, plain) < 1e-10


@pytest.mark.parametrize("offload", [None, pytest.param("cpu", marks=pytest.mark.slow), "disk"])
def test_a_working_set(offload, tmp_path):
    """Both weights of what sleeps, too: chunks that have stepped, and one that has not."""
    model, plain, optimizer, _ = pair("untied")
    settings = {"interval": 2, "offload": offload, "by": "bytes"}
    folder = {"folder": str(tmp_path)} if offload == "disk" else {}
    fold = gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(chunks=4, **settings, **folder))
    names, whole = dict(model.named_parameters()), dict(plain.named_parameters())
    slices = {name: optimizer.slices_of(param) for name, param in names.items()}
    parts = {  # a plain weight for each slice, which has its own count of steps
        (name, region): nn.Parameter((whole[name] if region is None else region.of(whole[name])).detach().clone())
        for name in names
        for region, _ in slices[name]
    }
    theirs = Plain(parts.values(), **BUSY)
    for index, ids in enumerate(batches(7)):
        awake = [
            (param.name, one.region)
            for param in fold._state.params.values()
            if param.param.requires_grad
            for one in param.slices
        ]
        plain.loss(ids).backward()
        fold.backward(model.loss(ids))
        for (name, region), part in parts.items():
            grad = whole[name].grad
            part.grad = (grad if region is None else region.of(grad)).clone() if (name, region) in awake else None
        theirs.step()
        optimizer.step()
        plain.zero_grad()
        for (name, region), part in parts.items():
            (whole[name] if region is None else region.of(whole[name])).data.copy_(part.detach())
        if index in (2, 4):
            optimizer.eval()
            optimizer.train()
    assert len(parts) > len(names)
    assert distance(model, plain) < 1e-10
    optimizer.eval()
    for ((name, region), _), average in zip(parts.items(), theirs.averages(), strict=True):
        got = names[name].detach() if region is None else region.of(names[name].detach())
        assert float((got - average).abs().max()) < 1e-10, name
    optimizer.train()
    assert distance(model, plain) < 1e-10


def step(model, optimizer, ids):
    model.loss(ids).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
def test_eval_mode_refuses_to_step(kind):
    model, _, optimizer, _ = pair()
    gradfold.fold(model, optimizer)
    first, second = batches(2)
    step(model, optimizer, first)
    optimizer.eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.loss(second)
    embedded = torch.randn(3, model.embed.weight.shape[1], dtype=torch.float64, requires_grad=True)
    torch.autograd.grad(model.head(embedded).sum(), embedded)  # steps nothing
    with pytest.raises(gradfold.FoldError, match=r"optimizer\.train\(\)"):
        model.loss(second, kind).backward()
    with pytest.raises(gradfold.FoldError, match=r"optimizer\.step\(\) in eval mode.*optimizer\.train\(\)"):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    optimizer.zero_grad()
    optimizer.train()
    model.loss(second, kind).backward()
    with pytest.raises(gradfold.FoldError, match=r"optimizer\.eval\(\) in the middle of a step"):
        optimizer.eval()
    optimizer.step()


def test_unfolded_steps_are_refused_too():
    param = nn.Parameter(torch.ones(3))
    optimizer = gradfold.AdamWScheduleFree([param])
    param.grad = torch.ones(3)
    optimizer.eval()
    for call in (optimizer.step, lambda: optimizer.apply(param)):
        with pytest.raises(gradfold.FoldError, match=r"optimizer\.train\(\)"):
            call()
    assert torch.equal(param, torch.ones(3))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("layout", ["ours", "the package's"])
def test_saved_and_loaded(mode, layout):
    model, plain, optimizer, theirs = pair()
    gradfold.fold(model, optimizer)
    ids = batches(8)
    for one in ids[:4]:
        step(model, optimizer, one)
        step(plain, Stepping(theirs, plain), one)
    getattr(optimizer, mode)()
    saved = copy.deepcopy(optimizer.state_dict() if layout == "ours" else optimizer.torch_state_dict())
    if layout != "ours":
        assert {*saved["state"][0]} == {"z", "exp_avg_sq"}
        assert (saved["param_groups"][0]["k"], saved["param_groups"][0]["train_mode"]) == (4, mode == "train")
        assert saved["param_groups"][0]["weight_sum"] == pytest.approx(theirs.counts[0][2], rel=1e-14)
        assert saved["param_groups"][0]["scheduled_lr"] == BUSY["lr"]
    other = Net("tied").double()
    other.load_state_dict(model.state_dict())
    resumed = gradfold.AdamWScheduleFree(other.parameters())
    gradfold.fold(other, resumed)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["train_mode"] is (mode == "train")
    assert "k" not in resumed.param_groups[0]
    resumed.train()
    for one in ids[4:]:
        step(other, resumed, one)
        step(plain, Stepping(theirs, plain), one)
    assert distance(other, plain) < 1e-10


class Stepping:
    """The plain loops with the two calls of an optimizer."""

    def __init__(self, plain, model):
        self.step, self.zero_grad = plain.step, model.zero_grad


@pytest.mark.parametrize("storage", [{"states": "int8", "small_size": 0}, {"master": "split16"}, {}], ids=str)
def test_bf16_weights(storage):
    """z stays in fp32 with its average; the weight is rounded as it is stored."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64).bfloat16()
    exact = copy.deepcopy(model).double()
    optimizer, theirs = gradfold.AdamWScheduleFree(model.parameters(), **BUSY, **storage), None
    theirs = gradfold.AdamWScheduleFree(exact.parameters(), **BUSY)
    gradfold.fold(model, optimizer)
    for index in range(6):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(index))
        for one, by, given in ((model, optimizer, x.bfloat16()), (exact, theirs, x.bfloat16().double())):
            one(given).square().mean().backward()
            by.step()
            by.zero_grad()
    assert all(states["z"].dtype == torch.float32 for states in optimizer.state.values())
    for mode in ("eval", "train"):
        for one in (optimizer, theirs):
            getattr(one, mode)()
        assert distance(model, exact) < 0.02, mode
    loaded = gradfold.AdamWScheduleFree(model.parameters(), **BUSY, **storage)
    saved = optimizer.state_dict()
    saved["state"] = {i: {k: v.bfloat16() if k == "z" else v for k, v in s.items()} for i, s in saved["state"].items()}
    loaded.load_state_dict(saved)
    assert all(states["z"].dtype == torch.float32 for states in loaded.state.values())


def test_a_group_that_joins_has_the_mode_of_the_others():
    optimizer = gradfold.AdamWScheduleFree([nn.Parameter(torch.ones(2))])
    optimizer.eval()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert [group["train_mode"] for group in optimizer.param_groups] == [False, False]


REFUSED = {
    "reset": ({}, {"states": "reset"}, r"states='reset'\) with AdamWScheduleFree.*use states='keep'"),
    "masters": ({"master": "split8"}, {}, r"working_set= with AdamWScheduleFree\(master='split8'\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_eval_could_not_reach_is_refused(case):
    storage, settings, message = REFUSED[case]
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).bfloat16()
    optimizer = gradfold.AdamWScheduleFree(model.parameters(), **storage)
    with pytest.raises(gradfold.FoldError, match=message):
        gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(chunks=2, **settings))
    assert type(model[0]) is nn.Linear


def test_slices_without_their_fold_are_refused():
    model, _, optimizer, _ = pair("untied")
    fold = gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(chunks=4, by="bytes"))
    step(model, optimizer, batches(1)[0])
    fold.remove()
    with pytest.raises(gradfold.FoldError, match="states of slices"):
        optimizer.eval()


def test_beside_another_optimizer():
    """One of two in eval mode refuses a backward that reaches its weights, and no other."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer, adamw = gradfold.AdamWScheduleFree(model[0].parameters()), gradfold.AdamW(model[1].parameters())
    gradfold.fold(model, [optimizer, adamw])
    optimizer.eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(gradfold.FoldError, match=r"a backward in eval mode.*optimizer\.train\(\)"):
        model(torch.ones(2, 3)).sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    optimizer.zero_grad()
    adamw.zero_grad()
    optimizer.train()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    adamw.step()
    assert not any(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_optimizer_of_torch_becomes_one():
    model = nn.Linear(3, 3)
    made = gradfold.optim.from_torch(torch.optim.AdamW(model.parameters(), lr=0.02), name="AdamWScheduleFree")
    assert type(made) is gradfold.AdamWScheduleFree
    assert (made.param_groups[0]["lr"], made.param_groups[0]["train_mode"]) == (0.02, True)
    optimizer = torch.optim.SGD(model.parameters(), maximize=True)
    with pytest.raises(gradfold.FoldError, match=r"maximize=True: gradfold\.AdamWScheduleFree has no such option"):
        gradfold.optim.from_torch(optimizer, name="AdamWScheduleFree")
    assert type(optimizer) is torch.optim.SGD
    with pytest.raises(ValueError, match="maximize=True: AdamWScheduleFree has no such option"):
        gradfold.AdamWScheduleFree([{"params": model.parameters(), "maximize": True}])
