"""A loop with Accelerate, prepared by ``gradfold.hf.prepare``, ends where it ends with torch's optimizer."""

import copy

import pytest
import torch

import gradfold
from tests.integrations.runs import ROWS, causal
from tests.zoo import distance, same_bits

accelerate = pytest.importorskip("accelerate", reason="the framework: pip install accelerate")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.usefixtures("precise"), pytest.mark.filterwarnings("ignore")]
EXACT = 1e-12


@pytest.fixture(autouse=True)
def accelerators():
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Loop:
    """The loop of Accelerate's documentation."""

    def __init__(self, accelerator, fold=None, kind=torch.optim.AdamW, model=None, clip=0.5):
        self.accelerator, self.clip, self.norms, self.losses = accelerator, clip, [], []
        self.model = model = causal() if model is None else model
        optimizer = kind(model.parameters(), lr=1e-2, weight_decay=0.1)
        loader = torch.utils.data.DataLoader(ROWS, batch_size=2)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
        if fold is None:
            prepared = accelerator.prepare(model, optimizer, loader, scheduler)
        else:
            prepared = gradfold.hf.prepare(accelerator, model, optimizer, loader, scheduler, **fold)
        self.prepared, self.optimizer, self.loader, self.scheduler = prepared

    def run(self, epochs=2, skip=0):
        accelerator = self.accelerator
        for epoch in range(epochs):
            loader = accelerate.skip_first_batches(self.loader, skip) if skip and epoch == 0 else self.loader
            for batch in loader:
                with accelerator.accumulate(self.prepared):
                    loss = self.prepared(**batch).loss
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and self.clip is not None:
                        self.norms.append(float(accelerator.clip_grad_norm_(self.prepared.parameters(), self.clip)))
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                self.losses.append(loss.item())
        return self


def accelerator_of(steps=4):
    return accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps)


PLAIN = {"head": "plain"}
# steps that are summed, the loop's clipping, of the fold
LOOPS = {
    "clip and accumulate": (4, 0.5, {"clip_norm": 0.5}),
    "clip": (1, 0.5, {"clip_norm": 0.5}),
    "accumulate": (4, None, {}),
    "two_pass": (1, 0.5, {"clip_norm": 0.5, "clip": "two_pass"}),
    "clipped as asked": (4, 0.5, {"timing": "deferred"}),
    "only measured": (2, float("inf"), {}),
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops(name):
    """With a short step at the end of each epoch, a schedule, and the true norms."""
    steps, clip, fold = LOOPS[name]
    plain = Loop(accelerator_of(steps), clip=clip).run()
    folded = Loop(accelerator_of(steps), {**PLAIN, **fold}, clip=clip).run()
    assert distance(folded.model, plain.model) < EXACT
    assert folded.norms == pytest.approx(plain.norms, rel=1e-9)
    assert folded.losses == pytest.approx(plain.losses, rel=1e-9)
    assert type(folded.optimizer.optimizer) is gradfold.AdamW and folded.accelerator.fold.model is folded.model
    assert distance(folded.model, causal()) > 1e-3


def test_the_folded_head_and_gradfolds_optimizer():
    plain = Loop(accelerator_of()).run()
    folded = Loop(accelerator_of(), {"clip_norm": 0.5}, kind=gradfold.AdamW).run()
    assert distance(folded.model, plain.model) < EXACT
    assert folded.accelerator.fold.report().heads[0].how == "folded"


def test_a_loop_that_counts_by_itself():
    """It calls neither ``accumulate`` nor ``sync_gradients``."""
    models = causal(), causal()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
    for model, optimizer, folds in zip(models, optimizers, (False, True), strict=True):
        accelerator = accelerator_of(1)
        if folds:
            options = {"clip_norm": 0.5, "accumulate": 3, "head": "plain"}
            model, optimizer = gradfold.hf.prepare(accelerator, model, optimizer, **options)
        else:
            model, optimizer = accelerator.prepare(model, optimizer)
        for index, row in enumerate(ROWS, 1):
            accelerator.backward(model(**{key: value[None] for key, value in row.items()}).loss / 3)
            if index % 3 == 0:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
    assert distance(*models) < EXACT


@pytest.mark.parametrize("fold", [{}, {"clip": "delayed"}, {"working_set": gradfold.WorkingSet(chunks=2, interval=1)}])
def test_states_are_saved_and_loaded(tmp_path, fold):
    """After one epoch, in a process of another optimizer: the run goes on to the bit."""
    steps = 1 if "clip" in fold else 4
    options = {**PLAIN, **fold, "clip_norm": 0.5}
    whole = Loop(accelerator_of(steps), options).run(1)
    whole.accelerator.save_state(str(tmp_path))
    whole.run(1)
    again = Loop(accelerator_of(steps), options)
    again.accelerator.load_state(str(tmp_path))
    again.run(1)
    assert same_bits(again.model, whole.model) and again.norms == whole.norms[len(whole.norms) // 2 :]
    if fold:
        return
    plain = Loop(accelerator_of(steps))
    plain.accelerator.load_state(str(tmp_path))
    plain.run(1)
    assert distance(plain.model, whole.model) < EXACT
    plain.accelerator.save_state(str(tmp_path / "plain"))
    crossed = Loop(accelerator_of(steps), options)
    crossed.accelerator.load_state(str(tmp_path / "plain"))
    crossed.run(1)
    assert distance(crossed.model, plain.run(1).model) < EXACT


@pytest.mark.parametrize("clip", [0.5, None])
def test_a_scaler(clip, monkeypatch):
    """Weights wait for it; a step that overflows is skipped by both."""
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t.to(torch.float32))  # as the scaler needs it
    loops = []
    for fold in (None, {**PLAIN, "clip_norm": clip}):
        accelerator = accelerator_of(2)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        loop = Loop(accelerator, fold, clip=clip)
        plain, calls = accelerator.backward, []

        def backward(loss, plain=plain, calls=calls, **kwargs):
            calls.append(1)
            plain(loss * (float("inf") if len(calls) == 4 else 1.0), **kwargs)

        accelerator.backward = backward
        loops.append(loop.run())
        accelerator.state._mixed_precision = "no"
    assert loops[1].accelerator.fold.options.timing == "deferred"
    scales = [loop.accelerator.scaler.get_scale() for loop in loops]
    assert scales[0] == scales[1] != 2.0**10
    assert distance(loops[1].model, loops[0].model) < 1e-7


# refusals -------------------------------------------------------------------------------------------------------------


def test_clipping_that_was_not_said():
    """With ``timing="deferred"`` nothing has moved yet; otherwise the first step has."""
    with pytest.raises(gradfold.FoldError, match=r"clip_grad_norm_\(max_norm=0.5\).*this would clip noth"):
        Loop(accelerator_of(), PLAIN).run()
    with pytest.raises(gradfold.FoldError, match=r"clip_norm=0.25|it has clip_norm=0.25"):
        Loop(accelerator_of(), {**PLAIN, "clip_norm": 0.25}).run()


# of the Accelerator's steps, of the fold
REFUSED = {
    "option": (1, {"state": "int8"}, "gradfold.hf.prepare: state='int8' is no option; these are: accumulate"),
    "two_pass": (4, {"clip": "two_pass", "clip_norm": 1.0}, "clip='two_pass' with 4 micro-batches a step"),
    "delayed": (1, {"clip": "delayed"}, "clip='delayed', and clip_norm=None clips nothing"),
    "accumulate": (4, {"accumulate": 2}, "Accelerate has gradient_accumulation_steps=4, and the fold accumulate=2"),
    "scaler": (
        "fp16",
        {"clip": "delayed", "clip_norm": 1.0},
        "clip='delayed' with mixed_precision='fp16'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    steps, fold, message = REFUSED[name]
    accelerator = accelerator_of(1 if steps == "fp16" else steps)
    if steps == "fp16":
        accelerator.scaler = torch.amp.GradScaler("cpu")
    model = causal()
    start = copy.deepcopy(model)
    with pytest.raises(gradfold.FoldError, match=message):
        Loop(accelerator, fold, model=model).run()
    assert same_bits(model, start)


def test_optimizers_that_cannot_be_folded():
    with pytest.raises(gradfold.FoldError, match="SparseAdam cannot be folded"):
        Loop(accelerator_of(), {}, kind=lambda p, **_: torch.optim.SparseAdam(p))


def test_several_devices():
    accelerator, model = accelerator_of(), causal()
    accelerator.state._shared_state["num_processes"] = 2
    accelerator.state._shared_state["distributed_type"] = accelerate.DistributedType.MULTI_CPU
    with pytest.raises(gradfold.FoldError, match="set up for MULTI_CPU with 2 processes: a folded model trains on one"):
        gradfold.hf.prepare(accelerator, model, torch.optim.AdamW(model.parameters()))
    assert not hasattr(accelerator, "fold") and type(model.lm_head) is torch.nn.Linear
