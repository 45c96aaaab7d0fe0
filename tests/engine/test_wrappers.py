"""Wrappers that reduce gradients themselves are refused in forward, every time, and nothing drifts apart in silence."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gradfold
from tests.zoo import distance, ours, twins

X = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fully_shard(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Ours(nn.parallel.DistributedDataParallel):
    """Somebody's subclass."""


def fsdp1(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


WRAPPERS = {
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "FullyShardedDataParallel": fsdp1,
    "subclass": Ours,
}
WAYS_OUT = {
    "DistributedDataParallel": r"gradfold\.replicate\(model, mesh\)",
    "DataParallel": r"on one device, or one process for each, with gradfold\.replicate",
    "FullyShardedDataParallel": r"FSDP2 \(torch\.distributed\.fsdp\.fully_shard\) before folding",
    "subclass": r"gradfold\.replicate\(model, mesh\)",
}
each_wrapper = pytest.mark.parametrize("name", WRAPPERS)


def mlp():
    return nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6))


@each_wrapper
def test_around_a_folded_model(name):
    start, model = twins(mlp)
    gradfold.fold(model, ours(model))
    wrapped = WRAPPERS[name](model)
    for _ in range(2):  # and again when the cell of the notebook is run again
        with pytest.raises(
            gradfold.FoldError,
            match=f"is around the folded model.*drift apart.*{WAYS_OUT[name]}.*an optimizer that is not",
        ):
            wrapped(X)
    if name != "FullyShardedDataParallel":
        assert distance(model, start) == 0


@each_wrapper
def test_around_the_model_before_folding(name):
    _, model = twins(mlp)
    wrapped = WRAPPERS[name](model)
    with pytest.raises(gradfold.FoldError, match=f"fold the plain model.*{WAYS_OUT[name]}"):
        gradfold.fold(wrapped, ours(wrapped))


def test_fully_shard_after_folding():
    _, model = twins(mlp)
    optimizer = ours(model)
    fold = gradfold.fold(model, optimizer)
    fully_shard(model)
    for _ in range(2):
        with pytest.raises(gradfold.FoldError, match=r"fold\.remove\(\), fully_shard, then make the opt.* and fold"):
            model(X)
    fold.remove()


def test_a_part_under_fully_shard():
    """Autograd is done, and has told so, before FSDP2 has summed the gradients of its outermost module."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, model = twins(mlp)
    fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)))
    pairs = (
        (plain, torch.optim.SGD(plain.parameters(), lr=0.1)),
        (model, gradfold.SGD(model.named_parameters(), lr=0.1)),
    )
    gradfold.fold(*pairs[1])
    for _ in range(2):
        for one, optimizer in pairs:
            one(X).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for theirs, mine in zip(plain.parameters(), model.parameters(), strict=True):
        whole = mine.full_tensor() if hasattr(mine, "full_tensor") else mine
        assert torch.allclose(whole, theirs, rtol=0, atol=1e-14)


def test_a_forward_under_fully_shard_is_refused_after_one_that_raised():
    """FSDP2 itself does not go on after a forward that raised, unless it is told to forget it."""
    _, model = twins(mlp)
    fully_shard(model)
    with pytest.raises(RuntimeError):
        model(X[:, :3])
    with pytest.raises(gradfold.FoldError, match=r"after one that raised \(then call reset_iter_state\(\)"):
        gradfold.fold(model, ours(model))
    if hasattr(model, "reset_iter_state"):
        model.reset_iter_state()
        gradfold.fold(model, ours(model))
        model(X).sum().backward()


@pytest.mark.parametrize("name", ["DistributedDataParallel", "DataParallel"])
def test_around_the_model_before_its_inside_is_folded(name):
    start, model = twins(mlp)
    wrapped = WRAPPERS[name](model)
    gradfold.fold(model, ours(model))
    with pytest.raises(gradfold.FoldError, match="is around the folded model"):
        wrapped(X)
    assert distance(model, start) == 0


def test_ddp_after_a_forward_without_it():
    """The first forward of the step is the bare model's, so the look at the step's start has seen nothing."""
    start, model = twins(mlp)
    optimizer = ours(model)
    gradfold.fold(model, optimizer)
    wrapped = nn.parallel.DistributedDataParallel(model)
    model(X)
    with pytest.raises(gradfold.FoldError, match="DistributedDataParallel is around the folded model"):
        wrapped(X).sum().backward()
        optimizer.step()
    assert distance(model, start) == 0


@pytest.mark.parametrize("inside", [True, False])
def test_a_wrapper_around_a_part(inside):
    _, model = twins(lambda: nn.ModuleList([mlp(), nn.Linear(6, 6)]))
    optimizer = ours(model)
    if inside:
        model[0] = nn.parallel.DistributedDataParallel(model[0])
        with pytest.raises(gradfold.FoldError, match="fold the plain model"):
            gradfold.fold(model, optimizer)
        return
    gradfold.fold(model, optimizer)
    part = nn.parallel.DistributedDataParallel(model[0])
    with pytest.raises(gradfold.FoldError, match="DistributedDataParallel is around"):
        model[1](part(X))


def test_under_no_grad_a_wrapper_may_evaluate():
    _, model = twins(mlp)
    optimizer = ours(model)
    gradfold.fold(model, optimizer)
    wrapped = nn.DataParallel(model)
    with torch.no_grad():
        wrapped(X)
    model(X).sum().backward()
    optimizer.step()
