"""The record of what the agent loads is what it loads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kagimori_agent import footprint_libraries, footprint_modules, footprint_record
from kagimori_agent.footprint_needs import PARTS
from kagimori_simulator import footprint_recorder
from kagimori_simulator.footprint_recorder import Loaded

SIMULATED_ONLY = ("libtss2-tcti-swtpm.so.",)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    """Exercise the agent once."""
    return footprint_recorder.record()


@pytest.mark.slow
def test_the_record_is_what_a_new_recording_gives(loaded: Loaded) -> None:
    """Who adds an import, or a dependency that does, records again: python -m kagimori_simulator.footprint_recorder."""
    kept = json.loads(footprint_record.PATH.read_text(encoding="utf-8"))
    again = footprint_recorder.as_record(loaded, kept)
    assert again["packages"] == kept["packages"]
    assert again["data"] == kept["data"]
    this = footprint_record.this_python()
    assert set(again["stdlib"][this]) - set(kept["stdlib"].get(this, [])) == set()


@pytest.mark.slow
def test_every_library_that_was_in_memory_is_carried(loaded: Loaded) -> None:
    """Also those that a library opened by itself, but for the door to a TPM that is no hardware."""
    record = footprint_record.load()
    modules = footprint_modules.files([*footprint_modules.own(), *record.packages, *record.stdlib])
    python = Path(sys.executable).resolve()
    opened = footprint_libraries.opened({name: why for part in PARTS for name, why in part.libraries}, python)
    carried = [python, *(path.resolve() for path in (*modules.values(), *opened))]
    carried += [path.resolve() for path in footprint_libraries.linked(carried)]
    missing = {path for path in loaded.mapped if path.resolve() not in set(carried)}
    assert {path for path in missing if not path.name.startswith(SIMULATED_ONLY)} == set()
    assert Path(opened[0]).name == "libtss2-tcti-device.so.0"
