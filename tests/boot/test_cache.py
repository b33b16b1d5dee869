"""The cache of images: what was built from the same content is not built again, and nothing half-built is ever given."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.boot import cache as caches
from tests.boot.cache import Cache, digest


def _builder(built: list[str], word: str) -> Callable[[Path], None]:
    def build(to: Path) -> None:
        built.append(word)
        (to / "word").write_text(word)

    return build


def test_what_is_made_from_the_same_content_is_made_once(tmp_path: Path) -> None:
    """Files count by name, mode and content, wherever they lie; what Python compiled for itself does not."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("a")
    cache, built = Cache(tmp_path / "cache"), list[str]()
    first = cache.get("layer", ["text", source], _builder(built, "1"))
    (source / "__pycache__").mkdir()
    (source / "__pycache__/file.pyc").write_text("b")
    assert cache.get("layer", ["text", source.rename(tmp_path / "moved")], _builder(built, "2")) == first
    (tmp_path / "moved/file").write_text("b")
    assert cache.get("layer", ["text", tmp_path / "moved"], _builder(built, "3")) != first
    assert built == ["1", "3"]
    assert (first / "word").read_text() == "1"


def test_a_build_that_failed_is_tried_again(tmp_path: Path) -> None:
    """A full disk or a lost mirror must not leave half an image behind that looks whole."""
    cache = Cache(tmp_path)

    def fail(to: Path) -> None:
        (to / "half").write_text("")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        cache.get("layer", ["x"], fail)
    assert [path.name for path in cache.get("layer", ["x"], _builder([], "whole")).iterdir()] == ["word"]


def test_nothing_is_removed_while_something_is_mounted_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build that was killed may leave this machine's own /proc, /sys and /dev there: removing would go through them."""
    half = tmp_path / "cache/unfinished-layer"
    inside = half / "root/dev of it"
    inside.mkdir(parents=True)
    (inside / "null").write_text("this machine's")
    point = str(inside).replace(" ", "\\040")
    listed = tmp_path / "mountinfo"
    listed.write_text(f"24 1 0:6 / / rw - ext4 /dev/vda rw\n25 24 0:6 / {point} rw - devtmpfs dev rw\n")
    monkeypatch.setattr(caches, "MOUNTS", listed)
    cache = Cache(tmp_path / "cache")
    with pytest.raises(AssertionError, match=r"mounted below .*unfinished-layer.*umount"):
        cache.get("layer", ["x"], _builder([], "whole"))
    assert (inside / "null").read_text() == "this machine's"
    listed.write_text("24 1 0:6 / / rw - ext4 /dev/vda rw\n")
    assert cache.get("layer", ["x"], _builder([], "whole")).is_dir()


def test_only_the_last_few_of_a_layer_stay(tmp_path: Path) -> None:
    """Every change of a source makes new images, and disks are finite; what was just asked for stays."""
    cache = Cache(tmp_path)
    paths = [cache.get("layer", [number], _builder([], "x")) for number in range(3)]
    for age, path in enumerate(paths):
        os.utime(path, (1000 - age, 1000 - age))
    other = cache.get("other", [0], _builder([], "x"))
    newest = cache.get("layer", [3], _builder([], "x"))
    assert [path.exists() for path in (*paths, newest, other)] == [True, True, False, True, True]


def test_no_two_lists_of_inputs_are_taken_for_each_other() -> None:
    """Inputs are told apart by their lengths."""
    assert digest(["ab", "c"]) != digest(["a", "bc"])
    assert digest([]) != digest([""])
