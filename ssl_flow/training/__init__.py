"""Pretraining: the loop, checkpoints, monitors and the score at the end."""

from ssl_flow.training.loop import pretrain, train_command

__all__ = ["pretrain", "train_command"]
