"""Lightning's Trainer, folded by a callback."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import gradfold
from gradfold.engine import unwrapped
from gradfold.errors import FoldError
from gradfold.optim import from_torch

from .frameworks import (
    finish_open_step,
    keep_with_optimizer,
    refuse_clip,
    refuse_several,
    refuse_spread,
    require,
    split_options,
)

OWNED = {
    "clip_norm": "Trainer(gradient_clip_val=)",
    "clip_value": "Trainer(gradient_clip_val=, gradient_clip_algorithm='value')",
    "accumulate": "Trainer(accumulate_grad_batches=)",
}
"""With automatic optimization. With manual optimization a module clips and accumulates by itself, and says so here."""


class FoldCallback:
    """Folds a LightningModule into its optimizer while it is fitted: one of the callbacks of Lightning's Trainer.

    ``configure_optimizers`` returns one optimizer, of gradfold's or of torch's, which is turned into gradfold's in
    place: schedulers go on with it. What Trainer has an argument for follows from that: ``gradient_clip_val`` and
    ``gradient_clip_algorithm`` clip exactly, ``accumulate_grad_batches`` sums exactly, "16-mixed" lets weights wait
    for the scaler. Checkpoints are torch's, and resume to the bit. When the fit is over, the module is a plain one.

    With manual optimization the loop is the module's: give ``clip_norm=`` what it gives to ``self.clip_gradients``, and
    ``accumulate=`` the backwards that it sums in a step.

    Args:
        log_grad_norm: logs the norm of the gradient before clipping under this name, as often as Trainer logs; None:
            does not.
        **options: of gradfold's optimizers (``states``, ``rounding``, ``master``, ...) and of ``gradfold.fold``
            (``clip``, ``working_set``, ``on_nonfinite``, ``head``, ...).

    Attributes:
        fold: the ``gradfold.Fold``, while the module is fitted.

    Raises:
        FoldError: an option is none; as the fit begins: several devices, several optimizers, or something that cannot
            be folded. No weight has moved then.

    Example:
        >>> fold = gradfold.lightning.Fold(states="int8")
        >>> import lightning  # doctest: +SKIP
        >>> trainer = lightning.Trainer(callbacks=[fold], gradient_clip_val=1.0, accumulate_grad_batches=4)
        >>> trainer.fit(module, loader)
    """

    fold: gradfold.Fold | None = None

    def __init__(self, *, log_grad_norm: str | None = "grad_norm", **options: Any):
        split_options(options, who="gradfold.lightning.Fold", owned={})
        self.options: Mapping[str, Any] = options
        self.log_grad_norm = log_grad_norm
        self._undo: list[Callable[[], Any]] = []
        self._optimizer: Any = None

    # Lightning's hooks ------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what could not be fitted, before anything is set up."""
        if stage != "fit":
            return
        strategy = type(trainer.strategy)
        parallel = any(kind.__name__ == "ParallelStrategy" for kind in strategy.__mro__)
        refuse_several(2 if parallel else 1, f"Lightning's {strategy.__name__}")
        refuse_several(max(trainer.world_size, trainer.num_devices), f"Lightning's Trainer has {trainer.world_size}")
        self._fold_options(trainer, pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Fold the module, which is where it will train; its optimizer has not loaded a checkpoint's states yet."""
        refuse_spread(pl_module)
        storage, of_fold = self._fold_options(trainer, pl_module)
        if len(trainer.optimizers) != 1:
            raise FoldError(
                f"configure_optimizers returns {len(trainer.optimizers)} optimizers, and gradfold.lightning.Fold takes "
                "one. Fold submodules apart in configure_optimizers, each with its own, and leave the callback out: "
                "docs/loops.md"
            )
        self._release()
        self._optimizer = from_torch(unwrapped(trainer.optimizers[0]), **storage)
        trainer.optimizers = [self._optimizer]  # Lightning's wrapper has taken over the class it had
        self.fold = made = gradfold.fold(pl_module, self._optimizer, **of_fold)
        self._undo.append(keep_with_optimizer(made, self._optimizer))
        if pl_module.automatic_optimization:
            made.accumulate_while(lambda: _adds(trainer))
        if made.options.clip == "two_pass" or made.working_set is not None:
            self._take_backward(pl_module, made)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Log the norm of a step."""
        made = self.fold
        if made is None or self.log_grad_norm is None or trainer.global_step % trainer.log_every_n_steps:
            return
        stepped = not (pl_module.automatic_optimization and _adds(trainer))
        if stepped and (norm := made.grad_norm) is not None:
            pl_module.log(self.log_grad_norm, norm)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Make the module a plain one again."""
        self._release()

    # ------------------------------------------------------------------------------------------------------------------

    def _fold_options(self, trainer: Any, pl_module: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the options of the optimizer, and all of ``gradfold.fold``.

        Raises:
            FoldError: they do not go together with Trainer's.
        """
        automatic = pl_module.automatic_optimization
        storage, found = split_options(self.options, who="gradfold.lightning.Fold", owned=OWNED if automatic else {})
        steps, clip_argument = 1, "clip_norm=None"
        if automatic:
            steps, clip_argument = trainer.accumulate_grad_batches, f"gradient_clip_val={trainer.gradient_clip_val}"
            limit = float(trainer.gradient_clip_val or 0)
            by = getattr(trainer.gradient_clip_algorithm, "value", trainer.gradient_clip_algorithm) or "norm"
            if 0 < limit < float("inf"):
                found["clip_value" if str(by) == "value" else "clip_norm"] = limit
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if scaled and found.get("clip", "exact") != "exact":
            raise FoldError(f"clip={found['clip']!r} with fp16, where weights wait for step(): use clip='exact'")
        refuse_clip(found, steps, found.get("clip_norm"), clip_argument)
        return storage, {**found, "timing": "deferred" if scaled else found.get("timing", "auto")}

    def _take_backward(self, pl_module: Any, made: gradfold.Fold) -> None:
        """Let the module's ``backward`` be the fold's: a working set's loss may have no gradient."""
        plain = vars(pl_module).get("backward")

        def backward(loss: Any, *args: Any, **kwargs: Any) -> None:
            if args or kwargs:
                raise FoldError("backward with arguments: clip='two_pass' and a working set take none")
            made.backward(loss)

        def give_back() -> None:
            del pl_module.backward
            if plain is not None:
                pl_module.backward = plain

        pl_module.backward = backward
        self._undo.append(give_back)

    def _release(self) -> None:
        """Take back a fold, also one whose fit was interrupted."""
        for undo in self._undo:
            undo()
        self._undo = []
        if self.fold is not None:
            finish_open_step(self._optimizer)
            self.fold.remove()
        self.fold = None


def _adds(trainer: Any) -> bool:
    """Return whether the batch that runs is not the last of its step."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    last = progress.is_last_batch or progress.current.ready == trainer.num_training_batches
    return not last and progress.current.ready % trainer.accumulate_grad_batches != 0


def make_fold() -> type:
    """Return the callback, as a class of the Lightning that is in use: ``lightning``, else ``pytorch_lightning``.

    Raises:
        ImportError: neither is installed.
    """
    package = "lightning.pytorch"
    if "pytorch_lightning" in sys.modules and package not in sys.modules:
        package = "pytorch_lightning"
    else:
        require("lightning", "lightning", "gradfold.lightning")
    base = importlib.import_module(package).Callback
    kept = {"__doc__": FoldCallback.__doc__, "__module__": "gradfold.lightning"}
    return type("Fold", (FoldCallback, base), kept)
