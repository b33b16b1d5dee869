"""A made-up kernel, and one whose agent has opened the root's volume."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.root.sysfs import AGENT_TOML, Kernel

from kagimori_agent import opened
from kagimori_agent.config import Config, load


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Give an agent.toml with one volume."""
    path = tmp_path / "agent.toml"
    path.write_text(AGENT_TOML)
    return load(path)


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    """Give a kernel without devices."""
    (tmp_path / "root").mkdir()
    return Kernel(tmp_path / "root")


@pytest.fixture
def honest(kernel: Kernel, config: Config) -> Kernel:
    """Give the kernel of a boot whose agent has opened cryptroot on a partition of the only disk."""
    kernel.disk("vda")
    kernel.partition("vda2", "vda")
    kernel.opened("dm-0", "vda2")
    opened.begin(kernel.root)
    opened.remember(config.volumes[0], kernel.root)
    return kernel
