"""The ridge-regression flow loss: can an image's flow be read linearly from its embedding?

Source: Araslanov, Sonnweber, Cremers, "FlowFeat: Pixel-Dense Embedding of Motion Profiles",
NeurIPS 2025, arXiv 2511.07696: the regression, its L1 error and (``edges``) that of the flow's
spatial differences. The paper fits on the features of an averaged teacher (``fit``).

Per image, with weights that sum to 1 over the pixels fitted on and means taken with them::

    A = (E_c^T W E_c + ridge (tr(E^T W E) / D) I)^-1 E_c^T W F_c     E_c = E - mean(E), F_c likewise
    prediction(u) = mean(F) + (e_u - mean(E)) A
    error = sum_u w_u |f_u - prediction(u)| / sum_u w_u |f_u - mean(F)|     u: pixels scored on
    edge error = sum_uv w_uv |d_uv - (e_u - e_v) A| / sum_uv w_uv |d_uv|
    loss = (error + edges * edge error) / (1 + edges)

with d_uv = f_u - f_v and w_uv = min(w_u, w_v) over all horizontal and vertical neighbours, for
which the map is fitted on all pixels of the image (or of ``fit``).

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
        edges: weight of the error of differences between neighbouring pixels, beside 1 for that of
            the flow: where things end, which is few pixels and so little of the error.

    Raises:
        ValueError: if ``ridge`` isn't a positive number, or ``edges`` is negative.
    """

    def __init__(self, ridge: float = 0.1, edges: float = 0.0) -> None:
        """Check and keep the options; see the class."""
        super().__init__()
        if not (math.isfinite(ridge) and ridge > 0):
            raise ValueError(f"ridge must be a positive finite number, found {ridge}")
        if not (math.isfinite(edges) and edges >= 0):
            raise ValueError(f"edges must be 0 or a positive finite number, found {edges}")
        self.ridge, self.edges = float(ridge), float(edges)

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
            fit: None splits the pixels in random halves, one of each two neighbours by a coin
                (PyTorch's global generator), and scores each half by the map fitted on the other.
                Or ``(embedding, flow, weight)`` of another crop of the same frames, of any size,
                to fit on; gradients go into its embedding, too, unless it is detached. The two
                crops' flows must be in one unit: normalise them before cropping.

        Returns:
            (B,) float32 (float64 for float64 embeddings). 0, differentiably, for an image without
            usable pixels to fit and to score on, or whose flow there is one constant.
        """
        with torch.autocast(embedding.device.type, enabled=False):
            here, grid = pixels(embedding, flow, weight), flow.shape[-2:]
            if fit is not None:
                there = pixels(*fit)
                if fit[0].shape[:2] != embedding.shape[:2] or fit[0].device != embedding.device:
                    raise ValueError(
                        f"fit's embedding and embedding must agree in B, D and device, found "
                        f"{tuple(fit[0].shape)} on {fit[0].device} and {tuple(embedding.shape)} on "
                        f"{embedding.device}"
                    )
                loss = _ratio(*self._errors(there, here))
                return self._with_edges(loss, there, here, grid) * here.poison * there.poison
            w = here.weight
            coin = torch.rand(w[:, ::2].shape, device=w.device) < 0.5  # whose are 2k and 2k + 1?
            half = torch.stack([coin, ~coin], -1).flatten(1)[:, : w.shape[1]]
            one, other = here._replace(weight=w * half), here._replace(weight=w * ~half)
            forth, back = self._errors(one, other), self._errors(other, one)
            loss = _ratio(*(a + b for a, b in zip(forth, back, strict=True)))
            return self._with_edges(loss, here, here, grid) * here.poison

    def extra_repr(self) -> str:
        """The options, for ``print``."""
        return f"ridge={self.ridge}, edges={self.edges}"

    def _errors(self, fit: Pixels, score: Pixels) -> tuple[Tensor, Tensor, Tensor]:
        """Summed errors of the linear and of the constant prediction, and their weight, (B,)."""
        slope, intercept, mean_flow = fit_ridge(*fit[:3], self.ridge)
        e, flow, w, _ = score
        w = w * (fit.weight.sum(1, keepdim=True) > 0)  # fitted on nothing: nothing to score
        residuals = flow - torch.baddbmm(intercept, e, slope), flow - mean_flow
        error, baseline = ((w[:, None] @ r.abs()).sum((1, 2)) for r in residuals)
        return error, baseline, w.sum(1)

    def _with_edges(self, loss: Tensor, fit: Pixels, score: Pixels, grid: torch.Size) -> Tensor:
        """The loss, (B,), averaged with the error of neighbours' differences as `edges` weighs."""
        if not self.edges:
            return loss
        slope, _, _ = fit_ridge(*fit[:3], self.ridge)
        e, flow, w, _ = score
        w = (w * (fit.weight.sum(1, keepdim=True) > 0)).unflatten(1, grid)
        # (B, H, W, 4): the flow, and what of it the map leaves; the intercept is in no difference.
        maps = torch.cat([flow, flow - e @ slope], -1).unflatten(1, grid)
        across, down = maps.diff(dim=2).abs(), maps.diff(dim=1).abs()
        w_across = torch.minimum(w[:, :, 1:], w[:, :, :-1])
        w_down = torch.minimum(w[:, 1:], w[:, :-1])
        sums = (across * w_across[..., None]).sum((1, 2)) + (down * w_down[..., None]).sum((1, 2))
        total = w_across.sum((1, 2)) + w_down.sum((1, 2))
        edge = _ratio(sums[:, 2:].sum(1), sums[:, :2].sum(1), total)
        return (loss + self.edges * edge) / (1 + self.edges)


def fit_ridge(e: Tensor, flow: Tensor, w: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes (B, D, 2), intercept (B, 1, 2) and the flow's weighted mean (B, 1, 2)."""
    d = e.shape[-1]
    total = w.sum(1).clamp(min=torch.finfo(e.dtype).tiny)
    rows = torch.cat([e, flow, torch.ones_like(flow[..., :1])], -1)
    moments = (rows * (w / total[:, None])[..., None]).mT @ rows
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
