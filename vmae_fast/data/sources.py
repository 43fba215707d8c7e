"""What videos there are: a folder, a list, or one file, each recognised by what is in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .folders import list_folder
from .listing import VIDEO_SUFFIXES, DataError, Listing, VideoFile
from .lists import read_list
from .rng import SPLIT, host_rng
from .shards import split_member
from .tars import described, is_tar, list_tars


def read_source(data: str | Path, root: str | Path | None = None) -> Listing:
    """List the videos that ``data`` names.

    Args:
        data: one of

            - a folder. Every file below it, however deep, whose suffix is in ``VIDEO_SUFFIXES``
              (any case), and every folder below it (or it itself) that holds numbered pictures and
              no video, as a video of its frames. Sorted by path relative to the folder; symbolic
              links are followed, each folder once; hidden files and folders are skipped. Where all
              lie in sub-folders, one level deep, these are the labels; ``metadata.csv`` or
              ``metadata.jsonl`` with columns ``file_name`` and ``label`` (Hugging Face's
              VideoFolder) goes before that. Of sub-folders ``train``, ``validation``, ``test``
              (and nothing else) only ``train`` is taken;
            - a folder that ``vmae-fast pack`` has written, known by its index;
            - a folder with no video but in tars (at any depth), or one tar: its members whose
              suffix is in ``VIDEO_SUFFIXES``, in the tars' order, labelled by the member ``.cls``
              of the same key or by "label" in its ``.json``, as the webdataset library has it;
            - a text list, in one of these forms, recognised by its first line:
              ``path`` or ``path,label`` or the same divided by a tab, with CSV quoting;
              ``path label`` divided by spaces (VideoMAE V1);
              ``path start total`` and ``path start total label`` (VideoMAE V2), where start is the
              number in the name of the first frame and a total of -1 is a video file's;
              ``path total label`` (frame folders of V2's fine-tuning and of MMAction).
              Blank lines, lines that start with ``#`` and a header are skipped. A path that does
              not exist is kept, and is reported as a bad file when its turn comes;
            - a single video file, or a video in a tar (``shard.tar/name.mp4``): a list of one.
              Lists may name videos in tars too.
        root: where relative paths of a list start; None is the list's own folder.

    Raises:
        DataError: there is no such file or folder, it holds no video, or a line of the list
            cannot be understood.
    """
    path = Path(data).expanduser()
    if root is not None and not Path(root).expanduser().is_dir():
        raise DataError(f"data root {str(root)!r} is not a folder; it is where lists' paths start")
    if path.is_dir():
        return list_folder(path)
    if split_member(str(path)) is not None:
        return Listing([described(VideoFile(str(path)))], "one video of a tar")
    if not path.exists():
        raise DataError(
            f"data={str(data)!r} does not exist; name a folder of videos, a text list of paths, "
            f"or a video file (current folder: {Path.cwd()})"
        )
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return Listing([VideoFile(str(path))], "one video file")
    if is_tar(path):
        listing = list_tars([path], "tar")
        if listing is None:
            raise DataError(
                f"no video in {str(path)!r}: no member that can be read ends in one of "
                f"{', '.join(suffix[1:] for suffix in VIDEO_SUFFIXES)}; look at it with tar -tf"
            )
        return listing
    listing = read_list(path, path.parent if root is None else Path(root).expanduser())
    return Listing([described(file) for file in listing.files], listing.how)


def list_videos(data: str | Path, root: str | Path | None = None) -> list[VideoFile]:
    """The files of :func:`read_source`, which raises what that does."""
    return read_source(data, root).files


def split_by_source(
    files: Sequence[VideoFile], share: float, seed: int
) -> tuple[list[int], list[int]]:
    """``split_validation``, with entries made of one video (``source``) on one side.

    Entries that do not name a source are each on their own, so that without any the split is
    that of ``split_validation(len(files), share, seed)``.

    Returns:
        ``(train, validation)``, indices into ``files``, both ascending.
    """
    groups: dict[object, list[int]] = {}
    for index, file in enumerate(files):
        groups.setdefault(index if file.source is None else file.source, []).append(index)
    members = list(groups.values())
    train, held_out = split_validation(len(members), share, seed)
    return (
        sorted(index for group in train for index in members[group]),
        sorted(index for group in held_out for index in members[group]),
    )


def split_validation(num_files: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Divide file indices into training and validation ones by a seeded permutation.

    Args:
        num_files: length of the file list, at least 1.
        share: fraction held out, in [0, 1). 0 holds out nothing; otherwise, of two files or more,
            at least one is held out and at least one stays. A single file is never held out.
        seed: chooses which.

    Returns:
        ``(train, validation)``, both ascending.

    Raises:
        ValueError: ``num_files`` or ``share`` is out of its range.
    """
    if num_files < 1:
        raise ValueError(f"num_files must be at least 1, got {num_files}")
    if not 0.0 <= share < 1.0:
        raise ValueError(f"share must be in [0, 1), got {share}")
    held_out = 0
    if share > 0.0:
        held_out = min(max(round(share * num_files), 1), num_files - 1)
    order: list[int] = host_rng(seed, stream=SPLIT).permutation(num_files).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])
