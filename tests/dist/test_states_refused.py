"""What the states of sharded parameters refuse, and the way out of it."""

import torch
import torch.distributed as dist
from torch import nn

import gradfold
from tests.dist.states import differing, everything, mesh_of
from tests.dist.tiny import whole


def said(call):
    try:
        call()
    except (ValueError, gradfold.FoldError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class One(nn.Module):
    def __init__(self, shape, dim, dtype=torch.float32):
        from torch.distributed.tensor import Shard, distribute_tensor

        super().__init__()
        self.w = nn.Parameter(distribute_tensor(torch.ones(shape, dtype=dtype), mesh_of(), [Shard(dim)]))


def refusals():
    from torch.distributed.tensor import DTensor

    found = {}
    split = One((64, 192), 1)
    found["made"] = said(lambda: gradfold.AdamW(split.named_parameters(), states="int8"))
    later = gradfold.AdamW(split.named_parameters(), states="fp32")
    later.param_groups[0]["states"] = "int8"
    found["folded"] = said(lambda: gradfold.fold(split, later))
    found["folded, left"] = [key for states in later.state.values() for key in states]
    split.w.grad = torch.ones_like(split.w)
    found["stepped"] = said(later.step)
    found["stepped, moved"] = float((whole(split.w.detach()) - 1).abs().max())
    found["vector"] = said(lambda: gradfold.AdamW(One((130,), 0).named_parameters(), states="int4", small_size=0))
    fine = gradfold.AdamW(split.named_parameters(), states="fp32")
    found["fp32"] = said(lambda: gradfold.fold(split, fine).remove())
    small = One((24, 256), 0)  # of 6144 elements, half of them here
    optimizer = gradfold.AdamW(small.named_parameters(), states="int8")
    gradfold.fold(small, optimizer)
    found["small"] = sorted(optimizer.state[small.w])
    saved = optimizer.state_dict()
    before = everything(small, optimizer)
    states = saved["state"][0]
    local = {key: value.to_local() if isinstance(value, DTensor) else value for key, value in states.items()}
    found["local"] = said(lambda: optimizer.load_state_dict({**saved, "state": {0: local}}))
    only = {**saved, "state": {0: {} if dist.get_rank() else local}}
    found["local, here only"] = said(lambda: optimizer.load_state_dict(only))
    found["changed"] = differing(before, everything(small, optimizer))
    return found


def test_refusals(two):
    for rank, found in enumerate(two.run(refusals)):
        assert "ValueError: w: (64, 192) is cut along dimension 1 over 2 ranks" in found["made"]
        assert "96 of 192 columns" in found["made"] and "states='fp32'" in found["made"]
        assert found["folded"].startswith("FoldError: w: (64, 192) is cut")
        assert found["folded, left"] == []
        assert found["stepped"].startswith("FoldError: parameter w: (64, 192) is cut")
        assert found["stepped, moved"] == 0
        assert "65 of 130 columns" in found["vector"]
        assert found["fp32"] == "nothing"
        assert "exp_avg.codes" in found["small"]
        assert "a plain tensor" in found["local"] and "give it as a DTensor" in found["local"]
        assert ("ValueError" if rank == 0 else "FoldError: optimizer.load_state_dict() on rank 0") in found[
            "local, here only"
        ]
        assert found["changed"] == []


def split_whole():
    """Return what differs where whole int8 states are loaded for a shard that would split their blocks, as fp32."""
    torch.manual_seed(0)
    plain = nn.Linear(192, 64, bias=False)
    its = gradfold.AdamW(plain.parameters(), states="int8", lr=1e-2)
    plain(torch.ones(3, 192)).sum().backward()
    its.step()
    saved = its.state_dict()
    model = One((64, 192), 1)
    optimizer = gradfold.AdamW(model.named_parameters(), states="fp32")
    refused = said(lambda: optimizer.load_state_dict(saved))
    saved["param_groups"][0]["states"] = "fp32"
    optimizer.load_state_dict(saved)
    got, want = (one.torch_state_dict()["state"][0] for one in (optimizer, its))
    return refused, differing({key: whole(value) for key, value in got.items()}, want)


def test_way_out_of_split_blocks(two):
    for refused, differs in two.run(split_whole):
        assert "w: (64, 192) is cut" in refused
        assert not differs
