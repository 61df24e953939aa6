"""Scores of frozen encoders: linear probe, metrics, and the report of a run."""

from ssl_flow.evaluation.linear_probe import LinearProbe, run_linear_probe
from ssl_flow.evaluation.metrics import ConfusionMatrix
from ssl_flow.evaluation.pixel_features import estimate_batchnorm
from ssl_flow.evaluation.probe_command import linear_probe_command

__all__ = [
    "ConfusionMatrix",
    "LinearProbe",
    "estimate_batchnorm",
    "linear_probe_command",
    "run_linear_probe",
]
