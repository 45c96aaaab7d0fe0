"""A loss head's weight steps by row blocks and the rule's kernel, as on the reference backend."""

import pytest
import torch
from torch import nn

import gradfold
from tests.zoo import distance

pytestmark = pytest.mark.usefixtures("quick_tiles")


class Net(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 12), nn.Linear(12, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def train(backend, tied, **how):
    torch.manual_seed(0)
    model = Net(tied)
    optimizer = gradfold.AdamW(model.named_parameters(), lr=1e-2)
    gradfold.fold(model, optimizer, backend=backend, scratch_bytes=250, **how)
    ids = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        gradfold.linear_cross_entropy(model.embed(ids), model.head.weight, ids, shift=True, keep_bytes=0).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", [{}, {"clip_norm": 0.1}], ids=["", "clipped"])
def test_as_the_reference(tied, how):
    assert distance(train("triton", tied, **how), train("reference", tied, **how)) <= 1e-5
