"""Which ranks step together: what fold() refuses of groups and options, and groups of their own."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gradfold
from tests.dist.parts import Parts, alone, folded, furthest, poisoned, said
from tests.dist.test_votes import backward, take
from tests.dist.tiny import HYPER


class Parted(nn.Module):
    """Plain on all ranks."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4).double()
        self.rest = nn.Linear(4, 4).double()

    def forward(self, x):
        return self.rest(self.first(x)).sum()


def plain_fold(group=None, model=None, **options):
    model = Parted() if model is None else model
    optimizer = gradfold.AdamW(model.named_parameters(), **HYPER)
    return gradfold.fold(model, optimizer, group=group, **options)


def refused():
    """What fold() says of groups and options; every model is unfolded afterwards."""
    found, rank = {}, dist.get_rank()
    world = dist.group.WORLD
    one = [dist.new_group([r]) for r in range(2)]
    found["no group"] = said(plain_fold)
    found["copies"] = said(lambda: plain_fold(world))
    found["text"] = said(lambda: plain_fold("all"))
    found["number"] = said(lambda: plain_fold(2))
    found["not in it"] = said(lambda: plain_fold(one[1 - rank]))
    found["alone, spread"] = said(lambda: folded(group="alone"))
    found["group too small"] = said(lambda: folded(group=one[rank]))
    found["options"] = said(lambda: folded(clip_norm=1.0 + rank))
    found["words"] = said(lambda: folded(joint=bool(rank)))
    found["optimizer options"] = said(lambda: folded(hyper={**HYPER, "lr": 1e-2 + rank}))
    found["names"] = said(other_names)

    model, optimizer, kept = unfoldable()
    found["one rank"] = said(lambda: gradfold.fold(model, optimizer))
    plain = all(type(module) is kind for module, kind in zip(model.modules(), kept, strict=True))
    found["unfolded"] = plain and optimizer._fold is None and not optimizer.state

    fold = plain_fold("alone")
    fold.model(torch.ones(2, 4, dtype=torch.float64)).backward()
    fold._state.optimizer.step()
    fold.remove()
    found["alone"] = fold._state.ranks is None
    fold = plain_fold(one[rank])  # a group of its own; nothing is shared
    found["subgroup"] = fold._state.ranks.size
    fold.remove()
    return found


def other_names():
    from tests.dist.parts import spread

    model = spread()
    params = model.named_parameters() if dist.get_rank() else model.parameters()
    gradfold.fold(model, gradfold.AdamW(params, **HYPER))


def unfoldable():
    """Rank 1 has a hook in the way."""
    from tests.dist.parts import spread

    model = spread()
    kept = list(map(type, model.modules()))
    if dist.get_rank() == 1:
        model.scale.register_hook(lambda grad: grad)
    return model, gradfold.AdamW(model.named_parameters(), **HYPER), kept


def test_what_fold_refuses(two):
    for rank, found in enumerate(two.run(refused)):
        other = 1 - rank
        assert "nothing says what the others train" in found["no group"]
        assert "fold(group=torch.distributed.group.WORLD)" in found["no group"]
        assert "'alone'" in found["no group"] and "gradfold.replicate" in found["no group"]
        assert "first.weight: ranks 0 and 1 both hold it whole" in found["copies"]
        assert found["text"].startswith("FoldError: group='all': a process group")
        assert found["number"].startswith("FoldError: group=2: a process group")
        assert "this process" in found["not in it"] or "a process group" in found["not in it"]
        assert "group='alone': a.weight is spread over ranks [0, 1]" in found["alone, spread"]
        assert f"group= of ranks [{rank}]: a.weight is spread over ranks [0, 1]" in found["group too small"]
        assert "fold() has clip_norm=1.0 on rank 0, and clip_norm=2.0 on rank 1" in found["options"]
        assert "fold() has joint=False on rank 0, and joint=True on rank 1" in found["words"]
        assert "its param_group has lr=0.01 on rank 0, and lr=1.01 on rank 1" in found["optimizer options"]
        assert "scale: called '0' in the optimizer of rank 0 and 'scale' in that of rank 1" in found["names"]
        assert ("scale" in found["one rank"]) and ("fold() on rank 1" in found["one rank"]) == (rank == 0), other
        assert found["unfolded"] is True
        assert found["alone"] is True
        assert found["subgroup"] == 1


def pairs():
    """Two pairs of ranks train models of their own; what is wrong in one pair does not touch the other."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "tp"))
    pair, within = mesh.get_local_rank("pair"), mesh["tp"]
    plan = {"a": ColwiseParallel(), "b": ColwiseParallel()}
    model, optimizer, fold = folded(
        parallelize_module(Parts(), within, plan), group=within.get_group(), timing="deferred"
    )
    size = fold._state.ranks.size
    take(model, optimizer, fold, pair)
    hook = poisoned(model.b, lambda grad: grad * (float("nan") if dist.get_rank() == 3 else 1.0))
    backward(model, fold, 2)
    raised = said(optimizer.step)
    hook.remove()
    optimizer.zero_grad()
    away = furthest(model, alone((pair, 2) if pair == 0 else (pair,))[0])
    fold.remove()

    everyone, optimizer, fold = folded(parallelize_module(Parts(), within, plan), timing="deferred")
    backward(everyone, fold, pair)  # in no group, they train one model, of which nothing sums the copies' gradients
    together = said(optimizer.step)
    optimizer.zero_grad()
    fold.remove()
    return size, raised, away, together


@pytest.mark.slow
def test_groups_of_ranks(four):
    for rank, (size, raised, away, together) in enumerate(four.run(pairs, log=False)):
        assert size == 2
        assert raised.startswith("NonFiniteError: b.weight") == (rank > 1), raised
        assert away <= 1e-11
        assert "its copies have got different gradients" in together
