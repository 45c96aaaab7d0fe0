"""A LightningModule that a callback folds ends where it ends with torch's optimizer, with any of Trainer's options."""

import copy
import importlib
import logging

import pytest
import torch
from torch import nn

import gradfold
from tests.zoo import distance, same_bits

lightning = pytest.importorskip("lightning", reason="the framework: pip install lightning")
pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
EXACT = 1e-12


def module_of(base, manual=None, kind=torch.optim.AdamW, **hyper):
    """A small network; ``manual``: what its own loop does."""

    class Module(base):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1), nn.Tanh(), nn.Linear(8, 6)).double()
            self.automatic_optimization = manual is None
            self.losses = []

        def loss(self, batch):
            loss = (self.net(batch[0]) - batch[0].flip(1)).square().sum()
            self.losses.append(loss.item())
            return loss

        def training_step(self, batch, index):
            loss = self.loss(batch)
            if manual is None:
                return loss
            optimizer, steps = self.optimizers(), manual.get("accumulate", 1)
            self.manual_backward(loss / steps)
            if (index + 1) % steps == 0:
                if "clip" in manual:
                    self.clip_gradients(optimizer, manual["clip"], manual.get("by", "norm"))
                optimizer.step()
                optimizer.zero_grad()
                self.lr_schedulers().step()

        def configure_optimizers(self):
            optimizer = kind(self.net.parameters(), **{"lr": 0.02, **hyper})
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.7)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return Module()


def fit(module, *callbacks, resume=None, package=lightning, **arguments):
    """Two epochs of five batches: with three a step, the last of each sums two."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=4)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    usual = {"max_epochs": 2, "enable_checkpointing": False, "log_every_n_steps": 1}
    trainer = package.Trainer(callbacks=list(callbacks), **{**quiet, **usual, **arguments})
    torch.manual_seed(0)
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


class Norms(lightning.Callback):
    """Logs the norm of the gradients as users do, and what the folding callback logged."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, *args):
        if "grad_norm" in trainer.callback_metrics:
            self.found.append(float(trainer.callback_metrics["grad_norm"]))


class PlainNorms(Norms):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        grads = [p.grad for p in module.parameters()]
        self.norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in grads]))

    def on_train_batch_end(self, trainer, module, *args):
        if hasattr(self, "norm"):
            self.found.append(float(self.norm))


CLIP = {"gradient_clip_val": 0.5}
VALUE = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}
SUM = {"accumulate_grad_batches": 3}
# of Trainer, of the module's own loop, of the callback
FITS = {
    "plain": ({}, None, {}),
    "clip and accumulate": (CLIP | SUM, None, {}),
    "value and accumulate": (VALUE | SUM, None, {}),
    "two_pass": (CLIP, None, {"clip": "two_pass"}),
    "deferred": (SUM, None, {"timing": "deferred"}),
    "manual": ({}, {}, {}),
    "manual, clip and accumulate": ({}, {"clip": 0.5, "accumulate": 5}, {"clip_norm": 0.5, "accumulate": 5}),
    "manual, value": ({}, {"clip": 0.05, "by": "value"}, {"clip_value": 0.05}),
}


@pytest.mark.parametrize("name, kind", [
    *((name, torch.optim.AdamW) for name in FITS),
    ("clip and accumulate", gradfold.AdamW),
    ("manual, clip and accumulate", gradfold.AdamW),
])  # fmt: skip
def test_fits(name, kind):
    """The losses are the same, and so is the norm that it logs, before clipping."""
    arguments, manual, options = FITS[name]
    plain, folded = (module_of(lightning.LightningModule, manual, k) for k in (torch.optim.AdamW, kind))
    theirs, mine, fold = PlainNorms(), Norms(), gradfold.lightning.Fold(**options)
    start = copy.deepcopy(folded)
    fit(plain, theirs, **arguments)
    trainer = fit(folded, fold, mine, **arguments)
    assert distance(folded, plain) < EXACT and distance(folded, start) > 1e-3
    assert folded.losses == pytest.approx(plain.losses, rel=EXACT)
    assert fold.fold is None and type(folded.net[0]) is nn.Linear and "backward" not in vars(folded)
    assert type(trainer.optimizers[0]) is gradfold.AdamW
    if manual is None:  # else it is read after clipping
        assert mine.found == pytest.approx(theirs.found, rel=1e-6)
    assert mine.found and all(norm > 0 for norm in mine.found)


def test_norms_of_every_step():
    plain, folded = (module_of(lightning.LightningModule) for _ in range(2))
    theirs, mine = PlainNorms(), Norms()
    fit(plain, theirs, **CLIP, **SUM)
    fit(folded, gradfold.lightning.Fold(), mine, **CLIP, **SUM)
    assert len(theirs.found) == 8 and len(mine.found) == len(theirs.found)
    assert mine.found == pytest.approx(theirs.found, rel=1e-6)


RESUMED = [{}, {"clip": "delayed"}, {"working_set": gradfold.WorkingSet(chunks=2, interval=1)}]


@pytest.mark.parametrize("options", RESUMED)
def test_resume(tmp_path, options):
    """From a checkpoint in the middle of an epoch, to the bit."""
    arguments = CLIP | ({} if "clip" in options else SUM)
    whole, again = (module_of(lightning.LightningModule) for _ in range(2))
    saved = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    trainer = fit(whole, gradfold.lightning.Fold(**options), saved, enable_checkpointing=True, **arguments)
    path = sorted(tmp_path.glob("*step=2.ckpt"))[0]
    steps = trainer.global_step
    trainer = fit(again, gradfold.lightning.Fold(**options), resume=path, **arguments)
    assert trainer.global_step == steps
    if options:
        return
    # Lightning does not resume dropout: what it is compared with is torch's own resumed run
    plain = [module_of(lightning.LightningModule) for _ in range(2)]
    saved = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path / "plain", every_n_train_steps=2, save_top_k=-1)
    fit(plain[0], saved, enable_checkpointing=True, **arguments)
    theirs = sorted((tmp_path / "plain").glob("*step=2.ckpt"))[0]
    fit(plain[1], resume=theirs, **arguments)
    crossed, back = (module_of(lightning.LightningModule) for _ in range(2))
    fit(crossed, gradfold.lightning.Fold(), resume=theirs, **arguments)
    fit(back, resume=path, **arguments)
    for one in (again, crossed, back):
        assert distance(one, plain[1]) < EXACT


def test_stored_states_resume(tmp_path):
    def made():
        module = module_of(lightning.LightningModule).float()
        module.net[1].p = 0.0
        return module

    def loaded(module, *callbacks, **others):
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X.float()), batch_size=4)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = lightning.Trainer(callbacks=list(callbacks), max_epochs=2, default_root_dir=tmp_path, **quiet)
        trainer.fit(module, loader, **others)

    options = {"states": "int8", "small_size": 0, "rounding": "stochastic"}
    whole, again = made(), made()
    saved = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1)
    loaded(whole, gradfold.lightning.Fold(**options), saved)
    loaded(again, gradfold.lightning.Fold(**options), ckpt_path=sorted(tmp_path.glob("*step=5.ckpt"))[0])
    assert same_bits(again.net, whole.net)


def test_it_is_fitted_again():
    """Also after a fit that was interrupted between a backward and its step."""

    class Stop(lightning.Callback):
        def on_before_optimizer_step(self, *args):
            raise RuntimeError("stop")

    plain, folded = (module_of(lightning.LightningModule) for _ in range(2))
    fold = gradfold.lightning.Fold()
    for _ in range(2):
        fit(plain)
        fit(folded, fold)
    assert distance(folded, plain) < EXACT
    with pytest.raises(RuntimeError, match="stop"):
        fit(folded, fold, Stop())
    fit(folded, fold)
    assert fold.fold is None


def test_fp16():
    """Weights wait for the scaler, which skips the same steps."""
    scales = []
    modules = [module_of(lightning.LightningModule) for _ in range(2)]
    for module, callbacks in zip(modules, ([], [gradfold.lightning.Fold()]), strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        plugin = lightning.pytorch.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler)
        losses = module.loss
        module.loss = lambda batch, m=module, f=losses: f(batch) * (float("inf") if len(m.losses) == 3 else 1.0)
        fit(module, *callbacks, plugins=[plugin], **CLIP)
        scales.append(scaler.get_scale())
    assert scales[0] == scales[1] != 2.0**10 and distance(*modules) < EXACT


def test_the_older_package():
    older = importlib.import_module("pytorch_lightning")
    module, plain = module_of(older.LightningModule), module_of(lightning.LightningModule)
    fit(plain, **CLIP, **SUM)
    fit(module, gradfold.lightning.Fold(), package=older, **CLIP, **SUM)
    assert distance(module, plain) < EXACT


# refusals -------------------------------------------------------------------------------------------------------------

REFUSED = {
    "clip_norm": (CLIP, None, {"clip_norm": 0.5}, r"clip_norm=0.5 follows from Trainer\(gradient_clip_val=\)"),
    "clip_value": (VALUE, None, {"clip_value": 0.5}, "clip_value=0.5 follows from Trainer"),
    "accumulate": (SUM, None, {"accumulate": 3}, r"accumulate=3 follows from Trainer\(accumulate_grad_batches=\)"),
    "two_pass": (CLIP | SUM, None, {"clip": "two_pass"}, "clip='two_pass' with 3 micro-batches a step"),
    "delayed": ({}, None, {"clip": "delayed"}, "clip='delayed', and gradient_clip_val=None clips nothing"),
    "manual": ({}, {"clip": 0.5}, {"timing": "deferred"}, r"clip_grad_norm_\(max_norm=0.5\).*has no .grad"),
    "manual, sum": ({}, {"accumulate": 2}, {}, "a second backward reached this weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    arguments, manual, options, message = REFUSED[name]
    module = module_of(lightning.LightningModule, manual)
    start = copy.deepcopy(module)
    with pytest.raises(gradfold.FoldError, match=message):
        fit(module, gradfold.lightning.Fold(**options), **arguments)
    if name != "manual, sum":  # the first of two backwards has stepped
        assert same_bits(module.net, start.net)


def test_several_optimizers():
    module = module_of(lightning.LightningModule, {})
    layers = module.net[0], module.net[3]
    module.configure_optimizers = lambda: [torch.optim.SGD(layer.parameters()) for layer in layers]
    with pytest.raises(gradfold.FoldError, match="returns 2 optimizers, and gradfold.lightning.Fold takes one"):
        fit(module, gradfold.lightning.Fold())


def test_options_that_are_none():
    with pytest.raises(gradfold.FoldError, match="gradfold.lightning.Fold: state='int8' is no option; these are: acc"):
        gradfold.lightning.Fold(state="int8")


@pytest.mark.parametrize("name", ["strategy", "world_size"])
def test_several_devices(name, monkeypatch):
    module = module_of(lightning.LightningModule)
    trainer = lightning.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    if name == "strategy":
        strategy = lightning.pytorch.strategies.DDPStrategy
        monkeypatch.setattr(type(trainer), "strategy", strategy(parallel_devices=[torch.device("cpu")]))
    else:
        monkeypatch.setattr(type(trainer), "world_size", 2)
    match = "DDPStrategy: a folded model trains on one device" if name == "strategy" else "Lightning's Trainer has 2"
    with pytest.raises(gradfold.FoldError, match=match):
        gradfold.lightning.Fold().setup(trainer, module, "fit")
