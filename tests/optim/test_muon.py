"""Muon beside torch.optim.Muon: its formula, its storage, what it refuses, and the split of a model."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

import gradfold
from gradfold.backends import Scratch, newton_schulz
from gradfold.rules import MuonRule
from tests.pairs import each_pair, in_turn
from tests.zoo import CHECKPOINTS, SCENES, Net, batches, distance, no_gradients, same_bits, scene_run, twins

torchs_ns = pytest.importorskip("torch.optim._muon")._zeropower_via_newtonschulz
LR = 0.02


class Both:
    """Two optimizers in a loop written for one."""

    def __init__(self, *members):
        self.members = members

    def step(self):
        for member in self.members:
            member.step()

    def zero_grad(self):
        for member in self.members:
            member.zero_grad()


def torchs(model, **muon):
    matrices, others = gradfold.muon_groups(model)
    return Both(
        torch.optim.Muon(matrices, **{"lr": LR, **muon}), torch.optim.AdamW(others, lr=1e-3, foreach=False, eps=1e-6)
    )


def ours(model, **muon):
    matrices, others = gradfold.muon_groups(model)
    return Both(gradfold.Muon(matrices, **{"lr": LR, **muon}), gradfold.AdamW(others, lr=1e-3, eps=1e-6))


def folded(model, fold=None, **muon):
    both = ours(model, **muon)
    gradfold.fold(model, list(both.members), **(fold or {}))
    return both


def layers(*sizes, dtype=torch.float64):
    """Linears without bias, so that all parameters are Muon's."""
    torch.manual_seed(0)
    made = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*[part for one in made for part in (one, nn.Tanh())]).to(dtype)


def train(model, optimizer, steps=4, seed=1, rows=8):
    generator = torch.Generator().manual_seed(seed)
    weight = next(model.parameters())
    for _ in range(steps):
        x = torch.randn(rows, weight.shape[1], generator=generator, dtype=torch.float64).to(weight.dtype)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


# torch's formula ------------------------------------------------------------------------------------------------------


@in_turn(scene=SCENES, kind=CHECKPOINTS)
def test_zoo_beside_torch(scene, kind):
    model, plain = twins(lambda: Net(scene))
    scene_run(plain, torchs(plain), kind, 20)
    scene_run(model, folded(model), kind, 20)
    assert distance(model, plain) <= 1e-10
    assert no_gradients(model)


@pytest.mark.parametrize("scene", SCENES)
def test_fp32_beside_torch(scene):
    """Bits of bf16 follow from bits of fp32: this holds because the gradients are torch's to the bit."""
    model, plain = twins(lambda: Net(scene), torch.float32)
    scene_run(plain, torchs(plain), "none", 20)
    scene_run(model, folded(model), "none", 20)
    assert distance(model, plain) <= 1e-8


OPTIONS = {
    "no momentum": {"momentum": 0.0},
    "no nesterov": {"nesterov": False},
    "small momentum": {"momentum": 0.3},
    "match_rms_adamw": {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.01},
    "original": {"adjust_lr_fn": "original", "weight_decay": 0.0},
    "other polynomial": {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 7, "eps": 1e-3},
    "no iterations": {"ns_steps": 0},
    "one iteration": {"ns_steps": 1},
    "lr a tensor": {"lr": torch.tensor(0.02, dtype=torch.float64)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("route", ["folded", "ordinary"])
def test_options_beside_torch(options, route):
    plain = layers(12, 20, 9)
    model = copy.deepcopy(plain)
    optimizer = gradfold.Muon(model.parameters(), **{"lr": LR, **options})
    if route == "folded":
        gradfold.fold(model, optimizer)
    train(plain, torch.optim.Muon(plain.parameters(), **{"lr": LR, **options}))
    train(model, optimizer)
    assert distance(model, plain) <= 1e-14


@pytest.mark.parametrize("sizes", [(40, 3, 70), (1, 8, 1), (96, 130)], ids=str)
def test_many_blocks_beside_torch(sizes):
    """A tile of few rows: where a matrix is cut changes nothing."""
    plain = layers(*sizes)
    model = copy.deepcopy(plain)
    optimizer = gradfold.Muon(model.parameters(), lr=LR)
    gradfold.fold(model, optimizer, scratch_bytes=2048)
    train(plain, torch.optim.Muon(plain.parameters(), lr=LR))
    train(model, optimizer)
    assert distance(model, plain) <= 1e-13


def test_strided_weight():
    plain = layers(12, 20)
    model = copy.deepcopy(plain)
    model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
    optimizer = gradfold.Muon(model.parameters(), lr=LR)
    gradfold.fold(model, optimizer)
    train(plain, torch.optim.Muon(plain.parameters(), lr=LR))
    train(model, optimizer)
    assert distance(model, plain) <= 1e-13


FOLDS = {
    "accumulate": ({"accumulate": 3}, None),
    "clip exact": ({"clip_norm": 0.05}, 0.05),
    "clip two_pass": ({"clip_norm": 0.05, "clip": "two_pass"}, 0.05),
    "deferred": ({"timing": "deferred"}, None),
    "host tape": ({"accumulate": 3, "tape": "host"}, None),
}


@pytest.mark.parametrize(("fold", "limit"), FOLDS.values(), ids=FOLDS)
def test_ways_to_fold_beside_torch(fold, limit):
    model, plain = twins(lambda: Net("untied"))
    both, reference = ours(model), torchs(plain)
    made = gradfold.fold(model, list(both.members), **fold)
    parts = fold.get("accumulate", 1)
    for step in range(4):
        for ids in batches(parts * 4)[step * parts : (step + 1) * parts]:
            made.backward(model.loss(ids))
            plain.loss(ids).backward()
        if limit is not None:
            nn.utils.clip_grad_norm_(plain.parameters(), limit)
        for one in (both, reference):
            one.step()
            one.zero_grad()
    assert distance(model, plain) <= 1e-10


def test_clip_value_beside_torch():
    model, plain = twins(lambda: Net("untied"))
    both, reference = folded(model, {"clip_value": 1e-3}), torchs(plain)
    for ids in batches(4):
        model.loss(ids).backward()
        plain.loss(ids).backward()
        nn.utils.clip_grad_value_(plain.parameters(), 1e-3)
        for one in (both, reference):
            one.step()
            one.zero_grad()
    assert distance(model, plain) <= 1e-10


def test_autocast_and_hooked_parameters():
    """A weight that another module reads gets a dense gradient, which goes the same way."""
    plain = layers(12, 12, dtype=torch.float32)
    model = copy.deepcopy(plain)
    optimizer = gradfold.Muon(model.parameters(), lr=LR)
    fold = gradfold.fold(model, optimizer)
    reference = torch.optim.Muon(plain.parameters(), lr=LR)
    for seed in range(3):
        x = torch.randn(6, 12, generator=torch.Generator().manual_seed(seed))
        for one, stepper in ((model, optimizer), (plain, reference)):
            with torch.autocast("cpu", torch.bfloat16):
                loss = (one(x) + x @ one[0].weight).square().mean()
            loss.backward()
            stepper.step()
            stepper.zero_grad()
    assert fold.report().rows[0].route == "hooked"
    assert "1 orthogonalised as whole matrices" in fold.report().backend
    assert distance(model, plain) <= 1e-2


def test_rule_of_a_group_is_adamw():
    """One optimizer with a rule for each group does what two do."""
    model, other = twins(lambda: Net("untied"))
    matrices, rest = gradfold.muon_groups(model)
    groups = [{"params": matrices}, {"params": rest, "rule": "adamw", "eps": 1e-6}]
    optimizer = gradfold.Muon(groups, lr=LR)
    gradfold.fold(model, optimizer)
    scene_run(model, optimizer, "none", 5)
    scene_run(other, folded(other), "none", 5)
    assert same_bits(model, other)
    assert optimizer.param_groups[1]["lr"] == 1e-3 and optimizer.param_groups[1]["weight_decay"] == 1e-2
    saved = copy.deepcopy(optimizer.state_dict())
    again = gradfold.Muon(groups, lr=1.0)
    again.load_state_dict(saved)
    assert set(again.state[rest[0][1]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(again.state[matrices[0][1]]) == {"momentum_buffer"}


# the orthogonalisation ------------------------------------------------------------------------------------------------


class Numbers:
    ns_coefficients, ns_steps, eps = (3.4445, -4.775, 2.0315), 5, 1e-7


def orthogonal(direction, widened):
    form = newton_schulz.Shape(*direction.shape, widened)
    work = Scratch().cut(form.wanted(), direction.device)
    for tensor in work:
        tensor.fill_(float("nan"))  # no value of it may be read before it is written
    work[0].copy_(direction)
    return newton_schulz.orthogonalize(form, work, Numbers).double()


@pytest.mark.parametrize("shape", [(9, 30), (30, 9), (17, 17), (1, 5)], ids=str)
def test_orthogonalisation_has_torchs_bits(shape):
    torch.manual_seed(0)
    direction = torch.randn(shape)
    expected = torchs_ns(direction, Numbers.ns_coefficients, Numbers.ns_steps, Numbers.eps).double()
    assert torch.equal(orthogonal(direction, False), expected)


@pytest.mark.parametrize("shape", [(9, 300), (300, 9), (70, 70)], ids=str)
def test_products_in_fp32(monkeypatch, shape):
    """They differ from bf16's by its own rounding: about one in the last of its eight bits, after five iterations."""
    monkeypatch.setattr(newton_schulz, "WIDE_BYTES", 1)  # blocks of 64 columns
    torch.manual_seed(0)
    direction = torch.randn(shape)
    expected = torchs_ns(direction, Numbers.ns_coefficients, Numbers.ns_steps, Numbers.eps).double()
    got = orthogonal(direction, True)
    assert float((got - expected).norm() / expected.norm()) <= 2**-7
    values = torch.linalg.svdvals(got)
    assert values.min() > 0.6 and values.max() < 1.3


# memory ---------------------------------------------------------------------------------------------------------------


def test_scratch_is_counted_and_shared():
    model = layers(64, 96, 32, dtype=torch.bfloat16)
    fold = gradfold.fold(model, gradfold.Muon(model.parameters(), lr=LR))
    fold_bytes = sum(t.numel() * t.element_size() for t in fold.scratch_tensors())
    wanted = newton_schulz.Shape.of(model[0].weight).wanted()  # the larger of both matrices: 96 x 64
    work = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in wanted)
    tiles = 2 * 96 * 64 * 4  # the gradient, and a copy in fp32 of momentum or weight
    assert work + tiles <= fold_bytes <= work + tiles + 256 * 8
    before = [t.data_ptr() for t in fold.scratch_tensors()]
    optimizer = fold._state.optimizer
    train(model, optimizer, 2)
    assert before == [t.data_ptr() for t in fold.scratch_tensors()]
    assert no_gradients(model)


PARAMETERS, EMBEDDINGS = 8_030_261_248, 2 * 128256 * 4096  # of Llama 3.1 8B; input and output


@pytest.mark.slow
def test_no_gradient_in_a_planned_step():
    settings = {"optimizer": "Muon", "batch": 1, "tokens": 16, "dtype": "bfloat16"}
    plan = gradfold.plan("llama-3.1-8b", **settings)
    memory = plan.memory
    assert memory.most_bytes("gradients") <= 4 * 2**20  # of norms, one at a time
    states = 2 * (PARAMETERS - EMBEDDINGS) + 4 * EMBEDDINGS
    assert memory.most_bytes("states") == pytest.approx(states, rel=0.01)
    assert memory.most_bytes("scratch") <= 0.5 * 2**30
    assert [one.label for one in plan.baselines][-1] == "plain Muon"
    assert plan.baselines[-1].peak_bytes > memory.peak_bytes + 2 * PARAMETERS * 0.9


# storage --------------------------------------------------------------------------------------------------------------

STORED = {
    "bf16": {"states": "bf16"},
    "int8": {"states": "int8"},
    "int8 to nearest": {"states": "int8", "rounding": "nearest"},
}


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
def test_stored_momentum(stored):
    """Folded and not, to the bit, however the matrix is cut; near the run that stores all of it."""
    plain = layers(256, 128, dtype=torch.float32)
    model, other = copy.deepcopy(plain), copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizers = [gradfold.Muon(m.parameters(), lr=LR, small_size=0, **stored) for m in (model, other)]
    gradfold.fold(model, optimizers[0], scratch_bytes=20_000)
    start = copy.deepcopy(plain)
    reference = gradfold.Muon(plain.parameters(), lr=LR)
    for one, optimizer in ((model, optimizers[0]), (other, optimizers[1]), (plain, reference)):
        train(one, optimizer, 3, rows=256)
    assert same_bits(model, other)
    moved = float((plain[0].weight - start[0].weight).norm())
    assert float((model[0].weight - plain[0].weight).norm()) < 0.3 * moved


@pytest.mark.parametrize("master", [None, "split8", "split16"])
def test_bf16_weights(master):
    """With stochastic rounding, and with masters, bf16 weights follow those in fp32."""
    plain = layers(256, 128, dtype=torch.float32)
    model = copy.deepcopy(plain).bfloat16()
    start = copy.deepcopy(plain)
    optimizer = gradfold.Muon(model.parameters(), lr=1e-3, rounding="stochastic", master=master)
    gradfold.fold(model, optimizer)
    train(plain, gradfold.Muon(plain.parameters(), lr=1e-3), 8, rows=256)
    train(model, optimizer, 8, rows=256)
    moved = (plain[0].weight - start[0].weight).flatten()
    followed = (model[0].weight.float() - start[0].weight).flatten()
    assert float(moved @ followed / (moved @ moved)) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("stored", [{}, {"states": "int8", "small_size": 0}, {"states": "bf16"}], ids=str)
def test_resume_is_bit_identical(stored):
    model = layers(64, 32, dtype=torch.float32)
    optimizer = gradfold.Muon(model.parameters(), lr=LR, **stored)
    gradfold.fold(model, optimizer)
    train(model, optimizer, 2, seed=1)
    other = layers(64, 32, dtype=torch.float32)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    again = gradfold.Muon(other.parameters(), lr=1.0, **stored)
    gradfold.fold(other, again)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 2, seed=2)
    train(other, again, 2, seed=2)
    assert same_bits(model, other)


def test_state_dicts_both_ways():
    plain = layers(12, 20, 9)
    model = copy.deepcopy(plain)
    mine, theirs = gradfold.Muon(model.parameters(), lr=LR), torch.optim.Muon(plain.parameters(), lr=LR)
    gradfold.fold(model, mine)
    assert not mine.state_dict()["state"]  # as torch: nothing before the first step
    train(model, mine, 2)
    train(plain, theirs, 2)
    saved, other = mine.state_dict(), theirs.state_dict()
    assert saved["param_groups"] == other["param_groups"]
    assert {k: set(v) for k, v in saved["state"].items()} == {k: set(v) for k, v in other["state"].items()}
    theirs.load_state_dict(copy.deepcopy(mine.torch_state_dict()))
    mine.load_state_dict(copy.deepcopy(other))
    train(model, mine, 2, seed=2)
    train(plain, theirs, 2, seed=2)
    assert distance(model, plain) <= 1e-14


def test_from_torch():
    plain = layers(12, 20, 9)
    model = copy.deepcopy(plain)
    optimizer, reference = torch.optim.Muon(model.parameters(), lr=LR), torch.optim.Muon(plain.parameters(), lr=LR)
    train(model, optimizer, 2)
    gradfold.fold(model, gradfold.optim.from_torch(optimizer))
    assert type(optimizer) is gradfold.Muon
    train(model, optimizer, 2, seed=2)
    train(plain, reference, 2)
    train(plain, reference, 2, seed=2)
    assert distance(model, plain) <= 1e-14


# a working set, and what is refused -----------------------------------------------------------------------------------


@each_pair(by=["layer", "bytes"], axis=["out", "in"])
def test_working_set_takes_whole_matrices(by, axis):
    model = layers(12, 12, 12, 12)
    optimizer = gradfold.Muon(model.parameters(), lr=LR)
    chunks = {} if by == "layer" else {"chunks": 3, "axis": axis}
    fold = gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(by=by, interval=1, **chunks))
    before = copy.deepcopy(model)
    for _ in range(3):
        fold.backward(model(torch.ones(2, 12, dtype=torch.float64)).square().sum())
        optimizer.step()
        optimizer.zero_grad()
    assert all(chunk.first == chunk.last for chunk in fold.report().chunks)
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_a_slice_of_a_matrix():
    model = layers(12, 12)
    by = [[("0.weight", slice(0, 6))], [("0.weight", slice(6, 12))]]
    with pytest.raises(gradfold.FoldError, match=r"0.weight\[0:6\].*Muon orthogonalises whole matrices"):
        gradfold.fold(model, gradfold.Muon(model.parameters()), working_set=gradfold.WorkingSet(by=by, interval=1))


REFUSED = {
    "a vector": ({}, [nn.Parameter(torch.zeros(3))], r"shape \(3,\).*gradfold.muon_groups"),
    "a kernel": ({}, [("conv", nn.Parameter(torch.zeros(2, 3, 4)))], "conv, of shape.*gradfold.muon_groups"),
    "lr": ({"lr": -1.0}, None, "lr=-1"),
    "momentum": ({"momentum": -1.0}, None, "momentum=-1"),
    "weight_decay": ({"weight_decay": -1.0}, None, "weight_decay=-1"),
    "adjust_lr_fn": ({"adjust_lr_fn": "rms"}, None, "adjust_lr_fn='rms'.*match_rms_adamw"),
    "ns_steps": ({"ns_steps": 100}, None, "ns_steps=100"),
    "ns_coefficients": ({"ns_coefficients": (1.0, 2.0)}, None, "three numbers"),
    "rule": ({}, [{"params": [nn.Parameter(torch.zeros(3))], "rule": "sgd"}], "rule='sgd'"),
    "adamw": ({}, [{"params": [nn.Parameter(torch.zeros(3))], "rule": "adamw", "betas": (2, 0)}], "betas"),
    "capturable": ({}, [{"params": [nn.Parameter(torch.zeros(3, 3))], "capturable": True}], "capturable=True"),
}


@pytest.mark.parametrize(("options", "params", "said"), REFUSED.values(), ids=REFUSED)
def test_refused(options, params, said):
    with pytest.raises(ValueError, match=said):
        gradfold.Muon(params or [nn.Parameter(torch.zeros(3, 3))], **options)


@pytest.mark.parametrize("name", ["foreach", "fused", "capturable", "differentiable", "maximize"])
def test_arguments_that_torchs_has_not(name):
    with pytest.raises(TypeError, match=name):
        gradfold.Muon([nn.Parameter(torch.zeros(3, 3))], **{name: False})


def test_add_param_group_refuses_a_vector():
    model = nn.Linear(4, 4)
    optimizer = gradfold.Muon([model.weight])
    with pytest.raises(ValueError, match="muon_groups"):
        optimizer.add_param_group({"params": [model.bias]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [model.bias], "rule": "adamw"})
    assert isinstance(optimizer.rule_of(optimizer.param_groups[0]), MuonRule)


def test_a_gradient_that_is_not_finite_stays_out():
    model = layers(12, 20)
    optimizer = gradfold.Muon(model.parameters(), lr=LR)
    gradfold.fold(model, optimizer, on_nonfinite="skip", scratch_bytes=2048)
    train(model, optimizer, 1)
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()["state"])
    (model(torch.full((2, 12), float("nan"), dtype=torch.float64))).sum().backward()
    optimizer.step()
    assert same_bits(model, before)
    assert torch.equal(state[0]["momentum_buffer"], optimizer.state_dict()["state"][0]["momentum_buffer"])


# muon_groups ----------------------------------------------------------------------------------------------------------


def names(pairs):
    return [name for name, _ in pairs]


@pytest.mark.parametrize("tied", [True, False])
def test_split_of_a_causal_model(tied):
    from tests.llama import small_llama

    transformers = pytest.importorskip("transformers")
    config = small_llama(tie_word_embeddings=tied)
    matrices, others = gradfold.muon_groups(transformers.LlamaForCausalLM(config))
    assert all(".self_attn." in name or ".mlp." in name for name in names(matrices)) and len(matrices) == 7
    heads = [] if tied else ["lm_head.weight"]
    assert set(names(others)) >= {"model.embed_tokens.weight", "model.norm.weight", *heads}


SPLITS = {
    "the last Linear": (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), ["0.weight"]),
    "named head": (nn.ModuleDict({"head": nn.Linear(4, 3), "body": nn.Linear(4, 4)}), ["body.weight"]),
    "kernels": (nn.Sequential(nn.Conv1d(3, 3, 2), nn.Linear(3, 3), nn.Linear(3, 2)), ["1.weight"]),
    "embedding alone": (nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 4)), ["1.weight"]),
}


@pytest.mark.parametrize(("model", "expected"), SPLITS.values(), ids=SPLITS)
def test_split(model, expected):
    matrices, others = gradfold.muon_groups(model)
    assert names(matrices) == expected
    assert {*names(matrices), *names(others)} == {name for name, _ in model.named_parameters()}
    next(iter(model.parameters())).requires_grad_(False)
    both = gradfold.muon_groups(model)
    assert len(names(both[0])) + len(names(both[1])) == len(list(model.parameters())) - 1
