"""Videos and no labels: optical flow teaches an image encoder which pixels belong together."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ssl_flow.flow import optical_flow as optical_flow
    from ssl_flow.losses import CrossPixelFlowLoss as CrossPixelFlowLoss
    from ssl_flow.models import load_encoder as load_encoder
    from ssl_flow.models import save_encoder as save_encoder

# Public name -> where it lives. Imported on first use, so that `import ssl_flow` stays instant.
_HOME = {
    "optical_flow": "ssl_flow.flow",
    "CrossPixelFlowLoss": "ssl_flow.losses",
    "load_encoder": "ssl_flow.models",
    "save_encoder": "ssl_flow.models",
}

__all__ = ["CrossPixelFlowLoss", "load_encoder", "optical_flow", "save_encoder"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in ("flow", "data", "models", "losses", "evaluation", "training"):
        return importlib.import_module(f"ssl_flow.{name}")
    raise AttributeError(f"module 'ssl_flow' has no attribute {name!r}")
