"""Recipes of axolotl and LLaMA-Factory as fields of ours: what is known is translated, what is not is said by name.

A key that is left out there has that program's default, not ours. What would train something else (adapters, quantized
weights) is refused; what only says how to run (devices, workers, logging) is left out, and listed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import RecipeError
from .foreign_data import Translation, axolotl_data, factory_data
from .recipe_file import load_tree, typed_field
from .validate import shown

NOTHING = (None, False, "", [], {}, 0)


def load_foreign(path: str | Path) -> Translation:
    """Translate a recipe file. Raises RecipeError naming every key that cannot be taken over."""
    tree = load_tree(path)
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe {path}: holds no `key: value` lines")
    if "base_model" in tree:
        made, known = Translation("axolotl", dict(AXOLOTL_DEFAULTS)), AXOLOTL
        data = axolotl_data
    elif "model_name_or_path" in tree:
        made, known = Translation("LLaMA-Factory", dict(FACTORY_DEFAULTS)), FACTORY
        data = factory_data
    else:
        raise RecipeError(
            f"recipe {path}: is neither axolotl's (base_model) nor LLaMA-Factory's (model_name_or_path); a recipe of "
            "gradfold's own goes after --config"
        )
    try:
        taken = data(tree, made, Path(path).parent)
        _translate(tree, known, made, taken)
    except RecipeError as error:
        raise RecipeError(f"recipe {path}: {error}") from None
    if not made.refused:
        try:
            made.fields = {name: typed_field(name, value) for name, value in made.fields.items()}
        except RecipeError as error:
            raise RecipeError(f"recipe {path} ({made.program}): {error}") from None
    if made.refused:
        raise RecipeError(f"recipe {path} ({made.program}): cannot be taken over: {'; '.join(made.refused)}")
    return made


def _translate(tree: dict[str, Any], known: dict[str, Any], made: Translation, taken: set[str]) -> None:
    for key, value in tree.items():
        if key in taken or not isinstance(key, str):
            continue
        rule = known.get(key)
        if rule is None:
            if key.startswith(IDLE_PREFIXES) or key in IDLE:
                made.left_out += [key] if value not in NOTHING else []
            elif value not in NOTHING:
                made.refused.append(
                    f"{key} = {shown(value)} is not known here; take it out, or set what it does by flags"
                )
            continue
        if isinstance(rule, str):
            made.put(rule, value)
        else:
            rule(value, made, tree)


IDLE_PREFIXES = ("lora_", "wandb_", "mlflow_", "comet_", "dataloader_", "ddp_", "liger_", "xformers_", "trackio_")
IDLE = frozenset(
    "adapter_name auto_resume_from_checkpoints dataset_prepared_path dataset_processes debug deepspeed device_map "
    "disable_tqdm do_train do_eval do_predict enable_liger_kernel eval_batch_size eval_on_start eval_sample_packing "
    "flash_attention flash_attn flash_optimum fsdp fsdp_config fsdp_version gradient_checkpointing_kwargs "
    "group_by_length include_num_input_tokens_seen include_tokens_per_second is_llama_derived_model "
    "is_mistral_derived_model is_qwen_derived_model local_rank logging_dir logging_first_step logging_steps "
    "low_cpu_mem_usage max_memory model_type output_router_logits overwrite_cache overwrite_output_dir "
    "pad_to_sequence_len per_device_eval_batch_size plot_loss plugins predict_with_generate "
    "preprocessing_batch_size preprocessing_num_workers profiler_steps remove_unused_columns run_name "
    "s2_attention save_only_model save_safetensors sdp_attention shuffle_merged_datasets skip_memory_metrics strict "
    "tf32 tokenizer_type tokenizer_use_fast torch_compile upcast_layernorm use_fast_tokenizer use_unsloth use_wandb "
    "eager_attention save_strategy evaluation_strategy eval_strategy logging_strategy eval_max_new_tokens "
    "pad_to_multiple_of streaming_workers cache_dir hub_strategy template default_system rope_scaling_debug "
    "sample_packing_eff_est sample_packing_group_size total_num_tokens".split()
)
"""Keys of either program that change no weight here: how to run, what to print; `template`: the model's own is used."""

Rule = Callable[[Any, Translation, dict[str, Any]], None]


def _refused(key: str, instead: str, *allowed: Any) -> Rule:
    def rule(value: Any, made: Translation, tree: dict[str, Any]) -> None:
        if value not in (*allowed, *NOTHING):
            made.refused.append(f"{key} = {shown(value)}: {instead}")

    return rule


def _dtype(value: Any, made: Translation, tree: dict[str, Any]) -> None:
    if value in (True, "auto", "full"):
        made.fields["dtype"] = "bfloat16"
        made.notes.append(
            "bf16: the weights themselves are bfloat16 here; --optimizer.rounding stochastic or --optimizer.master "
            "split8 keep small updates"
        )


SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
}


def _schedule(value: Any, made: Translation, tree: dict[str, Any]) -> None:
    if value not in SCHEDULES:
        made.refused.append(f"lr_scheduler = {shown(value)}: there is {', '.join(SCHEDULES)}")
        return
    made.fields["schedule.name"] = SCHEDULES[value]
    more = tree.get("lr_scheduler_kwargs")
    if isinstance(more, dict) and "min_lr_rate" in more:
        made.fields["schedule.final"] = float(more["min_lr_rate"])
    if value == "constant":  # without a warm-up there
        made.fields["schedule.warmup"] = 0.0


OPTIMIZERS = {
    "adamw_torch": {"optimizer.name": "AdamW"},
    "adamw_torch_fused": {"optimizer.name": "AdamW"},
    "adamw_hf": {"optimizer.name": "AdamW"},
    "adamw_bnb_8bit": {"optimizer.name": "AdamW", "optimizer.states": "int8"},
    "adamw_8bit": {"optimizer.name": "AdamW", "optimizer.states": "int8"},
    "paged_adamw_8bit": {"optimizer.name": "AdamW", "optimizer.states": "int8"},
    "paged_adamw_32bit": {"optimizer.name": "AdamW", "optimizer.states": "fp32"},
    "adamw_torch_8bit": {"optimizer.name": "AdamW", "optimizer.states": "int8"},
    "adamw_torch_4bit": {"optimizer.name": "AdamW", "optimizer.states": "int4"},
    "lion_32bit": {"optimizer.name": "Lion", "optimizer.states": "fp32"},
    "lion_8bit": {"optimizer.name": "Lion", "optimizer.states": "int8"},
    "paged_lion_8bit": {"optimizer.name": "Lion", "optimizer.states": "int8"},
    "sgd": {"optimizer.name": "SGD"},
    "adagrad": {"optimizer.name": "Adagrad"},
    "rmsprop": {"optimizer.name": "RMSprop"},
}
"""Optimizer's name there -> fields here."""


def _optimizer(value: Any, made: Translation, tree: dict[str, Any]) -> None:
    if value not in OPTIMIZERS:
        made.refused.append(f"optimizer {shown(value)}: there is {', '.join(OPTIMIZERS)}")
        return
    made.fields.update(OPTIMIZERS[value])


def _beta(place: int) -> Rule:
    def rule(value: Any, made: Translation, tree: dict[str, Any]) -> None:
        betas = list(made.fields.get("optimizer.betas", (0.9, 0.999)))
        betas[place] = float(value)
        made.fields["optimizer.betas"] = tuple(betas)

    return rule


def _steps(value: Any, made: Translation, tree: dict[str, Any]) -> None:
    if isinstance(value, int) and value > 0:  # -1: not given
        made.fields["steps"] = value
        made.fields["epochs"] = None


def _epochs(value: Any, made: Translation, tree: dict[str, Any]) -> None:
    if value and made.fields.get("steps") is None:
        made.fields["epochs"] = float(value)


def _warmup(value: Any, made: Translation, tree: dict[str, Any]) -> None:
    if value is not None and not (value == 0 and (tree.get("warmup_steps") or tree.get("warmup_ratio"))):
        made.fields["schedule.warmup"] = float(value)


def _held_out(value: Any, made: Translation, tree: dict[str, Any]) -> None:
    if value is None:
        return
    if not 0 <= value < 1:
        made.refused.append(f"val_set_size or val_size = {shown(value)}: a number of rows; give a fraction")
        return
    made.fields["text.held_out"] = float(value)


def _report_to(value: Any, made: Translation, tree: dict[str, Any]) -> None:
    names = [value] if isinstance(value, str) else list(value or [])
    for name in names:
        if name in ("wandb", "tensorboard", "trackio"):
            made.fields["report_to"] = (*made.fields.get("report_to", ()), name)
        elif name != "none":
            made.left_out.append(f"report_to {name}")


def _every(name: str) -> Rule:
    """Steps between two of something; a fraction is one of all steps there."""

    def rule(value: Any, made: Translation, tree: dict[str, Any]) -> None:
        if isinstance(value, int) and not isinstance(value, bool):
            made.fields[name] = value
        elif value is not None:
            made.left_out.append(f"{name.partition('.')[0]} every {shown(value)}")

    return rule


def _template(value: Any, made: Translation, tree: dict[str, Any]) -> None:
    if value in ("jinja", "tokenizer_default", *NOTHING):
        return
    if value == "chatml":
        made.fields["text.chat_template"] = CHATML
        return
    made.notes.append(f"chat_template {value}: the tokenizer's own template is used; --text.chat-template sets another")


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _clip(value: Any, made: Translation, tree: dict[str, Any]) -> None:
    made.fields["gradient.clip_norm"] = float(value) if value else None


def _inverted(name: str) -> Rule:
    return lambda value, made, tree: made.put(name, None if value is None else not value)


def _when(name: str, when: Any) -> Rule:
    """A field that a switch sets to `when`."""
    return lambda value, made, tree: made.put(name, when if value else None)


def _stage(value: Any, made: Translation, tree: dict[str, Any]) -> None:
    if value not in ("sft", "pt", "dpo"):
        made.refused.append(f"stage = {shown(value)}: there is sft, pt, dpo")
    if value == "pt":
        made.fields["text.packing"] = tree.get("packing", True) is not False


ONE_WAY = (
    "every weight is trained here, without adapters; take it out, and use --working-set.chunks where memory is short"
)
SHARED: dict[str, str | Rule] = {
    "gradient_accumulation_steps": "gradient.accumulate",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": _beta(0),
    "adam_beta2": _beta(1),
    "adam_epsilon": "optimizer.eps",
    "max_grad_norm": lambda value, made, tree: made.fields.update(
        {"gradient.clip_norm": float(value) if value else None}
    ),
    "max_steps": _steps,
    "warmup_steps": _warmup,
    "warmup_ratio": _warmup,
    "bf16": _dtype,
    "fp16": _refused("fp16", "give bf16: true"),
    "seed": "seed",
    "output_dir": "out",
    "save_steps": _every("checkpoint.interval_steps"),
    "save_total_limit": "checkpoint.keep",
    "eval_steps": _every("evaluation.interval_steps"),
    "report_to": _report_to,
    "load_best_model_at_end": _when("checkpoint.keep_best", True),
    "resume_from_checkpoint": _refused("resume_from_checkpoint", "go on with --resume"),
    "trust_remote_code": _refused("trust_remote_code", "code of a model's repository is never run here"),
    "neftune_noise_alpha": _refused("neftune_noise_alpha", "there is no NEFTune here"),
    "lr_scheduler_kwargs": lambda value, made, tree: None,
    "push_to_hub": lambda value, made, tree: None,
    "hub_model_id": "push_to_hub",
    "label_smoothing_factor": _refused("label_smoothing_factor", "there is no label smoothing of tokens here"),
}
AXOLOTL: dict[str, str | Rule] = {
    **SHARED,
    "base_model": "model",
    "base_model_config": _refused("base_model_config", "the model's own config is used"),
    "tokenizer_config": _refused("tokenizer_config", "the model's own tokenizer is used"),
    "sequence_len": "sequence_length",
    "sample_packing": lambda value, made, tree: made.put("text.packing", bool(value)),
    "micro_batch_size": "batch_size",
    "num_epochs": _epochs,
    "optimizer": _optimizer,
    "lr_scheduler": _schedule,
    "cosine_min_lr_ratio": "schedule.final",
    "val_set_size": _held_out,
    "train_on_inputs": _when("text.loss_on", "all"),
    "gradient_checkpointing": lambda value, made, tree: made.put("gradient_checkpointing", bool(value)),
    "excess_length_strategy": lambda value, made, tree: made.put("text.too_long", value),
    "early_stopping_patience": "evaluation.patience",
    "chat_template": _template,
    "chat_template_jinja": "text.chat_template",
    "adapter": _refused("adapter", ONE_WAY),
    "load_in_8bit": _refused("load_in_8bit", "weights are trained as they are; --optimizer.states int8 saves memory"),
    "load_in_4bit": _refused("load_in_4bit", "weights are trained as they are; --optimizer.states int4 saves memory"),
    "bfloat16": _dtype,
    "float16": _refused("float16", "give bf16: true"),
    "rl": _refused("rl", "there is dpo", "dpo"),
    "rl_beta": "preference.beta",
    "dpo_beta": "preference.beta",
    "special_tokens": _refused("special_tokens", "the tokenizer's own are used; change the tokenizer's files"),
    "unfrozen_parameters": _refused("unfrozen_parameters", "every weight is trained; --working-set.always has names"),
    "evals_per_epoch": lambda value, made, tree: made.left_out.append("evals_per_epoch") if value else None,
    "saves_per_epoch": lambda value, made, tree: made.left_out.append("saves_per_epoch") if value else None,
    "wandb_project": lambda value, made, tree: _report_to("wandb", made, tree) if value else None,
}
FACTORY: dict[str, str | Rule] = {
    **SHARED,
    "model_name_or_path": "model",
    "stage": _stage,
    "finetuning_type": _refused("finetuning_type", ONE_WAY, "full"),
    "adapter_name_or_path": _refused("adapter_name_or_path", ONE_WAY),
    "quantization_bit": _refused("quantization_bit", "weights are trained as they are; see --optimizer.states"),
    "cutoff_len": "sequence_length",
    "packing": lambda value, made, tree: made.put("text.packing", value),
    "neat_packing": _when("text.packing", True),
    "per_device_train_batch_size": "batch_size",
    "num_train_epochs": _epochs,
    "optim": _optimizer,
    "lr_scheduler_type": _schedule,
    "val_size": _held_out,
    "train_on_prompt": _when("text.loss_on", "all"),
    "disable_gradient_checkpointing": _inverted("gradient_checkpointing"),
    "gradient_checkpointing": lambda value, made, tree: made.put("gradient_checkpointing", bool(value)),
    "pure_bf16": _dtype,
    "pref_beta": "preference.beta",
    "dpo_label_smoothing": "preference.label_smoothing",
    "pref_loss": _refused("pref_loss", "there is sigmoid", "sigmoid"),
    "ref_model": _refused("ref_model", "the reference is the model that training begins with"),
    "early_stopping_steps": "evaluation.patience",
    "streaming": lambda value, made, tree: made.put("text.streaming", bool(value) or None),
    "buffer_size": lambda value, made, tree: made.put("text.buffer", value if tree.get("streaming") else None),
    "freeze_trainable_layers": _refused("freeze_trainable_layers", ONE_WAY),
    "use_badam": _refused("use_badam", "a working set does this: --working-set.by layer"),
    "use_galore": _refused("use_galore", "there is no GaLore here; --optimizer.states int8 or --working-set.chunks"),
    "use_apollo": _refused("use_apollo", "there is no APOLLO here; --optimizer.states int8 or --working-set.chunks"),
    "use_dora": _refused("use_dora", ONE_WAY),
}
AXOLOTL_DEFAULTS: dict[str, Any] = {
    "sequence_length": 512, "batch_size": 1, "epochs": 1.0, "schedule.name": "cosine", "schedule.warmup": 0.03,
    "gradient.clip_norm": 1.0, "text.packing": False, "text.held_out": 0.0, "text.too_long": "drop", "seed": 42,
}  # fmt: skip
FACTORY_DEFAULTS: dict[str, Any] = {
    "sequence_length": 2048, "batch_size": 8, "epochs": 3.0, "optimizer.lr": 5e-5, "schedule.name": "linear",
    "schedule.warmup": 0.0, "gradient.clip_norm": 1.0, "text.packing": False, "text.held_out": 0.0,
    "text.too_long": "truncate", "gradient_checkpointing": True, "seed": 42,
}  # fmt: skip
"""What these programs do where a recipe does not say."""
