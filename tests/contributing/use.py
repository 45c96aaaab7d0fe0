"""Folds with one more rule, codec, module, backend and integration, and prints what came of it as JSON."""

import copy
import json
from types import SimpleNamespace

import torch
from torch import nn

import gradfold
from gradfold.modules.negated import Negated

X = torch.linspace(-1, 1, 12 * 256, dtype=torch.float64).reshape(12, 256)


def train(module, optimizer, **options):
    """Two steps on one batch, folded if there are options: the fold, the optimizer, and what the weight has become."""
    made = optimizer(module.parameters())
    found = gradfold.fold(module, made, **options) if options else None
    for _ in range(2):
        module(X.to(next(module.parameters()).dtype)).square().sum().backward()
        made.step()
        made.zero_grad()
    return found, made, next(module.parameters()).detach()


def apart(one, other):
    return (one - other).abs().max().item() / other.abs().max().item()


def theirs(params):
    return torch.optim.AdamW(params, lr=0.01)


def ours(params):
    return gradfold.AdamW(params, lr=0.01)


def a_rule(linear):
    """Against its formula in a plain loop."""
    weight = linear.weight.detach().clone()
    for _ in range(2):
        grad = 2 * (X @ weight.t()).t() @ X
        weight = weight - 0.01 * grad / (grad.abs() + 1e-3)
    fold, _, after = train(linear, lambda params: gradfold.Softsign(params, lr=0.01), backend="auto")
    return {"apart": apart(after, weight), "routes": str(fold.report())}


def a_codec(linear):
    """Against torch's AdamW, with states of a byte each."""
    linear.float()
    _, _, plain = train(copy.deepcopy(linear), theirs)
    _, made, after = train(linear, lambda params: gradfold.AdamW(params, lr=0.01, states="e5m2"), backend="auto")
    (states,) = made.state.values()
    stored = {str(value.dtype) for value in states.values() if torch.is_tensor(value) and value.numel() > 1}
    return {"apart": apart(after, plain), "dtypes": sorted(stored)}


def a_foldable_module():
    module = Negated(256, 64).double()
    _, _, plain = train(copy.deepcopy(module), theirs)
    fold, _, after = train(module, ours, backend="auto")
    return {"apart": apart(after, plain), "routes": str(fold.report())}


def a_backend(linear):
    _, _, plain = train(copy.deepcopy(linear), theirs)
    fold, _, after = train(linear, ours, backend="counting")
    try:
        train(nn.Linear(256, 2), ours, backend="none")
    except gradfold.FoldError as error:
        return {"apart": apart(after, plain), "prepared": fold._state.backend.prepared, "unknown": str(error)}


def an_integration(linear):
    """A loop that knows which of its three micro-batches is the last of a step."""

    def loop_of(model):
        return SimpleNamespace(model=model, optimizer=theirs(model.parameters()), batch=0, batches=3)

    def run(loop):
        for index in range(loop.batches):
            loop.batch = index
            loop.model(X[4 * index : 4 * index + 4]).square().sum().backward()
        loop.optimizer.step()
        return loop.model.weight.detach()

    plain, folded = loop_of(copy.deepcopy(linear)), loop_of(linear)
    return {
        "apart": apart(run(gradfold.toy_loop.fold_loop(folded)), run(plain)),
        "kind": type(folded.optimizer).__module__,
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    shared = nn.Linear(256, 64, bias=False).double()
    said = {"file": gradfold.__file__, "a foldable module": a_foldable_module()}
    for check in (a_rule, a_codec, a_backend, an_integration):
        said[check.__name__.replace("_", " ")] = check(copy.deepcopy(shared))
    print(json.dumps(said))
