"""What packed segments hold: exactly which frames, in which colours."""

import numpy as np
import pytest

from vmae_fast.data import PathDecoder, VideoFile, read_source
from vmae_fast.data.pack import pack
from vmae_fast.data.segments import PackSettings, cut


@pytest.mark.parametrize(("first", "count"), [(None, None), (5, 101)])
def test_segments_hold_the_frames_that_the_index_says(first, count, clips, tmp_path):
    path = clips.write_video(tmp_path / "ü b.mp4", count=200, gop=250, b_frames=2)
    file = VideoFile(str(path), "up", first, count)
    pack([file], tmp_path / "out", stride=3, segment_frames=16, overlap=4, crf=4)
    begin, end = first or 0, 200 if count is None else first + count
    wanted = list(range(begin, end, 3))
    seen = set()
    for k, packed in enumerate(read_source(tmp_path / "out").files):
        clip = PathDecoder().read_all(packed.path)
        start = 12 * k
        numbers = clips.read_numbers(clip.frames)
        assert numbers == wanted[start : start + len(numbers)]
        straight = clips.straight_decode(path)[numbers].astype(int)
        assert np.abs(straight - clip.frames).mean() < 6
        assert (packed.label, packed.taken_every, packed.source) == ("up", 3, str(path))
        # Every window of 5 frames lies in one segment whole.
        seen |= {numbers[n] for n in range(len(numbers) - 4)}
    assert seen == set(wanted[:-4])


@pytest.mark.parametrize("length", [1, 20, 21, 25, 26, 27, 60])
def test_no_window_is_lost_and_no_tail_is_short(length):
    settings = PackSettings(segment_frames=16, overlap=4)
    parts = list(cut(range(length), settings))
    windows = {tuple(f[k : k + 5]) for _, f in parts for k in range(len(f) - 4)}
    assert windows == {tuple(range(k, k + 5)) for k in range(length - 4)}
    assert all(frames[0] == start for start, frames in parts)
    assert all(len(f) >= 4 + settings.least_new for _, f in parts[1:])
