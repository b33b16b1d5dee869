"""The targets by name; one is imported when it is asked for, so that the engine can instrument what it imports."""

from __future__ import annotations

import importlib
from typing import Final

from tests.fuzz.target import Target

NAMES: Final = ("report", "certificates", "x509", "tpm", "eventlog", "messages", "luks")


def load(name: str) -> Target:
    """Import a target."""
    target = importlib.import_module(f"tests.fuzz.targets.{name}").TARGET
    assert isinstance(target, Target)
    return target
