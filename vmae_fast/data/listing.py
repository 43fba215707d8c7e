"""What a data set is a list of, and how clips are taken from each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

VIDEO_SUFFIXES: Final = (
    *(".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts"),
    *(".wmv", ".flv", ".3gp", ".ogv", ".vob", ".gif"),
)


def ordinal(number: int) -> str:
    """A number as in "every 4th"."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10)
    return f"{number}{ending or 'th'}"


class DataError(ValueError):
    """A data set that the user named cannot be used; the message says what to do next."""


@dataclass(frozen=True)
class Sampling:
    """How clips are taken from a file.

    Attributes:
        stride: source frames from one frame of the clip to the next.
        fps: frames of the clip a second of the video, in place of the stride; None goes by stride.
        repeats: crops and masks of each decoded clip.
        weight: how often the file counts in an epoch: 2 is twice, 0.5 every second epoch.
    """

    stride: int = 4
    fps: float | None = None
    repeats: int = 1
    weight: float = 1.0


@dataclass(frozen=True)
class VideoFile:
    """One entry of a data set: a video file or a folder of frames, or a part of one.

    Attributes:
        path: where it is, as it can be opened from the current folder.
        label: its class, where the list or the folders gave one. Training does not read it.
        first: of a folder of frames the number in the name of the first one used, of a video file
            the first frame used; None starts at the beginning.
        count: frames used from there; None goes to the end.
        part: ``(k, n)``: this entry's clips start in the k-th of n equal parts of all starts.
        sampling: how its clips are taken; None leaves it to the data set.
        taken_every: frames of the video that it was made of from one frame of it to the next: 1
            but for what ``pack`` has written. A data set's own stride counts the file's frames;
            ``sampled`` makes one of the other.
        source: the video that it was made of, where that is known and another; entries of one are
            held out together.
    """

    path: str
    label: str | None = None
    first: int | None = None
    count: int | None = None
    part: tuple[int, int] = (0, 1)
    sampling: Sampling | None = field(default=None, repr=False)
    taken_every: int = 1
    source: str | None = None

    def sampled(self, sampling: Sampling) -> VideoFile:
        """This entry with a sampling whose stride counts frames of the video it was made of.

        Raises:
            DataError: a stride that is no multiple of ``taken_every``.
        """
        steps, rest = divmod(sampling.stride, self.taken_every)
        if sampling.fps is None and rest:
            raise DataError(
                f"stride={sampling.stride}: {self.path!r} was packed with every "
                f"{ordinal(self.taken_every)} frame of its video, so the stride must be a multiple "
                f"of {self.taken_every}; give --stride {self.taken_every}, or pack again with "
                f"another --stride"
            )
        return replace(self, sampling=replace(sampling, stride=max(steps, 1)))


@dataclass(frozen=True)
class Listing:
    """What was found, and how it was read.

    Attributes:
        files: the videos.
        how: a line for the log: what was recognised, where labels come from, what was left out.
    """

    files: list[VideoFile]
    how: str
