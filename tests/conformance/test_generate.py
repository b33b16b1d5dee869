"""The vectors are what their generator writes, byte for byte, and nothing in it comes from the code that they test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conformance import generate
from tests.conformance.making.vector import Vector, read, tree

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parent.parent.parent


def differences(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> list[str]:
    """Name every file that is missing, left over, or other."""
    return [
        f"{name}: {'only stored' if name not in other else 'not stored' if name not in one else 'differs'}"
        for name in sorted(set(one) | set(other))
        if one.get(name) != other.get(name)
    ]


def test_writing_the_vectors_again_changes_nothing(tmp_path: Path) -> None:
    """In a new process, so that nothing is left from this one; each difference is named."""
    written = tmp_path / "vectors"
    command = [sys.executable, "-m", "tests.conformance.generate", str(written)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = differences(read(generate.VECTORS), read(written))
    if found:
        again = "if the change is wanted: python -m tests.conformance.generate"
        pytest.fail("\n".join([*found, again]), pytrace=False)


def test_a_difference_is_named() -> None:
    """The comparison above can fail."""
    assert differences({"a": b"1", "b": b"2"}, {"b": b"3", "c": b"4"}) == [
        "a: only stored",
        "b: differs",
        "c: not stored",
    ]


def test_writing_replaces_what_was_there(tmp_path: Path) -> None:
    """A vector that is no longer made does not stay."""
    stale = tmp_path / "vectors" / "old" / "expected.json"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"{}")
    assert generate.write(tmp_path / "vectors") == len(read(tmp_path / "vectors"))
    assert not stale.exists()


def test_two_vectors_of_one_name_are_an_error() -> None:
    """One would silently take the other's place."""
    twice = Vector("area/name", "about", {}, gives={})
    with pytest.raises(ValueError, match="area/name"):
        tree([twice, twice])


def test_the_generator_imports_nothing_of_the_project() -> None:
    """It writes what docs/protocol.md says; the code's own word would prove nothing about the code."""
    script = (
        "import sys, tests.conformance.generate as g; g.made(); "
        "print(*(name for name in sys.modules if name.startswith('kagimori')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout == "\n"
