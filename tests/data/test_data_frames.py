"""Folders of pictures: which are the frames, what they look like, and what clips are made of."""

import math

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")

from vmae_fast.data.decode import DecodeError, PathDecoder  # noqa: E402
from vmae_fast.data.frames import FrameFolderDecoder, find_frames  # noqa: E402


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names_of(folder):
    return [path.name for path in find_frames(folder)]


@pytest.mark.parametrize(
    ("names", "frames"),
    [
        (["img_00002.jpg", "img_00001.jpg"], ["img_00001.jpg", "img_00002.jpg"]),
        (["10.png", "9.png", "100.png"], ["9.png", "10.png", "100.png"]),
        (["a1b.JPG", "a2b.JPG", "a1.jpg"], ["a1b.JPG", "a2b.JPG"]),
        (["v2_f1.bmp", "v2_f2.bmp", "v3_f9.bmp"], ["v2_f1.bmp", "v2_f2.bmp"]),
        (["1.jpeg", "2.jpeg", "1.png", "2.png", "3.png"], ["1.png", "2.png", "3.png"]),
        # Of equal groups the one named like pictures.
        (["flow_x_1.jpg", "flow_x_2.jpg", "img_1.jpg", "img_2.jpg"], ["img_1.jpg", "img_2.jpg"]),
        (["b1.webp", "b2.webp", "a1.webp", "a2.webp"], ["a1.webp", "a2.webp"]),
        (["cat.jpg", "bird.jpg", "dog.PNG"], ["bird.jpg", "cat.jpg", "dog.PNG"]),
        (["a1.jpg", "b2.jpg", "c.jpg"], ["a1.jpg", "b2.jpg", "c.jpg"]),
        (["only_07.jpg"], ["only_07.jpg"]),
        (["1.txt", "clip.mp4", ".1.jpg", "sub/1.jpg", "Thumbs.db"], []),
        (["1.jpg", "2.jpg", "notes.txt", ".3.jpg", "thumb.jpg"], ["1.jpg", "2.jpg"]),
    ],
)
def test_which_pictures_are_the_frames(names, frames, tmp_path):
    touch(tmp_path, *names)
    assert names_of(tmp_path) == frames
    assert find_frames(str(tmp_path)) == find_frames(tmp_path)


def grey(value, size=(6, 8)):
    return Image.fromarray(np.full(size, value, np.uint8))


@pytest.fixture
def folder(tmp_path):
    """30 pictures numbered from 1 whose grey is their number."""
    for number in range(1, 31):
        grey(number).save(tmp_path / f"img_{number:05d}.png")
    return tmp_path


def shown(clip):
    assert (clip.frames == clip.frames[:, :1, :1, :1]).all()
    return clip.frames[:, 0, 0, 0].tolist()


def test_clips_are_sampled_as_those_of_files(folder):
    clip = FrameFolderDecoder().read_clip(str(folder), 16, 4, 0.9)
    assert shown(clip) == [1, 5, 9, 13, 17, 21, 25, 29] + [29] * 8
    assert clip.frames.shape == (16, 6, 8, 3)
    assert clip.frames.dtype == np.uint8
    assert all(math.isnan(time) for time in clip.times_s)
    assert len(clip.times_s) == 16
    clip = FrameFolderDecoder().read_clip(str(folder), 4, 3, 0.5)  # 19 starts: the tenth
    assert shown(clip) == [10, 13, 16, 19]
    assert shown(FrameFolderDecoder().read_all(str(folder))) == list(range(1, 31))


def test_parts_begin_at_the_number_in_a_name(folder):
    decoder = FrameFolderDecoder()

    def part(first, count, frames=3, stride=2, u=0.0):
        return shown(decoder.read_clip(str(folder), frames, stride, u, first=first, count=count))

    assert part(11, 10) == [11, 13, 15]
    assert part(11, 10, u=0.999) == [15, 17, 19]
    assert part(11, 3) == [11, 13, 13]
    assert part(28, 100) == [28, 30, 30]
    assert part(None, 3) == [1, 3, 3]
    assert part(27, None) == [27, 29, 29]
    assert part(0, 4) == [1, 2, 2]  # numbers 0, 2, 2: no picture has 0, the first stands in
    with pytest.raises(DecodeError, match="begins at frame 31"):
        part(31, 4)
    (folder / "img_00013.png").unlink()
    assert part(11, 10) == [11, 12, 15]
    with pytest.raises(DecodeError, match="begins at frame 13"):
        part(13, 1)


def test_positions_where_names_have_no_numbers(tmp_path):
    for value, name in enumerate(["a.png", "b.png", "c.png", "d.png"]):
        grey(value).save(tmp_path / name)
    clip = FrameFolderDecoder().read_clip(str(tmp_path), 3, 1, 0.0, first=1, count=2)
    assert shown(clip) == [1, 2, 2]


def test_only_pictures_of_the_clip_are_opened(folder):
    for number in range(1, 31):
        if number not in (10, 13, 16, 19):
            (folder / f"img_{number:05d}.png").write_text("broken")
    decoder = FrameFolderDecoder()
    assert shown(decoder.read_clip(str(folder), 4, 3, 0.5)) == [10, 13, 16, 19]
    with pytest.raises(DecodeError, match=r"cannot read img_00001\.png"):
        decoder.read_clip(str(folder), 4, 3, 0.0)
    with pytest.raises(DecodeError, match=r"cannot read img_00001\.png"):
        decoder.read_all(str(folder))


def test_damaged_picture_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    for suffix in ("png", "jpg", "webp", "bmp"):
        path = tmp_path / suffix / f"1.{suffix}"
        path.parent.mkdir()
        Image.fromarray(noise).save(path)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(DecodeError, match=rf"cannot read 1\.{suffix}"):
            FrameFolderDecoder().read_all(str(path.parent))


def test_no_clock(folder):
    with pytest.raises(DecodeError, match="no clock; use a stride"):
        FrameFolderDecoder().read_clip(str(folder), 4, 3, 0.5, fps=10)


def test_folder_errors(tmp_path):
    with pytest.raises(DecodeError, match="no picture in this folder"):
        FrameFolderDecoder().read_all(str(tmp_path))
    with pytest.raises(DecodeError, match="No such file"):
        FrameFolderDecoder().read_all(str(tmp_path / "nowhere"))
    for wrong in ({"first": -1}, {"count": 0}, {"frames": 0}):
        arguments = {"frames": 4, "stride": 2, "u": 0.5, **wrong}
        with pytest.raises(ValueError, match="must be"):
            FrameFolderDecoder().read_clip(str(tmp_path), **arguments)
    with pytest.raises(ValueError, match="channels must be"):
        FrameFolderDecoder(2)


def one(tmp_path, image, channels, **options):
    image.save(tmp_path / "1.png", **options)
    return FrameFolderDecoder(channels).read_all(str(tmp_path)).frames[0]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_modes(channels, tmp_path):
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (5, 7, 4), np.uint8)
    luma = np.rint(rgba[..., :3] @ [0.299, 0.587, 0.114])
    picture = one(tmp_path, Image.fromarray(rgba), channels).astype(int)
    assert picture.shape == (5, 7, channels)
    if channels == 1:
        assert np.abs(picture[..., 0] - luma).max() <= 1
    else:
        np.testing.assert_array_equal(picture, rgba[..., :channels])
    picture = one(tmp_path, Image.fromarray(rgba[..., :3].copy()), channels)
    if channels > 1:
        np.testing.assert_array_equal(picture[..., :3], rgba[..., :3])
    assert channels < 4 or (picture[..., 3] == 255).all()
    picture = one(tmp_path, Image.fromarray(rgba[..., 0].copy()), channels)
    np.testing.assert_array_equal(picture[..., :3], rgba[..., :1].repeat(min(channels, 3), 2))


def test_sixteen_bit_grey_is_scaled(tmp_path):
    deep = np.linspace(0, 65535, 35).round().astype(np.uint16).reshape(5, 7)
    for channels in (1, 3, 4):
        picture = one(tmp_path, Image.fromarray(deep), channels)
        assert np.abs(picture[..., 0] - deep / 257).max() <= 0.51
        assert picture.shape == (5, 7, channels)


@pytest.mark.filterwarnings("error")
def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "L").convert("P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    colours = np.array([[10, 20, 30, 0], [200, 100, 50, 255]])[[[0, 1], [1, 0]]]
    np.testing.assert_array_equal(one(tmp_path, image, 4, transparency=0), colours)
    for transparency in (0, bytes([128, 255])):
        picture = one(tmp_path, image, 3, transparency=transparency)
        np.testing.assert_array_equal(picture, colours[..., :3])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, tmp_path):
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :8] = 250  # the corner that is first in the file
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "1.jpg", exif=exif, quality=95)
    picture = FrameFolderDecoder(1).read_all(str(tmp_path)).frames[0, ..., 0]
    # By the standard: where the first row and the first column of the file belong.
    row = ["top", "top", "bottom", "bottom", "left", "right", "right", "left"][orientation - 1]
    column = ["left", "right", "right", "left", "top", "top", "bottom", "bottom"][orientation - 1]
    assert picture.shape == ((16, 32) if row in ("top", "bottom") else (32, 16))
    down = slice(None, 6) if "top" in (row, column) else slice(-6, None)
    across = slice(None, 6) if "left" in (row, column) else slice(-6, None)
    assert picture[down, across].mean() > 200
    assert picture.mean() < 100


def test_other_sizes_are_scaled_to_the_first_of_the_clip(tmp_path):
    for number, size in enumerate([(6, 8), (12, 16), (6, 8)], start=1):
        grey(50 * number, size).save(tmp_path / f"{number}.png")
    clip = FrameFolderDecoder().read_all(str(tmp_path))
    assert clip.frames.shape == (3, 6, 8, 3)
    assert shown(clip) == [50, 100, 150]


def test_path_decoder_takes_both(folder, clips):
    pytest.importorskip("av")
    video = clips.write_video(folder.parent / "video.mp4", count=20)
    for channels in (1, 3, 4):
        decoder = PathDecoder(channels)
        assert decoder.read_clip(str(folder), 4, 2, 0.0).frames.shape == (4, 6, 8, channels)
        assert decoder.read_all(str(folder)).frames.shape == (30, 6, 8, channels)
        clip = decoder.read_clip(str(video), 4, 2, 0.0, fps=6, first=4, count=8)
        assert clip.frames.shape == (4, 48, 64, channels)
        assert decoder.read_all(str(video)).frames.shape == (20, 48, 64, channels)
    with pytest.raises(DecodeError, match="No such file"):
        PathDecoder().read_all("nowhere")
    with pytest.raises(ValueError, match="channels"):
        PathDecoder(7)
