"""TRL's DPOTrainer with gradfold: one line. `python examples/trl_dpo.py [model]`; without one, a tiny Llama."""

import copy

import datasets
import tiny
import trl

import gradfold.hf

model, tokenizer = tiny.load()
pairs = [
    {"prompt": "what did the cat do ", "chosen": "the cat sat on the mat", "rejected": "a dog ran"},
    {"prompt": "what did the dog do ", "chosen": "it ran home to the cat", "rejected": "the mat sat"},
]
arguments = trl.DPOConfig(
    output_dir="runs/trl_dpo",
    max_steps=6,
    max_length=32,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=1e-3,
    beta=0.1,
    bf16=False,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
)
trainer = trl.DPOTrainer(
    model,
    ref_model=copy.deepcopy(model),
    args=arguments,
    train_dataset=datasets.Dataset.from_list(pairs * 12),
    processing_class=tokenizer,
)
gradfold.hf.fold_trainer(trainer, states="int8").train()
