"""Losses: what the embedding is asked to do.

:class:`CrossPixelFlowLoss` is the one to use; ``reference`` holds its formulas, ``chunked`` the
same without N x N memory, ``triton_pairwise`` the same again, fused for GPUs.
:class:`RidgeFlowLoss` is its rival without pairs: the flow must be a linear map of the embedding.
Tiles of maps are learned with ``triplet`` (and InfoNCE); ``mining`` finds their hard negatives.
"""

from ssl_flow.losses.cross_pixel import CrossPixelFlowLoss
from ssl_flow.losses.ridge import RidgeFlowLoss
from ssl_flow.losses.triplet import InfoNCELoss, SoftmaxRatioLoss, SoftPNLoss, TripletMarginLoss

__all__ = [
    "CrossPixelFlowLoss",
    "InfoNCELoss",
    "RidgeFlowLoss",
    "SoftPNLoss",
    "SoftmaxRatioLoss",
    "TripletMarginLoss",
]
