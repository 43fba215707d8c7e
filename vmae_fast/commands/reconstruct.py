"""vmae-fast reconstruct."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ._arguments import parse


@dataclass
class ReconstructArgs:
    """Reconstruct a masked clip of a video: a PNG sheet and a moving picture."""

    checkpoint: Positional[Annotated[str, arg(metavar="CHECKPOINT")]]
    """Checkpoint (ours, MCG-NJU's or OpenGVLab's .pth, Hugging Face's folder), or a run folder."""
    video: Positional[Annotated[str, arg(metavar="VIDEO")]]
    """Video file; the clip is taken from its middle."""
    out: str | None = None
    """Where to write, without suffix. None: here, under the name of the video."""
    stride: int = 4
    """Source frames from one frame of the clip to the next."""
    seed: int = 0
    """Decides the mask."""
    gif: bool = False
    """Write the moving picture as GIF, not mp4."""


def run(args: list[str]) -> int:
    """Draw what a checkpoint makes of a masked clip; the exit status."""
    from vmae_fast import VideoMAE
    from vmae_fast.data import ClipDataset, ClipRequest, DataError, DecodeError, VideoFile
    from vmae_fast.models import CheckpointError
    from vmae_fast.pictures import reconstruct, save_contact_sheet, save_video
    from vmae_fast.train.run_folder import RunFolder

    options = parse(
        ReconstructArgs,
        prog="vmae-fast reconstruct",
        description="Reconstruct a masked clip of a video: a PNG sheet and a moving picture.",
        args=args,
        examples=(
            "vmae-fast reconstruct runs/mine clip.mp4",
            "vmae-fast reconstruct MCG-NJU/videomae-base clip.mp4 --out seen --gif",
        ),
    )
    _check(options)
    checkpoint = RunFolder(Path(options.checkpoint)).latest() or options.checkpoint
    model = VideoMAE.from_pretrained(checkpoint)
    if model.decoder is None:
        raise CheckpointError(
            f"{checkpoint} has no decoder: it cannot reconstruct; give a checkpoint of pretraining"
        )
    dataset = ClipDataset(
        [VideoFile(options.video)],
        frames=model.config.frames,
        stride=options.stride,
        image_size=model.config.size,
        train=False,
        channels=model.config.in_channels,
    )
    try:
        clip = dataset.read(ClipRequest(0, 0)).crops[0].permute(3, 0, 1, 2)
    except DecodeError as error:
        raise DataError(
            f"{error}; give another video, or a folder of numbered pictures (vmae-fast check says "
            "which files of a folder can be read)"
        ) from error
    picture = reconstruct(model, clip, seed=options.seed)
    stem = options.out or f"{Path(options.video).stem}-reconstruction"
    sheet = save_contact_sheet(Path(f"{stem}.png"), [picture])
    moving = save_video(Path(f"{stem}.gif" if options.gif else f"{stem}.mp4"), picture, fps=6)
    print(f"loss {picture.loss:.4f}, predicting zeros {picture.zero_prediction:.4f}")
    print(f"wrote {sheet} and {moving}")
    return 0


def _check(options: ReconstructArgs) -> None:
    """Check what can be said without reading either.

    Raises:
        DataError: there is no video, or it was given in the checkpoint's place.
    """
    from vmae_fast.data import VIDEO_SUFFIXES, DataError
    from vmae_fast.data.shards import split_member

    if Path(options.checkpoint).suffix.lower() in VIDEO_SUFFIXES:
        raise DataError(
            f"{options.checkpoint} looks like a video: the checkpoint comes first, as in "
            f"vmae-fast reconstruct {options.video} {options.checkpoint}"
        )
    in_a_tar = split_member(options.video) is not None
    if not in_a_tar and not Path(options.video).expanduser().exists():
        raise DataError(f"no video at {options.video}; name a video file (in {Path.cwd()} now)")
