"""What a torch optimizer says of states that only gradfold's can read, and what it loads as before."""

import pytest
import torch

import gradfold
from tests.optim.coded import Model

READABLE = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "fp32 beside bf16": (torch.bfloat16, {"states": "fp32"}),
}
UNREADABLE = {
    "int8": (torch.float32, {"states": "int8", "small_size": 0}),
    "int4": (torch.bfloat16, {"states": "int4", "small_size": 0}),
    "a master": (torch.bfloat16, {"master": "split8"}),
}


def trained(dtype, options, working_set=None):
    model = Model().to(dtype)
    optimizer = gradfold.AdamW(model.parameters(), lr=1e-2, **options)
    fold = gradfold.fold(model, optimizer, working_set=working_set)
    model.loss(0).backward()
    optimizer.step()
    return model, optimizer, fold


def torchs(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def refused(model, saved, match):
    other = torchs(model)
    with pytest.raises(gradfold.FoldError, match=match + r".*torch_state_dict\(\)"):
        other.load_state_dict(saved)
    assert not other.state


@pytest.mark.parametrize("stored", UNREADABLE)
def test_refused_at_load(stored, tmp_path):
    model, optimizer, _ = trained(*UNREADABLE[stored])
    refused(model, optimizer.state_dict(), r"'\w+\.\w+', which AdamW of torch cannot read")
    torch.save(optimizer.state_dict(), tmp_path / "saved.pt")
    refused(model, torch.load(tmp_path / "saved.pt"), "state_dict has")
    other = torchs(model)
    other.load_state_dict(optimizer.torch_state_dict())
    model.zero_grad()
    other.step()


def test_states_of_slices_are_refused():
    model, optimizer, _ = trained(torch.float32, {}, gradfold.WorkingSet(chunks=3))
    refused(model, optimizer.state_dict(), r"'\w+\[\d+:\d+\]'")


@pytest.mark.parametrize("stored", READABLE)
def test_loaded_as_before(stored):
    model, optimizer, fold = trained(*READABLE[stored])
    other = torchs(model)
    other.load_state_dict(optimizer.state_dict())
    assert len(other.state) == len(list(model.parameters()))
    fold.remove()
    model.loss(1).backward()
    other.step()


def test_strangers_are_left_alone():
    """Whatever torch makes of them: it is torch's to say."""
    param = torch.nn.Parameter(torch.ones(2))
    other = torch.optim.SGD([param], lr=1.0)
    saved = other.state_dict()
    saved["state"] = {0: {"a.b": torch.ones(2)}}
    other.load_state_dict(saved)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        other.load_state_dict({"state": {}, "param_groups": []})
