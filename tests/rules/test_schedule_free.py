"""Schedule-free AdamW: against its formula in plain loops, its two weights, and states that sleep."""

import copy
import math

import pytest
import torch
from torch import nn

import gradfold
from gradfold.optim import RuleOptimizer
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
    return max(float((p - t).abs().max()) for p, t in zip(model.parameters(), tensors, strict=True))


WAYS = {
    "plain": {},
    "accumulate": {"accumulate": 2},
    "clipping": {"clip_norm": 0.05},
    "blocks": {"scratch_bytes": 600},
    "deferred": {"timing": "deferred"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
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
        if index == 8:  # there and back is nowhere
            optimizer.eval()
            optimizer.train()
    assert distance(model, plain) < 1e-10
    optimizer.eval()
    assert gap(model, theirs.averages()) < 1e-10
    optimizer.train()
    assert distance(model, plain) < 1e-10
