"""Training holds as much after 500 steps as after a few, in every mode: live tensors, their bytes, Python's objects."""

import gc
import itertools

import pytest
import torch
from torch import nn

import gradfold
from gradfold.head import linear_cross_entropy
from tests.llama import small_llama
from tests.zoo import Net, batches

PERIOD = 12  # steps; every mode's habits and every working set's rounds come to the same point after as many
OBJECTS = 60  # Python objects that caches may still gain: shapes seen late, lazily made attributes


def held():
    """Live tensors, bytes of their storages, and objects that the garbage collector knows."""
    gc.collect()
    objects = gc.get_objects()
    # a type check that runs nobody's __class__ property
    tensors = [one for one in objects if issubclass(type(one), torch.Tensor)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return len(tensors), sum(storages.values()), len(objects)


class Loop:
    """One step of a mode; subclasses change what a step does."""

    dtype, kind, options, storage, working_set = torch.float64, "none", {}, {}, {}

    def __init__(self, folder):
        self.folder = folder
        torch.manual_seed(0)
        self.model = self.make().to(self.dtype)
        self.optimizer = gradfold.AdamW(self.model.parameters(), lr=1e-3, **self.storage)
        self.data = itertools.cycle(batches(PERIOD))
        self.step = 0
        self.start()

    def make(self):
        return Net("tied")

    def start(self):
        options = dict(self.options)
        if self.working_set:
            settings = dict(self.working_set)
            if settings.get("offload") == "disk":
                settings["folder"] = self.folder
            options["working_set"] = gradfold.WorkingSet(interval=2, **settings)
        self.fold = gradfold.fold(self.model, self.optimizer, **options)

    def loss(self):
        return self.model.loss(next(self.data), self.kind)

    def backward(self):
        for _ in range(self.options.get("accumulate", 1)):
            self.fold.backward(self.loss())

    def run(self):
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1


def mode(name="", loop=Loop, **changes):
    return type(name, (loop,), changes)


class Head(Loop):
    """A causal model of transformers, whose loss is folded."""

    dtype = torch.float32

    def make(self):
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM(small_llama(vocab_size=24, hidden_size=8, num_attention_heads=2))

    def loss(self):
        ids = next(self.data)
        return self.model(input_ids=ids, labels=ids).loss


class OwnHead(Loop):
    """`linear_cross_entropy` called by the model itself, on a tied weight."""

    def loss(self):
        ids = next(self.data)
        return linear_cross_entropy(self.model.embed(ids), self.model.head.weight, ids)


class Paused(Loop):
    """Every third step in plain PyTorch, and a backward that is thrown away before each."""

    def run(self):
        with self.fold.paused():
            self.loss().backward()
            self.model.zero_grad()
        if self.step % 3:
            return super().run()
        with self.fold.paused():
            super().run()


class Contexts(Loop):
    """Accumulation by `fold.accumulating()`."""

    def backward(self):
        with self.fold.accumulating():
            self.loss().backward()
        self.loss().backward()


class Failing(Loop):
    """Every third backward raises half-way, and is run again after zero_grad()."""

    def backward(self):
        if self.step % 3 == 0:
            loss = self.loss()
            handle = self.model.blocks[1].register_full_backward_hook(_raise)
            with pytest.raises(RuntimeError, match="half-way"):
                self.loss().backward()
            handle.remove()
            del loss
            self.optimizer.zero_grad()
        super().backward()


def _raise(*_):
    raise RuntimeError("half-way")


class Dropped(Loop):
    """A forward whose loss is never used, one without grad, and one in eval mode."""

    def backward(self):
        self.loss()
        with torch.no_grad():
            self.loss()
        self.model.eval()
        self.loss()
        self.model.train()
        super().backward()


class Scheduled(Loop):
    """Another learning rate, weight decay and clipping limit in every step."""

    def run(self):
        self.optimizer.param_groups[0].update(lr=1e-3 / (1 + self.step), weight_decay=1e-4 * self.step)
        super().run()


class Reloaded(Loop):
    """Loads its own state_dict now and then."""

    def run(self):
        super().run()
        if self.step % PERIOD == 0:
            self.optimizer.load_state_dict(self.optimizer.state_dict())


class Refolded(Loop):
    """Removes the fold and folds again."""

    def run(self):
        super().run()
        if self.step % PERIOD == 0:
            self.fold.remove()
            self.start()


class Skipping(Loop):
    """Every third gradient is not finite."""

    def loss(self):
        return super().loss() * (float("nan") if self.step % 3 == 0 else 1.0)


class Frozen(Loop):
    """A parameter is frozen in every other step."""

    def run(self):
        self.model.blocks[0].up.weight.requires_grad_(self.step % 2 == 0)
        super().run()


class Hooked(Loop):
    """Only parameters that are not folded, some of them in segments."""

    def make(self):
        return nn.Sequential(nn.Conv1d(6, 6, 1), nn.Tanh(), nn.GroupNorm(2, 6))

    def loss(self):
        x = torch.randn(2, 6, 5, dtype=self.dtype)
        return torch.utils.checkpoint.checkpoint(self.model, x, use_reentrant=False).pow(2).sum()


BYTES = {"chunks": 3}
CLIP = {"clip_norm": 0.05}
CODED = {"small_size": 0, "rounding": "stochastic"}
MODES = {
    "plain": mode(),
    "non_reentrant": mode(kind="non_reentrant"),
    "reentrant": mode(kind="reentrant"),
    "nested": mode(kind="reentrant_in_non_reentrant"),
    "accumulate": mode(options={"accumulate": 3}),
    "accumulate_reentrant": mode(options={"accumulate": 3}, kind="reentrant"),
    "accumulating": mode(loop=Contexts),
    "clip": mode(options=CLIP),
    "clip_value": mode(options={"clip_value": 0.01}),
    "two_pass": mode(options=CLIP | {"clip": "two_pass"}),
    "two_pass_reentrant": mode(options=CLIP | {"clip": "two_pass"}, kind="reentrant"),
    "delayed": mode(options=CLIP | {"clip": "delayed"}),
    "deferred": mode(options={"timing": "deferred"}),
    "host_tape": mode(options=CLIP | {"tape": "host", "accumulate": 2}),
    "working_set": mode(working_set=BYTES),
    "working_set_by_columns": mode(working_set=BYTES | {"axis": "in"}),
    "working_set_in_host_memory": mode(working_set=BYTES | {"offload": "cpu"}),
    "working_set_on_disk": mode(working_set=BYTES | {"offload": "disk"}),
    "working_set_reset": mode(working_set=BYTES | {"states": "reset"}),
    "working_set_clipped": mode(working_set=BYTES, options=CLIP | {"accumulate": 2}),
    "working_set_checkpointed": mode(working_set=BYTES, kind="non_reentrant"),
    "working_set_reloaded": mode(loop=Reloaded, working_set=BYTES | {"offload": "cpu"}),
    "working_set_coded": mode(
        working_set={"chunks": 3, "offload": "disk"}, dtype=torch.bfloat16, storage=CODED | {"states": "int8"}
    ),
    "paused": mode(loop=Paused),
    "paused_reentrant": mode(loop=Paused, kind="reentrant"),
    "int8": mode(dtype=torch.float32, storage=CODED | {"states": "int8"}),
    "int4": mode(dtype=torch.float32, storage=CODED | {"states": "int4"}),
    "split8": mode(dtype=torch.bfloat16, storage={"master": "split8"}),
    "split16": mode(dtype=torch.bfloat16, storage={"master": "split16", "states": "bf16"}),
    "head": mode(loop=Head),
    "head_accumulated": mode(loop=Head, options={"accumulate": 2}),
    "own_head": mode(loop=OwnHead),
    "failing": mode(loop=Failing),
    "failing_reentrant": mode(loop=Failing, kind="reentrant"),
    "dropped": mode(loop=Dropped),
    "dropped_reentrant": mode(loop=Dropped, kind="reentrant"),
    "scheduled": mode(loop=Scheduled),
    "reloaded": mode(loop=Reloaded),
    "refolded": mode(loop=Refolded),
    "skipping": mode(loop=Skipping, options={"on_nonfinite": "skip"}),
    "frozen": mode(loop=Frozen),
    "hooked_only": mode(loop=Hooked),
}
QUICK = ["accumulate", "working_set_in_host_memory"]


def check(name, folder, steps):
    loop = MODES[name](folder)
    for _ in range(2 * PERIOD):
        loop.run()
    held()  # which itself fills caches of Python's
    before = held()
    for _ in range(steps):
        loop.run()
    after = held()
    assert after[:2] == before[:2], f"tensors, bytes: {before[:2]} became {after[:2]}"
    assert after[2] - before[2] <= OBJECTS, f"{after[2] - before[2]} more objects"


@pytest.mark.parametrize("name", QUICK)
def test_a_few_steps(name, tmp_path):
    check(name, tmp_path / "states", PERIOD)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODES)
def test_500_steps(name, tmp_path):
    check(name, tmp_path / "states", 504)


def test_a_tensor_that_is_kept_in_each_step_is_counted(tmp_path):
    kept = []

    class Keeping(Loop):
        def run(self):
            super().run()
            kept.append(torch.zeros(3))

    MODES["keeping"] = Keeping
    try:
        with pytest.raises(AssertionError, match="tensors, bytes"):
            check("keeping", tmp_path, PERIOD)
    finally:
        del MODES["keeping"]
