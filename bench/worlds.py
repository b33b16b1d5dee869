"""A verifier directory for measuring: real keys, real reference values, as many VMs enrolled as are asked for.

Some VMs are *asking*: each has a boot, an event log and reference values of its own. The others fill the tables between
them; their rows are the same in size and kind, made by SQL from a row that the product wrote, as no command line
enrols 100,000 VMs in a benchmark's time.
"""

from __future__ import annotations

import random
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from bench.guest import Vm

from kagimori_protocol.messages import Kind
from kagimori_simulator import measured_boot
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.event_log import MeasuredBoot
from kagimori_simulator.machine import SnpMachine
from kagimori_simulator.measured_boot import GrubLoader
from kagimori_verifier import app
from kagimori_verifier import settings as verifier_settings
from kagimori_verifier.appraise.policy import VM_OWNED_PCRS, BootWay, Policy, TcbFloor
from kagimori_verifier.endorsements.directory import EndorsementDirectory
from kagimori_verifier.keystore.kek import FileKek
from kagimori_verifier.keystore.unlock_keys import UnlockKeys
from kagimori_verifier.store import Store, Txn, profiles, references, roots, vms
from kagimori_verifier.verify.certificate import Certificate

CHIP_ID: Final = bytes(range(64))
SVSM: Final = b"\x5a" * 48
FLOOR: Final = TcbFloor(boot_loader=4, tee=0, snp=24, microcode=219)
GRUB_COMMANDS: Final = 100
"""Commands that GRUB logs; with them a log has 142 events and 34 kB, as that of an Ubuntu 24.04 has."""
ROOT: Final = Path(__file__).parent.parent
CACHE: Final = ROOT / ".dev" / "bench"
ASKING: Final = "asking.msgpack"
SEED: Final = 7
_WORDS: Final = [
    "set",
    "default",
    "menuentry_id_option",
    "linux",
    "initrd",
    "insmod",
    "part_gpt",
    "search",
    "fs-uuid",
    "root",
]


@dataclass(frozen=True)
class World:
    """A verifier's directory, and the VMs that will ask it."""

    directory: Path
    kind: Kind
    root: AmdRoot
    asking: tuple[Vm, ...]

    @classmethod
    def load(cls, directory: Path) -> World:
        """Read back what ``make`` has written for the load generator."""
        kind, asking = msgspec.msgpack.decode(
            (directory / ASKING).read_bytes(), type=tuple[Kind, tuple[Vm, ...]]
        )
        return cls(directory, kind, amd_root(), asking)

    def machine(self) -> SnpMachine:
        """Give a machine with the chip that every VM may run on."""
        return SnpMachine(self.root, chip_id=CHIP_ID, svsm=self.kind == "svsm-vtpm", measurement=SVSM)

    def on(self, machine: SnpMachine, vm: Vm) -> SnpMachine:
        """Put a VM on a machine: without an SVSM its measurement is its own."""
        if self.kind == "snp-direct":
            machine.measurement = measurement(vm.vm_id)
        return machine

    def settings(self, name: str = "verifier.toml") -> verifier_settings.Settings:
        """Read the verifier's settings."""
        return verifier_settings.load(self.directory / name)


def measurement(vm_id: str) -> bytes:
    """Give the MEASUREMENT of a VM without an SVSM: its image is its own."""
    return vm_id.encode().ljust(48, b"\x01")


def amd_root() -> AmdRoot:
    """Give the simulated root of all benchmarks; making it takes seconds, once."""
    return AmdRoot.cached(CACHE / "amd", "Milan")


def boot_of(vm_id: str) -> MeasuredBoot:
    """Give the boot of one VM: a log as long as real ones are, that ends in a command line of its own."""
    chance = random.Random(SEED)
    commands = tuple(" ".join(chance.choices(_WORDS, k=6)) for _ in range(GRUB_COMMANDS))
    return measured_boot.grub(
        loader=GrubLoader(commands=commands),
        initramfs=f"initramfs of {vm_id}".encode(),
        cmdline=f"{measured_boot.CMDLINE} of={vm_id}",
    )


def make(directory: Path, *, kind: Kind = "svsm-vtpm", enrolled: int, asking: int) -> World:
    """Make a verifier that knows ``enrolled`` VMs, ``asking`` of which will ask, spread among the others."""
    directory.mkdir(parents=True)
    root = amd_root()
    chance = random.Random(SEED)
    ids = [f"vm{number:06d}" for number in sorted(chance.sample(range(enrolled), min(asking, enrolled)))]
    world = World(
        directory,
        kind,
        root,
        tuple(
            Vm.booting(vm_id, _uuid(vm_id), boot_of(vm_id) if kind == "svsm-vtpm" else None) for vm_id in ids
        ),
    )
    (directory / ASKING).write_bytes(msgspec.msgpack.encode((kind, world.asking)))
    for name in ("verifier.toml", "second.toml"):
        (directory / name).write_text(_settings_text(), encoding="utf-8")
    settings = world.settings()
    kek = FileKek(settings.path(settings.kek.path)).create()
    app.create(settings, kek, 0)
    kept = EndorsementDirectory(settings.path(settings.endorsements))
    for der in (root.ark_der, root.ask_der, root.asvk_der, root.crl()):
        kept.add(der)
    store = Store.open(settings.database_url)
    try:
        with store.write() as txn:
            pin = Certificate.parse(root.ark_der).spki_sha256
            roots.add(txn, roots.RootRow(pin, root.product, "simulated", 0))
            _enrol(txn, world, UnlockKeys(kek))
    finally:
        store.close()
    if kind == "svsm-vtpm":
        _fill(directory / "verifier.db", ids[0], enrolled)
    return world


def _settings_text() -> str:
    """Let one address ask as often as it can: here it stands for many."""
    text = verifier_settings.default_text("http://127.0.0.1", "127.0.0.1:0")
    text = text.replace("per_minute_and_source = 120", "per_minute_and_source = 1000000")
    return text.replace("burst_per_source = 30", "burst_per_source = 10000")


def _uuid(vm_id: str) -> str:
    return f"00000000-0000-4000-8000-000000{vm_id.removeprefix('vm')}"


def _enrol(txn: Txn, world: World, unlock_keys: UnlockKeys) -> None:
    """Enrol the VMs that will ask."""
    svsm = world.kind == "svsm-vtpm"
    boot_way: BootWay = "grub" if svsm else "direct"
    policy = msgspec.json.encode(Policy(boot_way=boot_way, tcb_floors={"Milan": FLOOR})).decode()
    owned = VM_OWNED_PCRS["grub"]
    for number, vm in enumerate(world.asking):
        profile = "bench" if svsm else f"bench-{vm.vm_id}"
        if number == 0 or not svsm:
            profiles.add(txn, profiles.ProfileRow(profile, policy, 0))
            digest, features = (SVSM, ["vtpm"]) if svsm else (measurement(vm.vm_id), [])
            row = references.MeasurementRow(digest, profile, world.kind, "build", features, 0)
            references.add_measurement(txn, row)
        row_of_vm = vms.VmRow(
            vm_id=vm.vm_id,
            profile=profile,
            enabled=True,
            purposes=["unlock", "dry-run"],
            chips=[CHIP_ID.hex()],
            created=0,
        )
        vms.add(txn, row_of_vm)
        wrapped = unlock_keys.wrap(unlock_keys.make(), vm.vm_id, vm.uuid, 1)
        vms.add_volume(txn, vms.VolumeRow(vm.vm_id, vm.uuid, "active", wrapped, 1, 0, "cryptroot", 0))
        if not svsm:
            continue
        events = boot_of(vm.vm_id).events
        pcrs = {
            str(index): {
                "digest": digest.hex(),
                "events": [
                    [e.digest("sha256").hex(), "event"] for e in events if e.pcr == index and e.extends
                ],
            }
            for index, digest in vm.pcrs.items()
        }
        own = {index: pcr for index, pcr in pcrs.items() if int(index) in owned}
        shared = {index: pcr for index, pcr in pcrs.items() if int(index) not in owned | {15}}
        references.add_boot_state(txn, references.BootStateRow("vm", vm.vm_id, "accepted", own, "bench", 0))
        if number == 0:
            state = references.BootStateRow("profile", profile, "accepted", shared, "bench", 0)
            references.add_boot_state(txn, state)


_NUMBERS: Final = """
WITH RECURSIVE numbers(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM numbers WHERE i + 1 < :enrolled),
fresh(name) AS (SELECT printf('vm%06d', i) FROM numbers WHERE printf('vm%06d', i) NOT IN (SELECT vm_id FROM volume))
"""
_FILLED: Final = (
    """INSERT INTO boot_state (owner_kind, owner, label, pcrs, source, created)
    SELECT owner_kind, fresh.name, label, pcrs, source, created FROM fresh, boot_state AS row
    WHERE row.owner_kind = 'vm' AND row.owner = :like""",
    """INSERT INTO vm (vm_id, profile, enabled, purposes, chips, created)
    SELECT fresh.name, profile, enabled, purposes, chips, created FROM fresh, vm AS row WHERE row.vm_id = :like""",
    """INSERT INTO volume (vm_id, uuid, state, wrapped, version, header_epoch, label, created)
    SELECT fresh.name, '00000000-0000-4000-8000-000000' || substr(fresh.name, 3), state, wrapped, version,
    header_epoch, label, created FROM fresh, volume AS row WHERE row.vm_id = :like""",
)


def _fill(database: Path, like: str, enrolled: int) -> None:
    """Enrol all other VMs, with rows like those of the VM ``like``."""
    connection = sqlite3.connect(database)
    try:
        with connection:
            for statement in _FILLED:
                connection.execute(_NUMBERS + statement, {"enrolled": enrolled, "like": like})
    finally:
        connection.close()
