"""Losses: what the embedding is asked to do.

:class:`CrossPixelFlowLoss` is the one to use; ``reference`` holds its formulas, ``chunked`` the
same without N x N memory, ``triton_pairwise`` the same again, fused for GPUs.
"""

from ssl_flow.losses.cross_pixel import CrossPixelFlowLoss

__all__ = ["CrossPixelFlowLoss"]
