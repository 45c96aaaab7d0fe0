"""TRL's SFTTrainer with gradfold: one line. `python examples/trl_sft.py [model]`; without one, a tiny Llama."""

import datasets
import tiny
import trl

import gradfold.hf

model, tokenizer = tiny.load()
question = [{"role": "user", "content": "what did the cat do"}]
answers = ["the cat sat on the mat", "it ran home to the dog", "the cat ran and the dog sat"]
chats = [{"messages": [*question, {"role": "assistant", "content": answer}]} for answer in answers * 8]
arguments = trl.SFTConfig(
    output_dir="runs/trl_sft",
    max_steps=6,
    max_length=32,
    packing=True,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=4,
    learning_rate=1e-3,
    bf16=False,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
)
data = datasets.Dataset.from_list(chats)
trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
trainer = gradfold.hf.fold_trainer(trainer, states="int8")
trainer.train()
print(trainer.fold.report().heads[0])  # TRL's fused head, with the folded head's gradient
