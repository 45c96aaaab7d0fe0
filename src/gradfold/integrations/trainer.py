"""transformers' Trainer and the trainers made of it (TRL's, sentence-transformers'), folded.

A Trainer makes its optimizer when the model is where it will train and adapters are in place, and before Accelerate
wraps anything: ``create_optimizer`` is where it is folded. All else follows from its own arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

import gradfold
from gradfold._options import INTERVAL, REST_SCALE
from gradfold.engine import unwrapped
from gradfold.errors import FoldError
from gradfold.optim import RuleOptimizer, from_torch

from .accelerator import follow
from .frameworks import (
    FOLD,
    STORAGE,
    finish_open_step,
    keep_with_optimizer,
    refuse_accelerator,
    refuse_clip,
    refuse_several,
    refuse_spread,
    require,
    split_options,
)
from .gradcache import has_inner_backwards
from .optim_names import hyper_parameters, named, read_arguments

OWNED = {
    "clip_norm": "TrainingArguments.max_grad_norm",
    "accumulate": "TrainingArguments.gradient_accumulation_steps",
    "norm_type": "Trainer, which clips by the norm of order 2",
    "error_if_nonfinite": "on_nonfinite=, which says what happens",
}


class FoldMixin:
    """Folds a class of Trainer: ``class Mine(gradfold.hf.FoldMixin, SFTTrainer)``.

    Attributes:
        fold_options: options of gradfold's optimizers (``states``, ``rounding``, ``master``, ...) and of
            ``gradfold.fold`` (``clip``, ``working_set``, ``on_nonfinite``, ``head``, ...). What Trainer has an argument
            for follows from that, and may not be given here.
        fold: the ``gradfold.Fold``, from when the training begins.

    Example:
        >>> import transformers  # doctest: +SKIP
        >>> class Mine(gradfold.hf.FoldMixin, transformers.Trainer):
        ...     fold_options = {"states": "int8"}
        >>> trainer = Mine(model, args, train_dataset=dataset)
        >>> trainer.train()
        >>> print(trainer.fold.report())
    """

    # those of a Trainer, which stands behind this class
    args: Any
    model: Any
    optimizer: Any
    accelerator: Any

    fold_options: Mapping[str, Any] = {}
    fold: gradfold.Fold | None = None
    _forget_hooks: Callable[[], None] | None = None

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        for kind in cls.__mro__:
            if kind is FoldMixin:
                return
            if "create_optimizer" in vars(kind) and not issubclass(kind, FoldMixin):
                raise FoldError(
                    f"class {cls.__name__}: {kind.__name__} comes before FoldMixin, and would make its optimizer "
                    f"unfolded; write class {cls.__name__}(gradfold.hf.FoldMixin, {kind.__name__})"
                )

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """Return the optimizer of gradfold's that ``args.optim`` names, and its arguments as Trainer reads them.

        Args:
            args: The Trainer's ``TrainingArguments``.
            model: The model, if Trainer gives it.

        Raises:
            FoldError: it cannot be folded, or ``optim_args`` has something that it does not take.
        """
        meant = named(str(getattr(args.optim, "value", args.optim)))
        kind = getattr(gradfold, meant.kind)
        kept = args.optim, args.optim_args
        theirs, storage = self._arguments(kind, meant.storage)
        try:
            args.optim = type(args.optim)(meant.asked)
            args.optim_args = ",".join(f"{key}={value}" for key, value in theirs.items()) or None
            _, kwargs = super().get_optimizer_cls_and_kwargs(args, model)  # type: ignore[misc]
        finally:
            args.optim, args.optim_args = kept
        known = hyper_parameters(kind)
        kwargs = {key: value for key, value in kwargs.items() if key in known or key == "params"}
        return kind, kwargs | theirs | storage

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer as the class behind this one does, and fold it into the model.

        Args:
            args: What Trainer gives.
            kwargs: What Trainer gives.

        Returns:
            The optimizer, as Accelerate has wrapped it.

        Raises:
            FoldError: something of the Trainer cannot be folded. Nothing has changed then.
        """
        if self._is_current():
            finish_open_step(unwrapped(self.optimizer))  # a second train(), or the next try with a smaller batch
            return self.optimizer
        self.check_folding()
        self._unfold()
        super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        optimizer = self._converted(unwrapped(self.optimizer))
        made = gradfold.fold(self._to_fold(), optimizer, **self._options())
        self.fold, self._forget_hooks = made, keep_with_optimizer(made, optimizer)
        follow(self.accelerator, made, always=has_inner_backwards(self))
        # wrapped here, so that Accelerate does not load the states that were just allocated into themselves
        self.optimizer = self.accelerator.prepare(optimizer, device_placement=[False])
        return self.optimizer

    # what follows from what -------------------------------------------------------------------------------------------

    def _told(self) -> dict[str, Any]:
        """Return what ``optim_args`` and ``fold_options`` say, of which the latter count."""
        return {**read_arguments(self.args.optim_args), **self.fold_options}

    def _arguments(
        self, kind: type[RuleOptimizer], storage: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the optimizer's hyper-parameters, and how it stores weights and states.

        Raises:
            FoldError: there are other arguments.
        """
        told, known = read_arguments(self.args.optim_args), hyper_parameters(kind) - {"lr", "betas", "weight_decay"}
        for key, argument in (("lr", "learning_rate"), ("weight_decay", "weight_decay")):
            if key in told:
                raise FoldError(
                    f"optim_args: {key}={told[key]!r} has no effect in Trainer, which sets it for each group; use "
                    f"TrainingArguments({argument}=)"
                )
        for key in told:
            if key not in known | STORAGE | FOLD:
                raise FoldError(
                    f"optim_args: {key}={told[key]!r} is no option of gradfold.{kind.__name__}; these are: "
                    f"{', '.join(sorted(known | STORAGE))}"
                )
        found = {**storage, **{key: value for key, value in self._told().items() if key in STORAGE}}
        if found and "seed" not in found:
            found["seed"] = self.args.seed
        return {key: value for key, value in told.items() if key in known}, found

    def _options(self) -> dict[str, Any]:
        """Return the arguments of ``gradfold.fold``.

        Raises:
            FoldError: they do not go together with the Trainer's.
        """
        split_options(self.fold_options, who=f"fold_options of {type(self).__name__}", owned=OWNED)
        told = {key: value for key, value in self._told().items() if key in STORAGE | FOLD}
        _, options = split_options(told, who="optim_args", owned=OWNED)
        limit = float(self.args.max_grad_norm or 0)
        clip_norm = limit if 0 < limit < float("inf") else None
        refuse_clip(options, self.args.gradient_accumulation_steps, clip_norm, f"max_grad_norm={limit:g}")
        # a batch that runs out of memory must not have moved anything, nor one that a scaler skips
        waits = self.accelerator.scaler is not None or self.args.auto_find_batch_size or has_inner_backwards(self)
        if waits and options.get("clip", "exact") != "exact":
            why = (
                "fp16"
                if self.accelerator.scaler is not None
                else "auto_find_batch_size, or a loss that caches gradients"
            )
            raise FoldError(f"clip={options['clip']!r} with {why}, where weights wait for step(): use clip='exact'")
        timing = "deferred" if waits else options.get("timing", "auto")
        return {**options, "timing": timing, "clip_norm": clip_norm}

    def _to_fold(self) -> nn.Module:
        """Return the module whose parameters are trained: a loss of sentence-transformers has weights of its own."""
        loss = getattr(self, "loss", None)
        trained = {id(param) for group in self.optimizer.param_groups for param in group["params"]}
        if isinstance(loss, nn.Module) and trained - {id(param) for param in self.model.parameters()}:
            return loss
        return self.model

    def _converted(self, optimizer: Any) -> RuleOptimizer:
        storage = {key: value for key, value in self._told().items() if key in STORAGE}
        return from_torch(optimizer, **storage)

    # when -------------------------------------------------------------------------------------------------------------

    def check_folding(self) -> None:
        """Raise for what could not be trained, before anything is made.

        Raises:
            FoldError: several devices; an option that is none, or follows from Trainer's.
        """
        refuse_trainer(self)
        self._options()
        if self.optimizer is None and getattr(self, "optimizer_cls_and_kwargs", None) is None:
            meant = named(str(getattr(self.args.optim, "value", self.args.optim)))
            self._arguments(getattr(gradfold, meant.kind), meant.storage)

    def _is_current(self) -> bool:
        """Return whether the fold is that of the model, with the options that the arguments ask for now."""
        made = self.fold
        if made is None or not made.active or self.optimizer is None or made.model is not self._to_fold():
            return False
        return all(getattr(made.options, key, value) == value for key, value in self._options().items())

    def _unfold(self) -> None:
        """Take back a fold whose model, optimizer or options were replaced."""
        if self.fold is None:
            return
        if self._forget_hooks is not None:
            self._forget_hooks()
        if self.fold.active and self.fold.model in (self.model, getattr(self, "loss", None)):
            if self.optimizer is not None:
                finish_open_step(unwrapped(self.optimizer))
            self.fold.remove()
        self.fold = None


def refuse_trainer(trainer: Any) -> None:
    """Raise if a Trainer is set up for several devices.

    Raises:
        FoldError: names what it is set up for. Nothing has changed then.
    """
    args = trainer.args
    if getattr(trainer, "is_deepspeed_enabled", False) or getattr(args, "deepspeed", None):
        refuse_several(2, "DeepSpeed")
    if getattr(trainer, "is_fsdp_enabled", False) or getattr(args, "fsdp", None):
        raise FoldError(
            "FSDP: fold_trainer trains on one device, since a Trainer shards its model after the optimizer is made; "
            "write the loop with Accelerate and gradfold.hf.prepare(accelerator, model, optimizer, ...), which takes "
            "FSDP2 over, or train without folding"
        )
    refuse_accelerator(trainer.accelerator)
    refuse_several(args.world_size, f"Trainer has {args.world_size} processes")
    refuse_several(args.n_gpu, f"{args.n_gpu} GPUs are visible, over which Trainer puts DataParallel")
    if trainer.model is not None:
        refuse_spread(trainer.model)


def fold_trainer(trainer: Any, **options: Any) -> Any:
    """Fold a Trainer that exists: transformers', TRL's, or one made of them.

    Its class, its arguments and its loop stay as they are. When the training begins its optimizer is folded into its
    model: ``trainer.fold``.

    - ``optim`` names gradfold's optimizer: ``adamw_torch``, ``adamw_bnb_8bit`` and other 8-bit ones
      (``states="int8"``), ``lion_32bit``, ``sgd`` and others. Learning rate, betas, decay, groups and scheduler are the
      Trainer's. An optimizer of torch that was handed in is turned into gradfold's, with its states.
    - ``max_grad_norm`` clips exactly; ``gradient_accumulation_steps`` sums exactly; ``fp16`` lets weights wait for the
      scaler; logs have the true ``grad_norm``.
    - ``optimizer.pt`` of a checkpoint is torch's: either one resumes from the other's.

    Args:
        trainer: a ``transformers.Trainer``, or an object of a class made of it, before ``train()`` or after.
        **options: of gradfold's optimizers: ``states``, ``rounding``, ``master``, ``small_size``, ``seed``; and of
            ``gradfold.fold``: ``clip`` ("exact", "two_pass", "delayed"), ``clip_value``, ``on_nonfinite``, ``timing``,
            ``tape``, ``working_set``, ``head``, ``head_keep_bytes``, ``backend``, ``scratch_bytes``, ``joint``.
            ``optim_args="states=int8,..."`` may say the same.

    Returns:
        The same trainer.

    Raises:
        FoldError: several devices, DeepSpeed, FSDP; an optimizer or an option that cannot be folded. Nothing has
            changed then.

    Example:
        >>> trainer = SFTTrainer(model, args=SFTConfig(...), train_dataset=dataset)  # doctest: +SKIP
        >>> trainer = gradfold.hf.fold_trainer(trainer, states="int8")
        >>> trainer.train()
    """
    require("transformers", "transformers accelerate", "gradfold.hf.fold_trainer")
    import transformers

    base: Any = transformers.Trainer
    if not isinstance(trainer, base):
        raise FoldError(f"fold_trainer({type(trainer).__name__}): give a transformers.Trainer, or one made of it")
    split_options(options, who="fold_trainer", owned=OWNED)
    refuse_trainer(trainer)
    kind = type(trainer)
    if isinstance(trainer, FoldMixin):
        if options:
            trainer.fold_options = {**trainer.fold_options, **options}
            trainer.check_folding()
        return trainer
    made = type(kind.__name__, (FoldMixin, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})
    trainer.__class__ = made
    trainer.fold_options = options
    try:
        trainer.check_folding()
    except BaseException:
        trainer.__class__ = kind
        del trainer.fold_options
        raise
    return trainer


def working_set(
    trainer: Any = None,
    chunks: int | None = None,
    interval: int = INTERVAL,
    *,
    waking_states: str = "keep",
    by: Any = "bytes",
    axis: Any = "out",
    order: Any = "forward",
    always: Any = (),
    offload: Any = None,
    folder: Any = None,
    prefetch: int = 1,
    schedule: Any = "round",
    rest: Any = None,
    rest_scale: float = REST_SCALE,
    **options: Any,
) -> Any:
    """Fold a Trainer with a working set: one chunk of the model trains at a time, then the next.

    ``max_grad_norm`` clips, and ``grad_norm`` logs, the norm over the chunk that trains. A chunk changes after
    ``interval`` optimizer steps, however many micro-batches these have. Checkpoints hold all states and the place in
    the rotation.

    Args:
        trainer: as for ``fold_trainer``. None: nothing is folded, and the settings are returned.
        chunks: number of chunks.
        interval: optimizer steps before the next chunk trains.
        waking_states: "keep" or "reset": ``states`` of ``WorkingSet``, which is a name of ``options`` here.
        by: see ``gradfold.WorkingSet``, as for ``axis``, ``order``, ``always``, ``offload``, ``folder``, ``prefetch``.
        axis: see there.
        order: see there.
        always: see there.
        offload: see there; "disk" keeps states in ``output_dir/working_set`` unless ``folder`` is given.
        folder: see there.
        prefetch: see there.
        schedule: see there; with "round" the scheduler's rate is taken once per round.
        rest: see there.
        rest_scale: see there.
        **options: as for ``fold_trainer``, ``states="int8"`` for instance.

    Returns:
        The same trainer; without one, a ``gradfold.WorkingSet`` for ``fold_trainer(trainer, working_set=...)``.

    Raises:
        FoldError: as ``fold_trainer`` and ``WorkingSet`` do.

    Example:
        >>> trainer = SFTTrainer(model, args=SFTConfig(...), train_dataset=dataset)  # doctest: +SKIP
        >>> trainer = gradfold.hf.working_set(trainer, chunks=16, interval=50, offload="cpu", states="int8")
    """
    if offload == "disk" and folder is None and trainer is not None:
        folder = f"{trainer.args.output_dir}/working_set"
    seed = options.get("seed", 0 if trainer is None else trainer.args.seed)
    made = gradfold.WorkingSet(
        chunks=chunks,
        interval=interval,
        by=by,
        axis=axis,
        order=order,
        always=always,
        states=waking_states,  # type: ignore[arg-type]
        offload=offload,
        folder=folder,
        prefetch=prefetch,
        seed=seed,
        schedule=schedule,
        rest=rest,
        rest_scale=rest_scale,
    )
    if trainer is not None:
        return fold_trainer(trainer, working_set=made, **options)
    if options.keys() - {"seed"}:
        raise FoldError(f"working_set: {sorted(options)[0]}= is an option of the fold; give it to fold_trainer")
    return made
