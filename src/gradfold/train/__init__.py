"""Fine-tuning from a Recipe: what `gradfold train` runs. Needs the extra `gradfold[train]`."""
