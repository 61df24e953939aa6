"""The ridge-regression flow loss: can an image's flow be read linearly from its embedding?

Source: Araslanov, Sonnweber, Cremers, "FlowFeat: Pixel-Dense Embedding of Motion Profiles",
NeurIPS 2025, arXiv 2511.07696. Of its objective this is the regression with its L1 error; the
paper adds the error of the flow's spatial differences and fits on the features of an averaged
teacher (``fit``).

Per image, with weights that sum to 1 over the pixels fitted on and means taken with them::

    A = (E_c^T W E_c + ridge (tr(E^T W E) / D) I)^-1 E_c^T W F_c     E_c = E - mean(E), F_c likewise
    prediction(u) = mean(F) + (e_u - mean(E)) A
    loss = sum_u w_u |f_u - prediction(u)| / sum_u w_u |f_u - mean(F)|     u: pixels scored on

The penalty is relative to the embedding's size *before* centring. So a motion that shows only in
small ripples on one constant vector can't be read out: the embedding has to spend its range on it.
"""

import math

import torch
from torch import Tensor

from ssl_flow.losses.cross_pixel import Pixels, pixels

_STILL = 1e-3  # flow units; an image that a constant explains better than this has no motion


class RidgeFlowLoss(torch.nn.Module):
    """The flow of an image, regressed linearly (with an intercept) on its pixels' unit embedding.

    1 = no better than a constant, 0 = perfect; above 1 = the map found on the pixels fitted on
    misleads on those scored on.

    Args:
        ridge: penalty on the slopes, not on the intercept, relative to the mean square of the
            embedding's components; so the number of pixels doesn't matter.

    Raises:
        ValueError: if ``ridge`` isn't a positive number.
    """

    def __init__(self, ridge: float = 0.1) -> None:
        """Check and keep the option; see the class."""
        super().__init__()
        if not (math.isfinite(ridge) and ridge > 0):
            raise ValueError(f"ridge must be a positive finite number, found {ridge}")
        self.ridge = float(ridge)

    def forward(
        self,
        embedding: Tensor,
        flow: Tensor,
        weight: Tensor | None = None,
        fit: tuple[Tensor, Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """The mean of :meth:`per_image` over the batch, a scalar."""
        return self.per_image(embedding, flow, weight, fit).mean()

    def per_image(
        self,
        embedding: Tensor,
        flow: Tensor,
        weight: Tensor | None = None,
        fit: tuple[Tensor, Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """The loss of each image, (B,).

        Args:
            embedding, flow, weight: as `CrossPixelFlowLoss.per_image` takes them, with the same
                errors and NaN; flow in any unit.
            fit: None splits the pixels in halves, one of each two neighbours by a coin that falls
                the same way in every image, and scores each half by the map fitted on the other.
                Or ``(embedding, flow, weight)`` of another crop of the same frames, of any size,
                to fit on; gradients go into its embedding, too, unless it is detached. The two
                crops' flows must be in one unit: normalise them before cropping.

        Returns:
            (B,) float32 (float64 for float64 embeddings). 0, differentiably, for an image without
            usable pixels to fit and to score on, or whose flow there is one constant.
        """
        with torch.autocast(embedding.device.type, enabled=False):
            here = pixels(embedding, flow, weight)
            if fit is not None:
                there = pixels(*fit)
                if fit[0].shape[:2] != embedding.shape[:2] or fit[0].device != embedding.device:
                    raise ValueError(
                        f"fit's embedding and embedding must agree in B, D and device, found "
                        f"{tuple(fit[0].shape)} on {fit[0].device} and {tuple(embedding.shape)} on "
                        f"{embedding.device}"
                    )
                return _ratio(*self._errors(there, here)) * here.poison * there.poison
            w = here.weight
            half = _first_half(w.shape[1]).to(w.device)
            one, other = here._replace(weight=w * half), here._replace(weight=w * ~half)
            forth, back = self._errors(one, other), self._errors(other, one)
            return _ratio(*(a + b for a, b in zip(forth, back, strict=True))) * here.poison

    def extra_repr(self) -> str:
        """The option, for ``print``."""
        return f"ridge={self.ridge}"

    def _errors(self, fit: Pixels, score: Pixels) -> tuple[Tensor, Tensor, Tensor]:
        """Summed errors of the linear and of the constant prediction, and their weight, (B,)."""
        slope, intercept, mean_flow = fit_ridge(*fit[:3], self.ridge)
        e, flow, w, _ = score
        w = w * (fit.weight.sum(1, keepdim=True) > 0)  # fitted on nothing: nothing to score
        residuals = flow - torch.baddbmm(intercept, e, slope), flow - mean_flow
        error, baseline = ((w[:, None] @ r.abs()).sum((1, 2)) for r in residuals)
        return error, baseline, w.sum(1)


def _first_half(count: int) -> Tensor:
    """(count,) bool: one of each two neighbours, at random, but always the same ones.

    So an image's loss is a function of the image: not of its batch, its process or the step.
    """
    coin = torch.rand((count + 1) // 2, generator=torch.Generator().manual_seed(0)) < 0.5
    return torch.stack([coin, ~coin], -1).flatten()[:count]


def fit_ridge(e: Tensor, flow: Tensor, w: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes (B, D, 2), intercept (B, 1, 2) and the flow's weighted mean (B, 1, 2)."""
    d = e.shape[-1]
    total = w.sum(1).clamp(min=torch.finfo(e.dtype).tiny)
    rows = torch.cat([e, flow, torch.ones_like(flow[..., :1])], -1)
    # Of a symmetric product both factors give the same gradient: compute one, count it twice.
    half = rows.mT @ (rows.detach() * (w / total[:, None])[..., None])
    moments = half + half.mT - half.detach()
    mean_e, mean_flow = moments[:, -1:, :d], moments[:, -1:, d:-1]
    second = moments[:, :d, :d]
    # Centring here instead of before loses digits, but fewer than the penalty outweighs.
    gram = second - mean_e.mT @ mean_e
    size = second.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp(min=1e-30)
    gram = gram + torch.diag_embed(ridge * size.expand(-1, d))
    # Without the check for singular matrices, for which a GPU would wait: the penalty forbids them.
    slope = torch.linalg.solve_ex(gram, moments[:, :d, d:-1] - mean_e.mT @ mean_flow).result
    return slope, mean_flow - mean_e @ slope, mean_flow


def _ratio(error: Tensor, baseline: Tensor, total: Tensor) -> Tensor:
    """Error relative to the constant prediction's, (B,); 0 for images with nothing to explain."""
    moving = baseline > _STILL * total
    return torch.where(moving, error, 0 * error) / torch.where(moving, baseline, 1)
