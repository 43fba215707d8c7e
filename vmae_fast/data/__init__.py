"""Videos in, uint8 clips out: listing, decoding, sampling, augmentation, batching.

The usual path is ``list_videos`` -> ``ClipDataset`` -> ``ClipSampler`` -> ``make_loader``.
Importing this needs torch and numpy; PyAV (``av``) is imported when a file is opened.
"""

from .augment import center_crop_box, crop_resize, multi_scale_crop_box
from .clip import Clip, DecodeError, Decoder
from .dataset import (
    CHANNELS,
    BadFile,
    ClipBatch,
    ClipDataset,
    ClipItem,
    collate_clips,
)
from .decode import PathDecoder, PyAVDecoder, make_decoder
from .listing import VIDEO_SUFFIXES, DataError, Listing, Sampling, VideoFile
from .loader import ClipLoader, LoadingWork, WorkersEnded, lost_files, make_loader
from .order import ClipRequest, ClipSampler, EpochOrder
from .parts import clips_by_duration, parts_of
from .rng import host_rng
from .sampling import CENTER_START, clip_indices, clip_span
from .sources import list_videos, read_source, split_by_source, split_validation
from .synthetic import MOTIONS, render_motion, synthetic_videos

__all__ = [
    "CENTER_START",
    "CHANNELS",
    "MOTIONS",
    "VIDEO_SUFFIXES",
    "BadFile",
    "Clip",
    "ClipBatch",
    "ClipDataset",
    "ClipItem",
    "ClipLoader",
    "ClipRequest",
    "ClipSampler",
    "DataError",
    "DecodeError",
    "Decoder",
    "EpochOrder",
    "Listing",
    "LoadingWork",
    "PathDecoder",
    "PyAVDecoder",
    "Sampling",
    "VideoFile",
    "WorkersEnded",
    "center_crop_box",
    "clip_indices",
    "clip_span",
    "clips_by_duration",
    "collate_clips",
    "crop_resize",
    "host_rng",
    "list_videos",
    "lost_files",
    "make_decoder",
    "make_loader",
    "multi_scale_crop_box",
    "parts_of",
    "read_source",
    "render_motion",
    "split_by_source",
    "split_validation",
    "synthetic_videos",
]
