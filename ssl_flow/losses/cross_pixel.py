"""The cross-pixel flow-similarity loss as a module: checks, weights, normalisation, back ends.

Formulas and source (arXiv 1807.05636): :mod:`ssl_flow.losses.reference`.
"""

import importlib.util
import math
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_flow.losses import chunked, reference

OBJECTIVES = ("cross_entropy", "kernel_alignment", "regression")
SELF_PAIRS = ("exclude", "subtract_identity")
BACKENDS = ("auto", "triton", "chunked", "reference")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_MAX_EXPONENT = 80.0  # what float32 exponentials take: exp(80) is 5.5e34
_MIN_SCALE = 1e-4  # where a learned scale stops


class CrossPixelFlowLoss(torch.nn.Module):
    """Pixels that move alike get similar embeddings: all pairs of pixels of an image, compared.

    Args:
        objective: ``"cross_entropy"``, ``"kernel_alignment"`` or ``"regression"``.
        embedding_scale: s, the largest value of the embedding kernel ``s cos(e_u, e_v)``; the
            kernel alignment doesn't depend on it.
        embedding_temperature: softmax temperature of the embedding kernel. Cross-entropy only.
        flow_sigma: width of the Gaussian flow kernel, in the unit of ``flow`` (pixels).
        flow_temperature: softmax temperature of the flow kernel. Cross-entropy only.
        self_pairs: ``"exclude"`` leaves pairs of a pixel with itself out; ``"subtract_identity"``
            (cross-entropy only) keeps them and subtracts the identity from both kernels.
        learn_scale: make s a parameter, ``log_scale``, kept within the bounds below.
        backend: ``"triton"`` (fused kernels, CUDA, float32 and half precision, up to 256
            channels), ``"chunked"`` (any device), both with memory O(N); ``"reference"`` (dense,
            to compare with); ``"auto"`` is ``"triton"`` wherever that runs, else ``"chunked"``.
            First derivatives only, but for ``"reference"``.

    Raises:
        ModuleNotFoundError: for ``backend="triton"`` where that package isn't installed.
        ValueError: for an unknown name, a number that isn't positive, an option that the objective
            can't honour, and, for cross-entropy, exponents out of float32's reach
            (``2 embedding_scale / embedding_temperature > 80`` or ``1 / flow_temperature > 80``).

    Example:
        >>> loss = CrossPixelFlowLoss()
        >>> embedding = torch.randn(2, 16, 8, 8, requires_grad=True)
        >>> loss(embedding, flow=torch.randn(2, 2, 8, 8)).backward()
    """

    def __init__(
        self,
        objective: str = "cross_entropy",
        embedding_scale: float = 1.0,
        embedding_temperature: float = 0.1,
        flow_sigma: float = 0.5,
        flow_temperature: float = 0.1,
        self_pairs: str = "exclude",
        learn_scale: bool = False,
        backend: str = "auto",
    ) -> None:
        """Check and keep the options; see the class."""
        super().__init__()
        for name, found, known in (
            ("objective", objective, OBJECTIVES),
            ("self_pairs", self_pairs, SELF_PAIRS),
            ("backend", backend, BACKENDS),
        ):
            if found not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; found {found!r}")
        numbers = (embedding_scale, embedding_temperature, flow_sigma, flow_temperature)
        for name, value in zip(
            ("embedding_scale", *reference.Options._fields), numbers, strict=False
        ):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive finite number, found {value}")
        if objective == "cross_entropy":
            learned, target = 2 * embedding_scale / embedding_temperature, 1 / flow_temperature
            if max(learned, target) > _MAX_EXPONENT:
                raise ValueError(
                    "2 embedding_scale / embedding_temperature and 1 / flow_temperature must be at "
                    f"most {_MAX_EXPONENT:g}, found {learned:g} and {target:g}: raise the "
                    "temperature or lower the scale"
                )
        elif self_pairs == "subtract_identity":
            raise ValueError(
                f"self_pairs='subtract_identity' is for objective='cross_entropy', found "
                f"objective={objective!r}: use self_pairs='exclude'"
            )
        if learn_scale and objective == "kernel_alignment":
            raise ValueError(
                "learn_scale=True has no effect with objective='kernel_alignment', which doesn't "
                "depend on the scale: use learn_scale=False"
            )
        if backend == "triton" and not _HAS_TRITON:
            raise ModuleNotFoundError(
                "backend='triton' needs the package triton, which comes with PyTorch's CUDA "
                "builds: pip install triton, or use backend='chunked'"
            )
        self.objective = objective
        self.embedding_scale = float(embedding_scale)
        self.options = reference.Options(*numbers[1:], self_pairs == "exclude")
        self.backend = backend
        self.learn_scale = learn_scale
        if learn_scale:
            self.log_scale = torch.nn.Parameter(torch.tensor(math.log(embedding_scale)))

    @property
    def scale(self) -> float | Tensor:
        """The current s: a number, or a tensor of no dimensions if it is learned.

        A learned s stays within [1e-4, 40 embedding_temperature] (cross-entropy; no upper bound for
        regression). Beyond a bound the value is the bound's and the gradient goes through, so that
        the parameter can come back.
        """
        if not self.learn_scale:
            return self.embedding_scale
        log_scale = self.log_scale.to(torch.promote_types(self.log_scale.dtype, torch.float32))
        upper = None
        if self.objective == "cross_entropy":
            upper = math.log(_MAX_EXPONENT / 2 * self.options.embedding_temperature)
        lower = math.log(min(_MIN_SCALE, self.embedding_scale))
        clamped = log_scale.clamp(lower, upper)
        return (log_scale + (clamped - log_scale).detach()).exp()

    def forward(self, embedding: Tensor, flow: Tensor, weight: Tensor | None = None) -> Tensor:
        """The mean of :meth:`per_image` over the batch, a scalar."""
        return self.per_image(embedding, flow, weight).mean()

    def per_image(self, embedding: Tensor, flow: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of each image, (B,).

        Args:
            embedding: (B, D, H, W) floating point, of any length (it is normalised over D). Half
                precision is computed in float32, float64 stays.
            flow: (B, 2, H, W) floating point, at the embedding's resolution; pixels, x right, y
                down. It gets no gradient.
            weight: (B, H, W) floating point or None for ones. A pixel of weight 0 is ignored,
                whatever it holds (NaN too). An image with fewer than two others has loss 0.

        Returns:
            (B,) float32 (float64 for float64 embeddings). NaN, and a gradient of NaN, for an image
            with a value that isn't finite where the weight isn't 0, or a weight that is negative or
            not finite; it isn't raised, since looking would make a GPU wait.

        Raises:
            TypeError: if a tensor isn't of a floating-point type.
            ValueError: if shapes or devices don't fit together, or flow or weight requires grad, or
                ``backend="triton"`` can't run on that device, type or number of channels.
        """
        with torch.autocast(embedding.device.type, enabled=False):
            e, f, w, poison = pixels(embedding, flow, weight)
            backend = self._backend(e)
            if self.objective == "cross_entropy":
                loss: Tensor = backend.cross_entropy(e, self.scale, f, w, self.options)
                return loss * poison
            products = backend.inner_products(e, f, w, self.options)
            if self.objective == "regression":
                return reference.regression(products, w, self.scale) * poison
            return reference.kernel_alignment(products, w) * poison

    @torch.no_grad()
    def target_entropy(self, flow: Tensor, weight: Tensor | None = None) -> Tensor:
        """Entropy of the target, (B,): the cross-entropy less this is a divergence >= 0, to watch.

        Shapes, NaN and errors as for :meth:`per_image`; memory as that of the loss.

        Raises:
            ValueError: also if the objective isn't cross-entropy, which alone has a target of
                probabilities.
        """
        if self.objective != "cross_entropy":
            raise ValueError(
                f"target_entropy needs objective='cross_entropy', found {self.objective!r}"
            )
        with torch.autocast(flow.device.type, enabled=False):
            e, f, w, poison = pixels(_constant(flow), flow, weight)
            entropy: Tensor = self._backend(e).target_entropy(f, w, self.options)
            return entropy * poison

    @torch.no_grad()
    def constant_loss(self, flow: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of an embedding that is the same at each pixel, (B,): what collapse would cost.

        Shapes, NaN and errors as for :meth:`per_image`. No gradient.
        """
        return self.per_image(_constant(flow), flow, weight)

    def extra_repr(self) -> str:
        """The options, for ``print``."""
        names = ("objective", "embedding_scale", "learn_scale", "backend")
        options = {name: getattr(self, name) for name in names} | self.options._asdict()
        return ", ".join(f"{name}={value!r}" for name, value in options.items())

    def _backend(self, rows: Tensor) -> ModuleType:
        """The module that computes for ``rows`` (B, N, channels)."""
        if self.backend == "reference":
            return reference
        if self.backend == "chunked" or (
            self.backend == "auto" and not (rows.is_cuda and _HAS_TRITON)
        ):
            return chunked
        from ssl_flow.losses import triton_pairwise

        obstacle = triton_pairwise.obstacle(rows)
        if not obstacle:
            return triton_pairwise
        if self.backend == "triton":
            raise ValueError(f"backend='triton' {obstacle}: use backend='chunked'")
        return chunked


class Pixels(NamedTuple):
    """The pixels of a batch as rows, 0 where they are ignored."""

    embedding: Tensor  # (B, N, D)
    flow: Tensor  # (B, N, 2)
    weight: Tensor  # (B, N)
    poison: Tensor  # (B,) 1, or NaN for an image with values that a loss can't be computed of


def pixels(embedding: Tensor, flow: Tensor, weight: Tensor | None) -> Pixels:
    """Check (B, D, H, W), (B, 2, H, W), (B, H, W); normalise the embedding; float32 or float64.

    Raises TypeError or ValueError, see :meth:`CrossPixelFlowLoss.per_image`; looks at no values.
    """
    for name, tensor, dims in (
        ("flow", flow, 4),
        ("embedding", embedding, 4),
        ("weight", weight, 3),
    ):
        if tensor is None:
            continue
        shape = tuple(tensor.shape)
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, found {tensor.dtype}")
        if tensor.dim() != dims or 0 in shape:
            layout = "(B, H, W)" if dims == 3 else "(B, channels, H, W)"
            raise ValueError(f"{name} must be {layout} and not empty, found shape {shape}")
        if name == "flow" and shape[1] != 2:
            raise ValueError(f"flow must have 2 channels, (B, 2, H, W), found shape {shape}")
        if (shape[0], *shape[-2:]) != (flow.shape[0], *flow.shape[-2:]):
            raise ValueError(
                f"{name} and flow must agree in B, H and W, found {shape} and "
                f"{tuple(flow.shape)}: bring the flow to the embedding's grid first"
            )
        if tensor.device != flow.device:
            raise ValueError(
                f"{name} and flow must be on one device, found {tensor.device} and {flow.device}"
            )
        if name != "embedding" and tensor.requires_grad:
            raise ValueError(f"{name} gets no gradient here, found requires_grad: detach it")
    dtype = torch.float64 if embedding.dtype == torch.float64 else torch.float32
    w = (torch.ones_like(flow[:, 0]) if weight is None else weight).flatten(1).to(dtype)
    used = w[..., None] != 0
    e, f = (torch.where(used, image.flatten(2).mT.to(dtype), 0) for image in (embedding, flow))
    # The squared length is what normalising needs to be finite.
    good = (w.isfinite() & (w >= 0) & e.detach().square().sum(-1).isfinite()).all(-1)
    good = good & f.isfinite().flatten(1).all(-1)
    poison = torch.where(good, 1.0, torch.nan).to(dtype)
    return Pixels(F.normalize(e, dim=-1, eps=1e-6), f, w, poison)


def _constant(flow: Tensor) -> Tensor:
    """An embedding (B, 1, H, W) that is the same everywhere; `pixels` refuses what is no flow."""
    return torch.ones_like(flow[:, :1] if flow.dim() > 1 else flow)
