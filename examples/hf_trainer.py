"""transformers' Trainer with gradfold: one line. `python examples/hf_trainer.py [model]`; without one, a tiny Llama."""

import tiny
import transformers

import gradfold.hf

model, tokenizer = tiny.load()
texts = ["the cat sat on the mat", "a dog ran home to the cat", "the dog sat and the cat ran"] * 8
rows = [tokenizer(text, max_length=16, truncation=True) for text in texts]
arguments = transformers.TrainingArguments(
    output_dir="runs/hf_trainer",
    max_steps=8,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=4,
    learning_rate=1e-3,
    max_grad_norm=1.0,
    lr_scheduler_type="cosine",
    optim="adamw_bnb_8bit",  # gradfold's AdamW with int8 states; bitsandbytes is not needed
    logging_steps=1,
    save_steps=4,
    report_to=[],
)
collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
trainer = transformers.Trainer(model, arguments, data_collator=collator, train_dataset=rows)
trainer = gradfold.hf.fold_trainer(trainer)
trainer.train()
print(trainer.fold.report())
