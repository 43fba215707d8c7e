"""The embedded set: what is shown, and that making it is repeatable and all or nothing."""

import dataclasses
import subprocess
import sys
import threading

import numpy as np
import pytest

from vmae_fast.data import MOTIONS, PyAVDecoder, host_rng, list_videos, synthetic_videos
from vmae_fast.data.synthetic import _Shape, render_motion

pytest.importorskip("av")


def test_files_folders_and_progress(tmp_path):
    calls = []
    folder = synthetic_videos(
        tmp_path, count=10, size=32, frames=5, progress=lambda done, of: calls.append((done, of))
    )
    assert calls == [(k, 10) for k in range(1, 11)]
    assert folder.parent == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.mp4"))
    assert names == sorted(f"{MOTIONS[k % 8]}/{k:04d}.mp4" for k in range(10))
    for file in list_videos(folder):
        frames = PyAVDecoder().read_all(file.path).frames
        assert frames.shape == (5, 32, 32, 3)


def test_made_once_and_the_same_for_the_same_arguments(tmp_path):
    first = synthetic_videos(tmp_path / "a", count=3, size=32, frames=4)
    made = (first / "left/0000.mp4").stat().st_mtime_ns
    assert synthetic_videos(tmp_path / "a", count=3, size=32, frames=4) == first
    assert (first / "left/0000.mp4").stat().st_mtime_ns == made
    second = synthetic_videos(tmp_path / "b", count=3, size=32, frames=4)
    for path in first.rglob("*.mp4"):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()


def test_every_argument_has_its_own_folder(tmp_path):
    base = {"count": 1, "size": 32, "frames": 2, "seed": 0}
    variants = [base, *({**base, name: base[name] + 2} for name in base)]
    folders = [synthetic_videos(tmp_path, **variant) for variant in variants]
    assert len(set(folders)) == 5
    contents = {(folder / "left/0000.mp4").read_bytes() for folder in folders[2:]}
    assert len(contents) == 3


def test_an_interrupted_making_leaves_nothing(tmp_path):
    def interrupt(done, _):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthetic_videos(tmp_path, count=4, size=32, frames=2, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_two_makers_at_once(tmp_path):
    together = threading.Barrier(2)
    folders = []

    def make():
        def meet(done, of):
            if done == of:
                together.wait(20)

        folders.append(synthetic_videos(tmp_path, count=3, size=32, frames=2, progress=meet))

    makers = [threading.Thread(target=make) for _ in range(2)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(30)
    assert len(folders) == 2
    assert len(set(folders)) == 1
    assert len(list(folders[0].rglob("*.mp4"))) == 3
    assert [path.name for path in tmp_path.iterdir()] == [folders[0].name]


def test_default_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("VMAE_FAST_CACHE", str(tmp_path / "own"))
    small = {"count": 1, "size": 16, "frames": 1}
    assert synthetic_videos(**small).parent == tmp_path / "own"
    monkeypatch.delenv("VMAE_FAST_CACHE")
    assert synthetic_videos(**small).parent == tmp_path / "xdg/vmae-fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert synthetic_videos(**small).parent == tmp_path / "home/.cache/vmae-fast"


@pytest.mark.parametrize("wrong", [{"count": 0}, {"size": 33}, {"size": 14}, {"frames": 0}])
def test_errors(wrong, tmp_path):
    with pytest.raises(ValueError, match="must be at least 1 and size even"):
        synthetic_videos(tmp_path, **wrong)


def covers(motion, kind=None):
    """The pixels that a few shapes cover, ``(20, 192, 192)``, in the middle of a large frame."""
    found = []
    for clip in range(40):
        shape = _Shape.draw(motion, host_rng(0, stream=9, clip=clip), 96)
        if kind is None or shape.kind == kind:
            middle = dataclasses.replace(shape, x=96, y=96)
            found.append(middle.render(motion, 192, 20)[0].astype(np.float64))
    assert len(found) >= 3
    return found


@pytest.mark.parametrize(
    ("motion", "right", "down"),
    [("left", -1, 0), ("right", 1, 0), ("up", 0, -1), ("down", 0, 1)],
)
def test_shapes_travel(motion, right, down):
    y, x = np.mgrid[:192, :192]
    for cover in covers(motion):
        area = cover.sum((1, 2))
        across = np.diff((cover * x).sum((1, 2)) / area)
        along = np.diff((cover * y).sum((1, 2)) / area)
        speed = across * right + along * down
        assert speed.min() > 1.3 * 96 / 72 - 0.1
        assert abs(across * down + along * right).max() < 0.1
        np.testing.assert_allclose(area, area.mean(), rtol=0.02)


@pytest.mark.parametrize(("motion", "sign"), [("clockwise", 1), ("counterclockwise", -1)])
def test_bars_turn(motion, sign):
    y, x = np.mgrid[:192, :192]
    for cover in covers(motion, kind="bar"):
        area = cover.sum((1, 2), keepdims=True)
        dx = x - (cover * x).sum((1, 2), keepdims=True) / area
        dy = y - (cover * y).sum((1, 2), keepdims=True) / area
        moments = [(cover * product).sum((1, 2)) for product in (dx * dx, dx * dy, dy * dy)]
        # Direction of the long axis; y grows downwards, so a growing angle is clockwise.
        angle = 0.5 * np.unwrap(np.arctan2(2 * moments[1], moments[0] - moments[2]))
        assert (sign * np.diff(angle)).min() > np.radians(3)


@pytest.mark.parametrize(("motion", "sign"), [("grow", 1), ("shrink", -1)])
def test_shapes_change_size(motion, sign):
    for cover in covers(motion, kind="disc"):
        area = cover.sum((1, 2))
        assert (sign * np.diff(area)).min() > 0
        ratio = (area.max() / area.min()) ** 0.5
        assert 2.3 < ratio < 4.2


def test_backgrounds_are_smooth():
    """Neighbouring pixels differ little except at shapes: what makes the set learnable."""
    steps = []
    for clip in range(16):
        video = render_motion(
            MOTIONS[clip % 8], host_rng(0, stream=9, clip=clip), size=72, frames=2
        )
        steps.append(np.abs(np.diff(video.astype(int), axis=2)).max(-1).ravel())
    share_of_steep = np.mean(np.concatenate(steps) > 8)
    assert share_of_steep < 0.1


def test_colours_survive_encoding(tmp_path):
    folder = synthetic_videos(tmp_path, count=2, size=72, frames=8)
    for number, motion in enumerate(MOTIONS[:2]):
        drawn = render_motion(motion, host_rng(0, stream=6, clip=number), size=72, frames=8)
        shown = PyAVDecoder().read_all(str(folder / motion / f"{number:04d}.mp4")).frames
        assert np.abs(drawn.astype(int) - shown).mean() < 4


def test_two_processes_make_the_same_bytes(tmp_path):
    script = (
        "import sys; from pathlib import Path; from vmae_fast.data import synthetic_videos; "
        "synthetic_videos(Path(sys.argv[1]), count=24)"
    )
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-c", script, str(tmp_path / name)], check=True)
    made = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in paths}
        for name in ("a", "b")
        if (paths := sorted((tmp_path / name).rglob("*.mp4")))
    ]
    assert len(made[0]) == 24
    assert made[0] == made[1]
