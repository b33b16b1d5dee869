"""How long an unlock takes in the guest, by part: the real agent, a swtpm, a simulated report door, a real verifier.

A boot is a new world each time: an unlock caps it. A real vTPM and a real AMD-SP take their own time, and a network has a
distance; what is the agent's own is measured truly.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from base64 import b64encode
from pathlib import Path
from typing import Final

from bench import serving, worlds

from kagimori_agent.luks import has_device_mapper
from kagimori_simulator import disk
from kagimori_simulator.world import VerifierAt, VolumeAt
from kagimori_simulator.world import World as Guest
from kagimori_verifier import app
from kagimori_verifier.store import vms

PARTS: Final = ("interpreter", "import", "TPM", "report", "network", "cryptsetup", "rest")
TIMEOUT_S: Final = 60


def unlock(directory: Path, rounds: int) -> dict[str, float]:
    """Boot and unlock ``rounds`` times; gives the median milliseconds of each part."""
    world = worlds.make(directory / "verifier", enrolled=1, asking=1)
    volume, public_key = _volume(directory, world)
    taken: list[dict[str, float]] = []
    with serving.served(world, [0]) as (verifier,):
        at = VerifierAt("home", [f"http://127.0.0.1:{verifier.port}"], [b64encode(public_key).decode()])
        for number in range(rounds):
            boot = worlds.boot_of(world.asking[0].vm_id)
            with Guest.running(directory / f"vm-{number}", world.machine(), boot) as guest:
                path = guest.agent_toml(world.asking[0].vm_id, [at], [volume])
                taken.append(_run(path))
    return {part: statistics.median(one.get(part, 0.0) for one in taken) * 1000 for part in PARTS}


def _volume(directory: Path, world: worlds.World) -> tuple[VolumeAt, bytes]:
    """Make a LUKS2 volume and give the verifier its key."""
    vm_id, image = world.asking[0].vm_id, directory / "disk.img"
    verifier = app.open_verifier(world.settings())
    try:
        key = verifier.unlock_keys.make()
        uuid = disk.make_volume(image, key)
        disk.seal(image, key)
        wrapped = verifier.unlock_keys.wrap(key, vm_id, uuid, 1)
        with verifier.store.write() as txn:
            vms.add_volume(txn, vms.VolumeRow(vm_id, uuid, "active", wrapped, 1, 1, "bench-root", 0))
        return VolumeAt(uuid, "bench-root", image), verifier.keys.current
    finally:
        verifier.close()


def _run(config: Path) -> dict[str, float]:
    """Run the agent once. Raises CalledProcessError if it does not unlock."""
    proved = () if has_device_mapper() else ("--prove",)
    command = [sys.executable, "-m", "bench.agent_driver", str(time.monotonic()), "unlock"]
    done = subprocess.run(
        [*command, "--config", str(config), "--json", *proved],
        capture_output=True,
        check=False,
        cwd=worlds.ROOT,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    if not proved:
        subprocess.run(["cryptsetup", "close", "bench-root"], check=True, timeout=TIMEOUT_S)
    taken: dict[str, float] = json.loads(done.stdout)
    return taken
