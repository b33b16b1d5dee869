"""What every test may ask for: recorded vectors, and how much chance hypothesis is given."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parent.parent
IN_CI = os.environ.get("CI") == "true"

# No deadlines: other workers share the two cores, and a slow example is no failure. CI draws the same examples
# each time, so that a red run is a change's own; a developer's machine draws new ones.
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("developer", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci" if IN_CI else "developer")


@pytest.fixture(scope="session")
def vectors() -> Path:
    """Give the directory of recorded evidence, which is kept beside the project and never in it.

    KAGIMORI_VECTORS names it. Without it a developer's test is skipped, but CI fails: a test that proves
    something about real hardware must not vanish in silence.
    """
    named = os.environ.get("KAGIMORI_VECTORS")
    directory = Path(named) if named else ROOT.parent / "shared" / "vectors"
    if not directory.is_dir():
        explanation = f"no recorded evidence at {directory}; set KAGIMORI_VECTORS to where it is"
        if IN_CI:
            pytest.fail(explanation)
        pytest.skip(explanation)
    return directory


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give one directory for the whole run, shared by all of its workers, for what is dear to make (RSA keys)."""
    base = tmp_path_factory.getbasetemp()
    # pytest-xdist gives each worker a directory of its own inside that of the run.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    directory = shared / "kagimori-cache"
    directory.mkdir(exist_ok=True)
    return directory


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """Put logging back as it was: a test that runs ``serve`` in this process points it at a stderr that closes."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()
