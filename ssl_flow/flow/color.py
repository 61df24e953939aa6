"""Flow as a picture."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def flow_to_rgb(flow: NDArray[np.float32], max_magnitude: float | None = None) -> NDArray[np.uint8]:
    """Colour a flow by the Middlebury wheel: hue is the direction, saturation the length.

    Args:
        flow: (H, W, 2) in pixels.
        max_magnitude: length in pixels drawn fully saturated; longer vectors are shortened to it.
            None takes the longest of this flow. Give it to make several pictures comparable.

    Returns:
        (H, W, 3) RGB uint8; white is no motion.

    Raises:
        ValueError: the shape is not (H, W, 2), or `max_magnitude` is not positive.
    """
    import torch
    from torchvision.utils import flow_to_image

    if flow.ndim != 3 or flow.shape[2] != 2:
        raise ValueError(f"flow must be (H, W, 2), got {flow.shape}")
    if max_magnitude is not None:
        if max_magnitude <= 0:
            raise ValueError(f"max_magnitude must be positive, got {max_magnitude}")
        length = np.linalg.norm(flow, axis=-1, keepdims=True)
        flow = flow / np.maximum(length / max_magnitude, 1)
        # flow_to_image scales by the longest vector: one pixel outside the picture sets the scale.
        flow = np.pad(flow, ((0, 1), (0, 0), (0, 0)))
        flow[-1, 0] = (max_magnitude, 0)
    picture = flow_to_image(torch.from_numpy(np.ascontiguousarray(flow)).permute(2, 0, 1).float())
    rgb = picture.permute(1, 2, 0).numpy()
    return np.ascontiguousarray(rgb[:-1] if max_magnitude is not None else rgb)
