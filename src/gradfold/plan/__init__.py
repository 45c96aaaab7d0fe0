"""Predicted and measured peak memory of a training step."""
