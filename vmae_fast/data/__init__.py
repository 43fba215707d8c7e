"""Videos in, uint8 clips out: listing, decoding, sampling, augmentation, batching.

The usual path is ``list_videos`` -> ``ClipDataset`` -> ``ClipSampler`` -> ``make_loader``.
Importing this needs torch and numpy; PyAV (``av``) is imported when a file is opened.
"""

from .augment import center_crop_box, crop_resize, multi_scale_crop_box
from .dataset import (
    BadFile,
    ClipBatch,
    ClipDataset,
    ClipItem,
    ClipRequest,
    ClipSampler,
    collate_clips,
    make_loader,
)
from .decode import DecodeError, Decoder, PyAVDecoder
from .rng import host_rng
from .sampling import CENTER_START, clip_indices, clip_span
from .sources import (
    VIDEO_SUFFIXES,
    DataError,
    Listing,
    Sampling,
    VideoFile,
    list_videos,
    read_source,
    split_validation,
)
from .synthetic import MOTIONS, render_motion, synthetic_videos

__all__ = [
    "CENTER_START",
    "MOTIONS",
    "VIDEO_SUFFIXES",
    "BadFile",
    "ClipBatch",
    "ClipDataset",
    "ClipItem",
    "ClipRequest",
    "ClipSampler",
    "DataError",
    "DecodeError",
    "Decoder",
    "Listing",
    "PyAVDecoder",
    "Sampling",
    "VideoFile",
    "center_crop_box",
    "clip_indices",
    "clip_span",
    "collate_clips",
    "crop_resize",
    "host_rng",
    "list_videos",
    "make_loader",
    "multi_scale_crop_box",
    "read_source",
    "render_motion",
    "split_validation",
    "synthetic_videos",
]
