"""`torch.hub.load("OWNER/REPOSITORY", "encoder", "runs/NAME")`: any spec of `load_encoder`."""

from ssl_flow import load_encoder as encoder

dependencies = ["torch", "torchvision", "timm", "safetensors"]
__all__ = ["encoder"]
