"""Scores of frozen encoders: protocols, metrics, the suite, and the report of a run."""

from ssl_flow.evaluation.linear_probe import LinearProbe, run_linear_probe
from ssl_flow.evaluation.metrics import ConfusionMatrix
from ssl_flow.evaluation.outcome import Outcome
from ssl_flow.evaluation.pixel_features import estimate_batchnorm

__all__ = ["ConfusionMatrix", "LinearProbe", "Outcome", "estimate_batchnorm", "run_linear_probe"]
