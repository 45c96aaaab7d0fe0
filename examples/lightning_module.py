"""A LightningModule, folded by a callback while it is fitted. Arguments: [model]; without one, a tiny Llama."""

import lightning
import tiny
import torch

import gradfold.lightning

model, tokenizer = tiny.load()
texts = ["the cat sat on the mat", "a dog ran home to the cat", "the dog sat and the cat ran"] * 8
rows = [tokenizer(text, padding="max_length", max_length=8, return_tensors="pt")["input_ids"][0] for text in texts]


class FineTuning(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = model

    def training_step(self, ids, index):
        loss = self.model(input_ids=ids, labels=ids).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


trainer = lightning.Trainer(
    max_epochs=2,
    gradient_clip_val=1.0,
    accumulate_grad_batches=4,
    callbacks=[gradfold.lightning.Fold(states="int8")],
    default_root_dir="runs/lightning_module",
    log_every_n_steps=1,
)
trainer.fit(FineTuning(), torch.utils.data.DataLoader(rows, batch_size=2))
print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
