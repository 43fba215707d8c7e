"""A reader never sees half a file, nor loses the earlier one."""

import os
import shutil
from pathlib import Path

import pytest

from vmae_fast._files import atomic_file, atomic_folder, write_errors


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def write_half(target, error):
    """Write something to a file or folder that is not finished, and fail."""
    with target as temporary:
        (temporary / "half" if temporary.is_dir() else temporary).write_text("half")
        raise error


def test_file_appears_whole_with_usual_permissions(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with atomic_file(path) as temporary:
        assert temporary.parent == path.parent
        temporary.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with atomic_file(path) as temporary:
        temporary.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert names(path.parent) == ["file.txt"]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_umask_is_respected_and_restored(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "file") as temporary:
            temporary.write_text("x")
        with atomic_folder(tmp_path / "folder") as temporary:
            (temporary / "x").touch()
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_the_earlier_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("earlier")
    with pytest.raises(type(error)):
        write_half(atomic_file(path), error)
    assert path.read_text() == "earlier"
    assert names(tmp_path) == ["file"]


def test_folder_replaces_the_earlier_one_whole(tmp_path):
    path = tmp_path / "run"
    for number in (1, 2):
        with atomic_folder(path) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / f"{number}.txt").write_text("x")
        assert names(path / "sub") == [f"{number}.txt"]
    assert names(tmp_path) == ["run"]


def test_an_error_leaves_the_earlier_folder(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "kept").write_text("earlier")
    with pytest.raises(OSError, match="full"):
        write_half(atomic_folder(path), OSError("disk full"))
    assert names(path) == ["kept"]
    assert names(tmp_path) == ["run"]


def test_a_folder_whose_rename_fails_is_as_before(tmp_path, monkeypatch):
    path = tmp_path / "run"
    path.mkdir()
    (path / "kept").write_text("earlier")
    real = Path.replace

    def fail_on_the_new_one(self, target):
        if self.name.endswith(".tmp"):
            raise OSError("rename refused")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", fail_on_the_new_one)
    with pytest.raises(OSError, match="refused"), atomic_folder(path) as temporary:
        (temporary / "new").write_text("x")
    assert path.exists()
    assert names(path) == ["kept"]
    assert names(tmp_path) == ["run"]


def test_a_full_disk_is_said_though_the_writer_does_not(tmp_path, monkeypatch):
    """As torch's does: "unexpected pos 64 vs 0"."""
    usage = shutil.disk_usage(tmp_path)
    for free, said in ((1000, "No space left on device"), (10**9, "unexpected pos 64 vs 0")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        with (
            pytest.raises(OSError, match=rf"could not write .*file: {said}"),
            write_errors(tmp_path / "file"),
        ):
            raise RuntimeError("unexpected pos 64 vs 0")
