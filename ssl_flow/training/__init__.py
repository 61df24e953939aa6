"""Pretraining: the loop, what keeps it safe, what it shows, and the score at the end."""

from ssl_flow.training.command import train_command
from ssl_flow.training.loop import pretrain

__all__ = ["pretrain", "train_command"]
