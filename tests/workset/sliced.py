"""What a working set must do, the slow way: whole gradients by plain torch, cut, and one torch optimizer per slice."""

import torch

from tests.zoo import RULES


class SlicedTorch:
    """torch's optimizer of a rule over the slices of a plain model, each with a state of its own."""

    def __init__(self, model, rule="AdamW", keep=True):
        self.named = dict(model.named_parameters())
        self.rule, self.keep = rule, keep
        self.slices = {}  # slice -> (leaf, its optimizer)

    def step(self, active, max_norm=None):
        """Step the active slices (tuples of name, dim, start, stop) from ``.grad``; returns their norm."""
        views = [self.named[name].detach().narrow(dim, start, stop - start) for name, dim, start, stop in active]
        found = [self.named[name].grad for name, *_ in active]
        grads = [
            None if grad is None else grad.narrow(dim, start, stop - start).clone()
            for grad, (_, dim, start, stop) in zip(found, active, strict=True)
        ]
        known = [grad for grad in grads if grad is not None]
        norm = torch.nn.utils.get_total_norm(known) if known else torch.zeros(())
        if max_norm is not None:
            for grad in known:
                grad.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        for key, view, grad in zip(active, views, grads, strict=True):
            if key not in self.slices or not self.keep:
                leaf = torch.nn.Parameter(view.clone())
                self.slices[key] = leaf, getattr(torch.optim, self.rule)([leaf], foreach=False, **RULES[self.rule])
            leaf, optimizer = self.slices[key]
            leaf.data.copy_(view)  # others may have moved it (reset), and it is where the model is
            leaf.grad = grad
            optimizer.step()
            view.copy_(leaf.data)
        for param in self.named.values():
            param.grad = None
        return float(norm)

    def forget(self, but):
        """What ``states="reset"`` does when a chunk goes to sleep."""
        self.slices = {key: value for key, value in self.slices.items() if key in but}


def active_slices(fold):
    """The slices that are awake, as tuples."""
    rotation = fold._state.turns
    always = [(slot.name, 0, 0, slot.param.shape[0]) for slot in rotation.always]
    return always + [tuple(slice_) for slice_ in rotation.chunks[rotation.schedule.index]]


def untouched(before, model, active):
    """Whether every element outside the active slices is what it was, bit for bit."""
    for name, param in model.named_parameters():
        awake = torch.zeros(param.shape, dtype=torch.bool)
        for _, dim, start, stop in [slice_ for slice_ in active if slice_[0] == name]:
            awake.narrow(dim, start, stop - start).fill_(True)
        if not torch.equal(param.detach()[~awake], before[name][~awake]):
            return False
    return True


def snapshot(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}
