"""What a checkpoint is made of, without a training loop around it."""

import torch

import gradfold
from gradfold.train.checkpoint import (
    Progress,
    save_checkpoint,
)
from gradfold.train.optimizer import groups_of, make_optimizer
from gradfold.train.recipe_groups import OptimizerRecipe, ScheduleRecipe
from gradfold.train.schedule import make_schedule
from tests.train.tiny import build_model, recipe


class Parts:
    """What a checkpoint is made of, after a few steps, without a training loop around it."""

    def __init__(self, tokenizer, folder, name="AdamW", steps=3):
        self.tokenizer, self.folder = tokenizer, folder
        self.recipe = recipe(folder, folder, checkpoint__keep=2)
        self.model = build_model()
        settings = OptimizerRecipe(name=name, lr=1e-2, weight_decay=0.0 if name == "Rprop" else 0.1)
        self.optimizer = make_optimizer(settings, groups_of(self.model, settings))
        self.scheduler = make_schedule(ScheduleRecipe(), self.optimizer, 100)
        gradfold.fold(self.model, self.optimizer)
        self.progress = Progress()
        self.train(steps)

    def train(self, steps):
        for _ in range(steps):
            ids = torch.randint(300, (2, 16))
            self.model(input_ids=ids, labels=ids).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.progress.step += 1

    def save(self):
        return save_checkpoint(
            self.folder, self.model, self.tokenizer, self.optimizer, self.scheduler, self.recipe, self.progress
        )

    def tensors(self):
        """Every number that matters, by name."""
        found = dict(self.model.state_dict())
        for index, state in self.optimizer.state_dict()["state"].items():
            found |= {f"{index}/{name}": value for name, value in state.items()}
        return {name: value.clone() for name, value in found.items()}
