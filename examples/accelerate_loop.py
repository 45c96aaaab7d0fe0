"""A loop with Accelerate: `gradfold.hf.prepare` in place of `accelerator.prepare`. Arguments: [model]."""

import accelerate
import tiny
import torch

import gradfold.hf

model, tokenizer = tiny.load()
texts = ["the cat sat on the mat", "a dog ran home to the cat", "the dog sat and the cat ran"] * 8
rows = [tokenizer(text, padding="max_length", max_length=8, return_tensors="pt")["input_ids"][0] for text in texts]
loader = torch.utils.data.DataLoader(rows, batch_size=2)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=6)

accelerator = accelerate.Accelerator(gradient_accumulation_steps=4)
model, optimizer, loader, scheduler = gradfold.hf.prepare(
    accelerator, model, optimizer, loader, scheduler, clip_norm=1.0, states="int8"
)
for _ in range(2):
    for ids in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                print(f"loss {loss.item():.3f}  gradient norm {norm.item():.3f}")
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
accelerator.save_state("runs/accelerate_loop")
