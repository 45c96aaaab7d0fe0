"""A step's scalars: on the device, where nothing may look at them, they are those of the host."""

import numpy as np
import pytest
import torch

from gradfold.errors import FoldError
from tests.backends.native.eager import case
from tests.cases import RULE_ROWS

triton_scalars = pytest.importorskip("gradfold.backends.triton.scalars", exc_type=ImportError)
ON_DEVICE = ("lr", "step", "rate", "grad_rate", "avg_rate", "adaptive")  # with capturable=True


@pytest.mark.parametrize("row", RULE_ROWS, ids=lambda row: row.id)
@pytest.mark.parametrize("step", [1, 1000])  # RAdam changes over between them
def test_tensors_give_the_scalars_of_floats(row, step):
    given = case(row, step=step)
    twin = triton_scalars.twin_of(given.rule)
    assert twin is not None
    held = {
        name: torch.tensor(float(getattr(given.numbers, name)), dtype=torch.float64)
        for name in ON_DEVICE
        if hasattr(given.numbers, name)
    }
    live = given.numbers._replace(**held)
    cpu = torch.device("cpu")
    assert triton_scalars.flags_of(twin, live) == triton_scalars.flags_of(twin, given.numbers)
    scalars = triton_scalars.scalars_of(twin, given.numbers, step, cpu)
    assert scalars.shape == (twin.count + 1,) and scalars.dtype == torch.float32
    assert scalars[-1:].view(torch.int32).item() == step
    assert torch.equal(triton_scalars.scalars_of(twin, live, torch.tensor(float(step)), cpu), scalars)


def test_a_rule_of_another_formula_has_no_twin():
    class Other(type(case(RULE_ROWS[0]).rule)):
        pass

    assert triton_scalars.twin_of(Other()) is None


def test_nothing_is_copied_from_the_host_while_a_graph_is_captured(monkeypatch):
    transfer = pytest.importorskip("gradfold.backends.triton.transfer", exc_type=ImportError)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(FoldError, match="CUDA graph is being captured.*capturable=True"):
        transfer.to_device(np.zeros(3), torch.device("cuda"))
    assert transfer.to_device(np.zeros(3), torch.device("cpu")).tolist() == [0, 0, 0]
