"""The benchmarks run. What they measure is never a test: on a machine that others use, a time proves nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
NAMES = ("attestations", "stages", "enrolled", "agent")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_runs_and_prints_its_table(name: str) -> None:
    """As short as can be: every exchange in it must end in keys and a Confirm, or it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--tiny", name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n|") > 3


def test_a_name_that_no_benchmark_has_is_usage() -> None:
    """And says which there are."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", "nonsense"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "nonsense" in done.stderr
