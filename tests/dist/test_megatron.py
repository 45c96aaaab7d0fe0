"""``examples/megatron_wgrad.py`` on layers of Megatron's contract, against torch's AdamW on one process in fp64."""

import runpy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gradfold
from tests.dist.megatron_layers import ColumnParallelLinear, RowParallelLinear, part
from tests.dist.tiny import HYPER, furthest

EXAMPLE = Path(__file__).parents[2] / "examples" / "megatron_wgrad.py"
WIDTH, INNER, LAYERS = 8, 16, 2


class Block(nn.Module):
    def __init__(self, up, down):
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def whole():
    torch.manual_seed(0)
    blocks = (Block(nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH, bias=False)) for _ in range(LAYERS))
    return nn.Sequential(*blocks).double()


def batches(step, micro):
    random = torch.Generator().manual_seed(10 * step + micro)
    return torch.randn(6, 3, WIDTH, generator=random, dtype=torch.float64)  # [S, B, H]


def train(sequence_parallel, accumulate, clip):
    """Return differences of weights and norms from one process, and how the weights were reached."""
    from torch.distributed.device_mesh import init_device_mesh

    reference = whole()
    optimizer = torch.optim.AdamW(reference.parameters(), **HYPER)
    norms = []
    for step in range(3):
        for micro in range(accumulate):
            reference(batches(step, micro)).square().sum().backward()
        norms.append(float(nn.utils.clip_grad_norm_(reference.parameters(), clip or float("inf"))))
        optimizer.step()
        optimizer.zero_grad()

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    group = mesh.get_group()
    model = nn.Sequential(
        *(
            Block(
                ColumnParallelLinear(block.up.weight.detach(), block.up.bias.detach(), group, sequence_parallel),
                RowParallelLinear(block.down.weight.detach(), group, sequence_parallel),
            )
            for block in whole()
        )
    )
    runpy.run_path(str(EXAMPLE))["fold_layers"](model, mesh)
    optimizer = gradfold.AdamW(model.named_parameters(), **HYPER)
    fold = gradfold.fold(model, optimizer, accumulate=accumulate, clip_norm=clip)
    worst = 0.0
    for step in range(3):
        for micro in range(accumulate):
            x = batches(step, micro)
            y = model(part(x, 0, group).requires_grad_() if sequence_parallel else x.requires_grad_())
            y.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        worst = max(worst, abs(fold.grad_norm - norms[step]))
    weights = [param for param in fold._state.params.values() if param.param.dim() == 2]
    return furthest(model, reference), worst, {(p.folded, p.handed, p.dense) for p in weights}


@pytest.mark.parametrize(
    ("sequence_parallel", "accumulate", "clip"),
    [
        pytest.param(True, 2, 0.5, id="sequence parallel, accumulated, clipped"),
        pytest.param(False, 1, None, id="tensor parallel", marks=pytest.mark.slow),
        pytest.param(True, 1, None, id="sequence parallel", marks=pytest.mark.slow),
    ],
)
def test_the_seam(two, sequence_parallel, accumulate, clip):
    for weights, norms, reached in two.run(train, sequence_parallel, accumulate, clip):
        assert weights <= 1e-11
        assert norms <= 1e-12
        assert reached == {(True, 3 * accumulate, 0)}
