"""A loop of your own: two lines change. Arguments: [model]; without one, a tiny Llama."""

import tiny
import torch

import gradfold

model, tokenizer = tiny.load()
texts = ["the cat sat on the mat", "a dog ran home to the cat", "the dog sat and the cat ran"] * 8
rows = [tokenizer(text, padding="max_length", max_length=8, return_tensors="pt")["input_ids"][0] for text in texts]
loader = torch.utils.data.DataLoader(rows, batch_size=2)

accumulate = 4
optimizer = gradfold.AdamW(model.parameters(), lr=1e-3, states="int8")  # 1. gradfold's optimizer
fold = gradfold.fold(model, optimizer, accumulate=accumulate, clip_norm=1.0)  # 2. folded into the model
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=6)

for _ in range(2):
    for index, ids in enumerate(loader, 1):
        loss = model(input_ids=ids, labels=ids).loss
        (loss / accumulate).backward()  # the mean over the micro-batches, as in torch
        if index % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            print(f"loss {loss.item():.3f}  gradient norm {fold.grad_norm:.3f}")
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "plain_loop.pt")
