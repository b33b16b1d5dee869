"""What a boot leaves of its keys in all of the guest's memory, once its root runs (THREATS T17)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tests.boot.estate import BOOT_S, VM, Site
from tests.boot.images import PASSPHRASE, SECRET
from tests.boot.monitor import monitor
from tests.boot.scene import Scene, played
from tests.boot.sightings import sightings_in, unlock_key

pytestmark = [pytest.mark.boot, pytest.mark.slow]

MEMORY = 1 << 30
"""Bytes that the machine has."""
HELD = "echo scene: look now; /bin/busybox sleep 600"


def volume_key(volume: Path, to: Path) -> bytes:
    """Give the key that the volume is mapped by, as whoever has a passphrase can."""
    command = [
        "cryptsetup",
        "luksDump",
        "--batch-mode",
        "--dump-volume-key",
        "--volume-key-file",
        str(to),
        str(volume),
    ]
    subprocess.run(command, input=PASSPHRASE, check=True, capture_output=True, timeout=60)
    return to.read_bytes()


def test_once_the_root_runs_the_volume_key_alone_is_in_memory(site: Site) -> None:
    """The kernel needs that one, and root can read it. The unlock key was freed with its process, and what came next lies over it."""
    unlock, volume = (
        unlock_key(site.directory / "verifier", VM),
        volume_key(site.estate.volume, site.directory / "volume-key"),
    )
    memory = site.directory / "memory"
    with (
        monitor() as host,
        site.serving() as served,
        played(site, served.url, Scene(booted=HELD, words=host.words)) as machine,
    ):
        machine.wait_for(f"guest: root reached: {SECRET}", BOOT_S)
        machine.wait_for("scene: look now", BOOT_S)
        host.save_memory(memory, MEMORY)
    # What stays of it are the schedules of AES-256, of which each begins with its half of the key (FIPS 197, section 5.2).
    for half in (volume[:32], volume[32:]):
        assert sightings_in(half, memory), "the search can find"
    assert sightings_in(unlock, memory) == []
