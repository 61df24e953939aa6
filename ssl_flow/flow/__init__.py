"""Videos -> optical flow: decoding, flow methods, extraction, and the store on disk."""

from .codec import decode_flow, encode_flow, flow_to_rgb
from .estimators import OPTIONS, flow_validity, optical_flow, optical_flows
from .extract import Summary, extract
from .shard import StoreError
from .sources import Problem, Source, find_sources
from .store import FlowStore, Sample
from .video import Frame, VideoError, read_frames

__all__ = [
    "OPTIONS", "FlowStore", "Frame", "Problem", "Sample", "Source", "StoreError", "Summary",
    "VideoError", "decode_flow", "encode_flow", "extract", "find_sources", "flow_to_rgb",
    "flow_validity", "optical_flow", "optical_flows", "read_frames",
]  # fmt: skip
