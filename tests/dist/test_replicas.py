"""Replicas without a wrapper, against torch's AdamW on one process over the whole batch, in fp64."""

import copy
import hashlib
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gradfold
from gradfold.errors import FoldError
from tests.dist.tiny import HYPER, alone, batch, furthest, loss_of, tiny
from tests.dist.world import RankError

TILE = 2048  # bytes: the largest weight of Tiny has 16 KiB


def mine(step, micro=0):
    """Return this rank's rows of a batch."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return [part.chunk(size)[rank] for part in batch(step, micro)]


def different(**options):
    """Return a model with other weights on each rank."""
    model = tiny(**options)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(dist.get_rank())
    return model


def folded(model, optimizer=None, replicate=None, **options):
    gradfold.replicate(model, **{"tile_bytes": TILE, **(replicate or {})})
    optimizer = optimizer or gradfold.AdamW(model.named_parameters(), **HYPER)
    return gradfold.fold(model, optimizer, head="plain", **options), optimizer


def digest(model, optimizer, states=True):
    """Return a hash of all weights and, unless each rank has its own, all states."""
    found = hashlib.sha256()
    for param in model.parameters():
        tensors = [param.detach(), *(optimizer.state[param].values() if states else ())]
        for one in tensors:
            found.update(one.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def train(own, accumulate, clip, tile, model_options, options, replicate=None):
    model = different(**model_options)
    fold, optimizer = folded(model, replicate={"own_states": own, "tile_bytes": tile}, accumulate=accumulate, **options)
    reference, norms = alone(3, accumulate, clip, **model_options)
    differences = []
    for step in range(3):
        for micro in range(accumulate):
            ids, labels = mine(step, micro)
            fold.backward(loss_of(model(ids), labels) / accumulate)
        optimizer.step()
        optimizer.zero_grad()
        differences.append(abs(fold.grad_norm - norms[step]))
    left = [name for name, param in model.named_parameters() if param.grad is not None]
    states = sum(one.numel() for state in optimizer.state.values() for one in state.values())
    fold.remove()
    return furthest(model, reference), max(differences), left, states, digest(model, optimizer, not own)


def several(cases):
    return [train(*case) for case in cases]


def check(found, size=2):
    for cases in zip(*found, strict=True):
        for weights, norms, left, _, _ in cases:
            assert weights <= 1e-11
            assert norms <= 1e-12
            assert not left
        assert len({digest for *_, digest in cases}) == 1


CLIP = {"clip_norm": 0.05}
# without the biases of k, whose gradient is 0 but for rounding, which Adam blows up
TIED = {"tied": True, "bias": False}
CASES = [
    (False, 1, None, TILE, {}, {}),
    (True, 1, None, TILE, {}, {}),
    (False, 2, 0.05, TILE, {}, CLIP),
    (True, 2, 0.05, TILE, TIED, CLIP),
]
MORE = [
    (own, accumulate, clip, tile, model, options)
    for own in (False, True)
    for tile in (256, TILE, 1 << 24)
    for accumulate, clip, options in (
        (1, None, {}),
        (3, None, {}),
        (1, None, {"on_nonfinite": "ignore"}),
        (1, None, {"timing": "deferred"}),
        (1, 0.05, CLIP),
        (3, 0.05, CLIP | {"tape": "host"}),
        (1, 0.05, CLIP | {"clip": "two_pass"}),
    )
    for model in ({}, TIED, {"checkpoint": True}, {"checkpoint": False, "bias": False})
    if tile == TILE or not (model or options)
]


def test_as_on_one_process(two):
    found = two.run(several, CASES)
    check(found)
    (whole, own), (also, other) = ([states for _, _, _, states, _ in cases[:2]] for cases in found)
    assert whole == also
    matrices = sum(2 * p.numel() for p in tiny().parameters() if p.dim() > 1)
    assert own == other == whole - matrices // 2


@pytest.mark.slow
@pytest.mark.parametrize("world", ["two", "four"])
@pytest.mark.parametrize("first", range(0, len(MORE), 10))
def test_all_as_on_one_process(request, world, first):
    check(request.getfixturevalue(world).run(several, MORE[first : first + 10], timeout_s=600))


# the same bits everywhere ---------------------------------------------------------------------------------------------


def bits(own, master, states):
    model = different(dtype=torch.bfloat16)
    optimizer = gradfold.AdamW(
        model.named_parameters(), **HYPER, states=states, rounding="stochastic", master=master, small_size=0
    )
    fold, _ = folded(model, optimizer, {"own_states": own})
    before = digest(model, optimizer, False)
    for step in range(4):
        ids, labels = mine(step)
        loss_of(model(ids).float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    fold.remove()
    after = digest(model, optimizer, not own)
    return before != digest(model, optimizer, False), after, [p.detach().float() for p in model.parameters()]


def many_bits(cases):
    return [bits(*case) for case in cases]


@pytest.mark.parametrize("world", ["two", pytest.param("four", marks=pytest.mark.slow)])
def test_the_same_bits_on_all_ranks(request, world):
    cases = [(own, master, "int8") for own in (False, True) for master in (None, "split8")]
    found = request.getfixturevalue(world).run(many_bits, cases)
    for ranks in zip(*found, strict=True):
        assert all(moved for moved, _, _ in ranks)
        assert len({digest for _, digest, _ in ranks}) == 1
    for at in (0, 1):  # owners draw the bits that whole weights do
        whole, own = found[0][at], found[0][at + 2]
        assert all(torch.equal(a, b) for a, b in zip(whole[2], own[2], strict=True))


# what not all ranks have ----------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Two ways through; each batch takes the one that it names, or both."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = (nn.Linear(8, 8) for _ in range(3))
        self.never = nn.Linear(8, 8)

    def forward(self, x, ways):
        x = self.first(x).tanh()
        return sum(getattr(self, way)(x).square().sum() for way in ways)


def built():
    torch.manual_seed(0)
    return Branches().double()


def branch(own, options, ways):
    """Train with other ways on each rank, and in torch with the mean of the ranks' losses."""
    model, plain, size = built(), built(), dist.get_world_size()
    fold, optimizer = folded(model, replicate={"own_states": own, "tile_bytes": 128}, **options)
    torchs = torch.optim.AdamW(plain.parameters(), **HYPER)
    accumulate = options.get("accumulate", 1)
    for step in range(3):
        data = torch.randn(accumulate, size, 3, 8, generator=torch.Generator().manual_seed(step)).double()
        for micro in range(accumulate):
            if way := ways[dist.get_rank()][micro]:
                (model(data[micro, dist.get_rank()], way) / accumulate).backward()
            for rank in range(size):
                if ways[rank][micro]:
                    (plain(data[micro, rank], ways[rank][micro]) / accumulate / size).backward()
        optimizer.step()
        optimizer.zero_grad()
        norm = float(nn.utils.clip_grad_norm_(plain.parameters(), options.get("clip_norm") or float("inf")))
        torchs.step()
        torchs.zero_grad()
        assert abs(fold.grad_norm - norm) <= 1e-12
    fold.remove()
    return furthest(model, plain), digest(model, optimizer, False)


def branches(cases):
    return [branch(*case) for case in cases]


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_ranks_that_reach_other_weights(two, every):
    left, right, both, nothing = ("left",), ("right",), ("left", "right"), ()
    cases = [
        (own, options, ways)
        for own in (False, True)
        for options, ways in [
            ({}, [[left], [right]]),
            ({}, [[right], [both]]),
            ({}, [[left], [nothing]]),  # this rank has no backward at all
            ({"clip_norm": 0.1}, [[nothing], [both]]),
            ({"accumulate": 2}, [[left, right], [right, left]]),
            ({"accumulate": 2}, [[both, left], [right, nothing]]),  # and this one only the first
            ({"accumulate": 2, "clip_norm": 0.1}, [[left, nothing], [nothing, both]]),
        ]
    ]
    for ranks in zip(*two.run(branches, cases[::every]), strict=True):
        assert all(difference <= 1e-11 for difference, _ in ranks)
        assert len({digest for _, digest in ranks}) == 1


# when something goes wrong --------------------------------------------------------------------------------------------


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return breaks(grad)


def breaks(grad):
    raise ValueError("out of luck")


def failing(own, at, options):
    """One rank fails inside backward; the others hear of it, and all go on."""
    model, rank = different(), dist.get_rank()
    fold, optimizer = folded(model, replicate={"own_states": own}, **options)
    said, before = None, None
    for step in range(3):
        ids, labels = mine(step)

        def go(module, args):
            if at == "function":  # which may call a backward of its own, so that all gates wait
                return (Breaks.apply(args[0]),)
            args[0].register_hook(breaks)

        handle = None
        if step == 1:
            before = digest(model, optimizer, False)
            if rank == 1:
                handle = (model.layers["0"].inner if at == "layer" else model.head).register_forward_pre_hook(go)
        try:
            loss_of(model(ids), labels).backward()
            optimizer.step()
        except (ValueError, FoldError) as error:
            said = str(error)
        if handle:
            handle.remove()
        optimizer.zero_grad()
        if step == 1:
            before = before == digest(model, optimizer, False)
    fold.remove()
    return said, before, digest(model, optimizer, not own)


def fail_all(cases):
    return [failing(*case) for case in cases]


def test_a_rank_that_fails_in_backward(two):
    cases = [(True, "layer", {}), (False, "head", {}), (False, "layer", {"clip_norm": 1.0}), (False, "function", {})]
    for case, ranks in zip(cases, zip(*two.run(fail_all, cases), strict=True), strict=True):
        (heard, _, _), (own, _, _) = ranks
        assert "out of luck" in own
        assert "rank 1 has failed" in heard
        assert len({digest for *_, digest in ranks}) == 1
        assert {stayed for _, stayed, _ in ranks} == {case[1] == "function" or bool(case[2])}


def nonfinite(own, options):
    model = different()
    fold, optimizer = folded(model, replicate={"own_states": own}, **options)
    seen = []
    for step in range(3):
        ids, labels = mine(step)
        loss = loss_of(model(ids), labels)
        if step == 1 and dist.get_rank() == 1:
            loss = loss * float("inf")
        before = digest(model, optimizer, False)
        try:
            loss.backward()
            optimizer.step()
            seen.append("went on")
        except gradfold.errors.NonFiniteError as error:
            seen.append(str(error))
        optimizer.zero_grad()
        seen.append(before == digest(model, optimizer, False))
    fold.remove()
    return seen, digest(model, optimizer, not own), all(p.isfinite().all() for p in model.parameters())


def nonfinite_all(cases):
    return [nonfinite(*case) for case in cases]


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_gradients_that_are_not_finite_on_one_rank(two, every):
    cases = [
        (own, options)
        for own in (False, True)
        for options in ({}, {"clip_norm": 1.0}, {"on_nonfinite": "skip"}, {"timing": "deferred"})
    ][::every]
    found = two.run(nonfinite_all, cases)
    for (_own, options), ranks in zip(cases, zip(*found, strict=True), strict=True):
        for seen, _, finite in ranks:
            assert finite
            assert seen[0] == seen[4] == "went on"
            assert ("went on" if "on_nonfinite" in options else "not finite") in seen[2]
            assert seen[3]  # nothing has moved
        assert len({digest for _, digest, _ in ranks}) == 1


# refusals -------------------------------------------------------------------------------------------------------------


def say(call):
    try:
        call()
    except FoldError as error:
        return str(error)
    return None


def refusals():
    rank, said = dist.get_rank(), {}
    said["other model"] = say(lambda: gradfold.replicate(nn.Linear(2 + rank, 2)))
    said["meta"] = say(lambda: gradfold.replicate(nn.Linear(2, 2, device="meta")))
    said["ddp"] = say(lambda: gradfold.replicate(nn.parallel.DistributedDataParallel(nn.Linear(2, 2))))
    said["tile"] = say(lambda: gradfold.replicate(nn.Linear(2, 2), tile_bytes=0))
    said["mesh"] = say(lambda: gradfold.replicate(nn.Linear(2, 2), "dp"))
    model = gradfold.replicate(nn.Linear(2, 2))
    optimizer = gradfold.AdamW(model.parameters())
    said["group"] = say(lambda: gradfold.fold(model, optimizer, group="alone"))
    with torch.no_grad():
        model.weight.add_(rank)
    said["drifted"] = say(lambda: gradfold.fold(model, optimizer))
    gradfold.replicate(model)
    fold = gradfold.fold(model, optimizer)
    said["folded"] = say(lambda: gradfold.replicate(model))
    with fold.paused():
        model(torch.ones(1, 2)).sum().backward()
        said["paused"] = say(optimizer.step)
    optimizer.zero_grad()
    model.weight.requires_grad_(rank == 0)
    said["frozen"] = say(lambda: model(torch.ones(1, 2)).sum().backward())
    model.weight.requires_grad_(True)
    optimizer.zero_grad()
    wrapped = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    said["wrapper"] = say(lambda: gradfold.fold(wrapped, gradfold.AdamW(wrapped.parameters()), group="alone"))
    plain = nn.Linear(2, 2)
    optimizer = gradfold.AdamW(plain.parameters())
    said["own slices"] = say(
        lambda: gradfold.fold(
            gradfold.replicate(plain, own_states=True), optimizer, working_set=gradfold.WorkingSet(chunks=2)
        )
    )
    return said


WORDS = {
    "other model": "weight: of shape",
    "meta": "weight: on the meta device",
    "ddp": "DistributedDataParallel around the model",
    "tile": "tile_bytes=0",
    "mesh": "mesh='dp'",
    "group": "group='alone'",
    "drifted": "weight: its values differ between ranks 0 and 1",
    "folded": "folded already",
    "paused": "fold.paused()",
    "frozen": "weight: has a gradient on rank 0, and is frozen on rank 1",
    "wrapper": "gradfold.replicate",
    "own slices": "own_states=True",
}


def test_refusals(two):
    for said in two.run(refusals):
        assert said.keys() == WORDS.keys()
        for kind, words in WORDS.items():
            assert words in (said[kind] or ""), kind


def buffers():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with torch.no_grad():
        for one in [*model.parameters(), *model.buffers()]:
            one.add_(dist.get_rank())
    model[0].weight.data = model[0].weight.data.t()  # not contiguous
    gradfold.replicate(model)
    return [one.detach().clone() for one in [*model.parameters(), *model.buffers()]]


def test_parameters_and_buffers_are_those_of_the_first_rank(two):
    first, second = two.run(buffers)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def convolved(own, options):
    """Train weights of other than two dimensions."""

    def make():
        torch.manual_seed(0)
        kinds = (
            nn.Conv1d(4, 6, 3),
            nn.Tanh(),
            nn.Conv1d(6, 5, 2, bias=False),
            nn.PReLU(),
            nn.Flatten(),
            nn.Linear(25, 1),
        )
        return nn.Sequential(*kinds).double()

    model, plain = make(), make()
    fold, optimizer = folded(model, replicate={"own_states": own, "tile_bytes": 256}, **options)
    torchs = torch.optim.AdamW(plain.parameters(), **HYPER)
    for step in range(3):
        data = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(step)).double()
        model(data.chunk(dist.get_world_size())[dist.get_rank()]).square().mean().backward()
        plain(data).square().mean().backward()
        for one in (optimizer, torchs):
            one.step()
            one.zero_grad()
    fold.remove()
    return furthest(model, plain)


def convolutions(cases):
    return [convolved(*case) for case in cases]


def test_weights_of_other_dimensions(two):
    cases = [(own, options) for own in (False, True) for options in ({}, {"on_nonfinite": "ignore"})]
    assert all(difference <= 1e-11 for found in two.run(convolutions, cases) for difference in found)


def pairs():
    """Two pairs of ranks, each with copies of a model of its own."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("models", "copies"))
    model = different()
    gradfold.replicate(model, mesh["copies"], own_states=True, tile_bytes=TILE)
    first = model.norm.weight.detach().clone()
    optimizer = gradfold.AdamW(model.named_parameters(), **HYPER)
    fold = gradfold.fold(model, optimizer, head="plain")
    for step in range(2):
        ids, labels = (part.chunk(2)[dist.get_rank() % 2] for part in batch(step))
        loss_of(model(ids), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    fold.remove()
    return first, digest(model, optimizer, False)


@pytest.mark.slow
def test_a_mesh_of_some_ranks(four):
    found = four.run(pairs, log=False)  # the pairs are not alike
    for a, b in (found[:2], found[2:]):
        assert torch.equal(a[0], b[0])
        assert a[1] == b[1]
    assert found[0][1] != found[2][1]


def rotate(options):
    """A working set, and what a rank has done with it after some turns."""
    model = different()
    chunks = gradfold.WorkingSet(chunks=3, interval=1, **options)
    fold, optimizer = folded(model, working_set=chunks)
    for step in range(8):
        ids, labels = mine(step)
        loss_of(model(ids), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    single = tiny()
    other = gradfold.AdamW(single.named_parameters(), **HYPER)
    plain = gradfold.fold(single, other, working_set=chunks, head="plain", group="alone")
    for step in range(8):
        ids, labels = batch(step)
        loss_of(single(ids), labels).backward()
        other.step()
        other.zero_grad()
    plain.remove()
    fold.remove()
    return furthest(model, single), digest(model, optimizer)


def rotations(cases):
    return [rotate(options) for options in cases]


@pytest.mark.parametrize("options", [{}, pytest.param({"order": "importance"}, marks=pytest.mark.slow)])
def test_working_set(two, options):
    for ranks in zip(*two.run(rotations, [options]), strict=True):
        assert all(difference <= 1e-11 for difference, _ in ranks)
        assert len({digest for _, digest in ranks}) == 1


# states that each rank keeps its share of -----------------------------------------------------------------------------


def _steps(model, optimizer, steps, whole=False):
    for step in steps:
        ids, labels = batch(step) if whole else mine(step)
        loss_of(model(ids).to(torch.float32), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def resumed(options, dtype):
    """Save on all ranks, load into a fold with shares, and into one of whole states."""

    def make():
        model = different(dtype=dtype)
        optimizer = gradfold.AdamW(model.named_parameters(), **HYPER, small_size=0, **options)
        return model, optimizer

    model, optimizer = make()
    fold, _ = folded(model, optimizer, {"own_states": True})
    _steps(model, optimizer, range(2))
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    saved, plain = copy.deepcopy(optimizer.state_dict()), optimizer.torch_state_dict()
    shapes = [
        state.shape == param.shape
        for param, states in zip(model.parameters(), plain["state"].values(), strict=True)
        for state in states.values()
        if state.dim()
    ]
    torch.optim.AdamW(tiny(dtype=dtype).parameters()).load_state_dict(plain)
    _steps(model, optimizer, [2])
    fold.remove()
    found = []
    for own in (True, False):
        other, theirs = make()
        other.load_state_dict(weights)
        again, _ = folded(other, theirs, {"own_states": own})
        theirs.load_state_dict(saved)
        _steps(other, theirs, [2])
        again.remove()
        found.append(
            max(float((a - b).abs().max()) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        )
    return found, all(shapes), len(shapes)


def resumes(cases):
    return [resumed(*case) for case in cases]


def test_shares_of_states_are_saved_whole(two):
    cases = [({}, torch.float64), ({"states": "int8", "master": "split8", "rounding": "stochastic"}, torch.bfloat16)]
    for ranks in two.run(resumes, cases):
        for case, (found, whole, count) in zip(cases, ranks, strict=True):
            assert found[0] == 0
            assert found[1] <= (0 if case[0] else 1e-14)  # torch's fused kernel rounds by where its blocks end
            assert whole
            assert count > 40


def alone_in_saving():
    model = different()
    _fold, optimizer = folded(model, replicate={"own_states": True})
    ids, labels = mine(0)
    if dist.get_rank() == 0:
        return say(optimizer.state_dict)
    return say(lambda: loss_of(model(ids), labels).backward())


def test_states_are_gathered_by_all_ranks_or_none(two):
    first, second = two.run(alone_in_saving, log=False)
    assert "gathering states" in first
    assert "averaging gradients" in second
    assert "the same calls" in first and "the same calls" in second


def killed():
    model, rank = different(), dist.get_rank()
    folded(model)
    ids, labels = mine(0)

    def go(module, args):
        args[0].register_hook(lambda grad: os._exit(7))

    if rank == 1:
        model.layers["0"].inner.register_forward_pre_hook(go)
    loss_of(model(ids), labels).backward()


@pytest.mark.slow
def test_a_rank_that_is_killed(two):
    with pytest.raises(RankError, match=r"(?s)FoldError: averaging gradients.*rank 1 has left.*exit code 7"):
        two.run(killed, log=False)
