"""A whole owner and a whole VM: a real verifier over real HTTP, a real swtpm, a real report door, a real LUKS2 volume.

Fixtures that tests/exchange and tests/attacks share; their conftest.py import them.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import pytest
import uvicorn

from kagimori_agent import config as agent_config
from kagimori_agent.config import Config
from kagimori_protocol.messages import Kind
from kagimori_simulator import disk, measured_boot
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.event_log import MeasuredBoot
from kagimori_simulator.machine import SnpMachine
from kagimori_simulator.world import DOORS, VerifierAt, VolumeAt, World
from kagimori_verifier import app, ledger
from kagimori_verifier import settings as verifier_settings
from kagimori_verifier.app import Verifier
from kagimori_verifier.appraise.policy import VM_OWNED_PCRS, BootWay, Policy, TcbFloor, parse_policy
from kagimori_verifier.endorsements.directory import EndorsementDirectory
from kagimori_verifier.keystore.kek import FileKek
from kagimori_verifier.ledger import Entry
from kagimori_verifier.store import profiles, references, refusals, roots, vms
from kagimori_verifier.store.refusals import Refusal
from kagimori_verifier.verify.certificate import Certificate

CHIP_ID = bytes(range(64))
SVSM = b"\x5a" * 48
DIRECT = b"\xd1" * 48
VM = "web1"
FLOOR = TcbFloor(boot_loader=4, tee=0, snp=24, microcode=219)


@dataclass
class Owner:
    """The owner's side: a verifier with its database, and hands to change what it knows."""

    directory: Path
    root: AmdRoot
    verifier: Verifier
    url: str = ""
    clock_shift: list[float] = field(default_factory=lambda: [0.0])

    @classmethod
    @contextlib.contextmanager
    def opened(cls, directory: Path, root: AmdRoot) -> Iterator[Owner]:
        """Open the verifier in a directory that ``make_verifier`` made, with a clock that can be moved."""
        shift = [0.0]
        settings = verifier_settings.load(directory / "verifier.toml")
        verifier = app.open_verifier(settings, clock=lambda: time.time() + shift[0])
        try:
            yield cls(directory, root, verifier, clock_shift=shift)
        finally:
            verifier.close()

    @contextlib.contextmanager
    def served(self) -> Iterator[str]:
        """Serve over HTTP in a thread, on a port of the system's choice."""
        config = uvicorn.Config(
            self.verifier.application(), host="127.0.0.1", port=0, log_config=None, lifespan="off", ws="none"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        try:
            yield self.url
        finally:
            server.should_exit = True
            thread.join(10)

    @property
    def public_key(self) -> bytes:
        """The key that replies are signed by."""
        return self.verifier.keys.current

    def now_s(self) -> int:
        """Read the verifier's clock, in seconds since 1970."""
        return int(time.time() + self.clock_shift[0])

    def move_clock(self, seconds: float) -> None:
        """Let the verifier's clock jump."""
        self.clock_shift[0] += seconds

    def enrol_profile(
        self, name: str, boot_way: BootWay, kind: Kind, digest: bytes, features: Sequence[str] = ("vtpm",)
    ) -> None:
        """Add a profile with one measurement."""
        policy = Policy(boot_way=boot_way, tcb_floors={"Milan": FLOOR}, command_lines=[measured_boot.CMDLINE])
        with self.verifier.store.write() as txn:
            profiles.add(txn, profiles.ProfileRow(name, msgspec.json.encode(policy).decode(), 0))
        self.enrol_measurement(name, kind, digest, features)

    def enrol_measurement(
        self, profile: str, kind: Kind, digest: bytes, features: Sequence[str] = ("vtpm",)
    ) -> None:
        """Add a measurement to a profile; ``features`` are those of the SVSM's build, where there is one."""
        known = list(features) if kind == "svsm-vtpm" else []
        row = references.MeasurementRow(digest, profile, kind, f"build of {profile}", known, 0)
        with self.verifier.store.write() as txn:
            references.add_measurement(txn, row)

    def change_policy(self, profile: str, **changes: object) -> None:
        """Change fields of a profile's policy."""
        with self.verifier.store.write() as txn:
            row = profiles.get(txn, profile)
            assert row is not None
            policy = msgspec.structs.replace(parse_policy(row.policy), **changes)
            profiles.replace(txn, profile, msgspec.json.encode(policy).decode())

    def enrol_vm(self, vm_id: str, profile: str) -> None:
        """Add a VM that may run on the one chip."""
        with self.verifier.store.write() as txn:
            vms.add(txn, vms.VmRow(vm_id, profile, True, ["unlock", "dry-run"], [CHIP_ID.hex()], 0))

    def change_vm(self, vm_id: str, **changes: object) -> None:
        """Change fields of a VM."""
        with self.verifier.store.write() as txn:
            row = vms.get(txn, vm_id)
            assert row is not None
            vms.update(txn, replace(row, **changes))  # type: ignore[arg-type]  # fields of VmRow, by name

    def enrol_volume(self, vm_id: str, uuid: str, unlock_key: bytes) -> None:
        """Keep an unlock key."""
        wrapped = self.verifier.unlock_keys.wrap(unlock_key, vm_id, uuid, 1)
        with self.verifier.store.write() as txn:
            vms.add_volume(txn, vms.VolumeRow(vm_id, uuid, "active", wrapped, 1, 1, "cryptroot", 0))

    def accept_boot(self, vm_id: str, profile: str, boot: MeasuredBoot, boot_way: BootWay) -> None:
        """Make the PCRs of a boot reference values of the VM and its profile."""
        owned = VM_OWNED_PCRS[boot_way]
        pcrs = {str(i): {"digest": boot.pcr(i).hex(), "events": []} for i in range(15)}
        parts = {
            ("vm", vm_id): {i: pcr for i, pcr in pcrs.items() if int(i) in owned},
            ("profile", profile): {i: pcr for i, pcr in pcrs.items() if int(i) not in owned},
        }
        with self.verifier.store.write() as txn:
            for (kind, owner), values in parts.items():
                references.add_boot_state(
                    txn, references.BootStateRow(kind, owner, "accepted", values, "test", 0)
                )

    def ledger(self, session: str | None = None) -> tuple[Entry, ...]:
        """Give the ledger's lines, oldest first, having verified the chain."""
        with self.verifier.store.read() as txn:
            ledger.verify(txn)
            return ledger.read(txn, session=session)[::-1]

    def events(self, session: str | None = None) -> list[str]:
        """Name what the ledger tells of, oldest first."""
        return [entry.event for entry in self.ledger(session)]

    def refusals(self) -> tuple[Refusal, ...]:
        """Give what was refused before it was believed, newest first."""
        with self.verifier.store.read() as txn:
            return refusals.newest(txn, 50)


def make_verifier(directory: Path, root: AmdRoot) -> None:
    """Make a verifier that trusts the simulated root and knows no VM yet."""
    directory.mkdir()
    text = verifier_settings.default_text("http://127.0.0.1", "127.0.0.1:0")
    text = text.replace("per_minute_and_source = 120", "per_minute_and_source = 100000")
    text = text.replace("burst_per_source = 30", "burst_per_source = 10000")
    (directory / "verifier.toml").write_text(text, encoding="utf-8")
    settings = verifier_settings.load(directory / "verifier.toml")
    app.create(settings, FileKek(directory / "kek").create(), 0)
    kept = EndorsementDirectory(settings.path(settings.endorsements))
    for der in (root.ark_der, root.ask_der, root.asvk_der, root.crl()):
        kept.add(der)
    with Owner.opened(directory, root) as owner, owner.verifier.store.write() as txn:
        spki = Certificate.parse(root.ark_der).spki_sha256
        roots.add(txn, roots.RootRow(spki, "Milan", "simulated", 0))


@dataclass
class Enrolled:
    """One enrolled VM with its disk; ``boot`` starts it, on a machine that may lie."""

    owner: Owner
    directory: Path
    volume: VolumeAt
    unlock_key: bytes
    kind: Kind = "svsm-vtpm"

    @contextlib.contextmanager
    def booted(
        self,
        boot: MeasuredBoot | None = None,
        lie: Callable[[SnpMachine], None] | None = None,
        vm_id: str = VM,
        verifiers: Sequence[VerifierAt] = (),
        doors: Sequence[str] = DOORS[:1],
    ) -> Iterator[tuple[World, Config]]:
        """Start the VM and give its world and its agent's configuration, with ``verifiers`` or with the owner's."""
        svsm = self.kind == "svsm-vtpm"
        machine = SnpMachine(
            self.owner.root,
            chip_id=CHIP_ID,
            svsm=svsm,
            measurement=SVSM if svsm else DIRECT,
            report_version=3,
        )
        if lie is not None:
            lie(machine)
        directory = self.directory / f"vm-{time.monotonic_ns()}"
        with World.running(directory, machine, boot, doors) as world:
            path = world.agent_toml(vm_id, verifiers or [self.verifier()], [self.volume])
            yield world, agent_config.load(path)

    def verifier(self, url: str = "", name: str = "home") -> VerifierAt:
        """Name the owner's verifier as agent.toml does, at its own URL or at another that claims to be it."""
        return VerifierAt(name, [url or self.owner.url], [b64encode(self.owner.public_key).decode()])


@pytest.fixture(scope="session")
def amd(cache: Path) -> AmdRoot:
    """Give the simulated root of this run."""
    return AmdRoot.cached(cache / "amd", "Milan")


@pytest.fixture(scope="session")
def new_verifier(tmp_path_factory: pytest.TempPathFactory, amd: AmdRoot) -> Path:
    """Give the directory of a verifier fresh from ``init``, to be copied: migrations take a third of a second."""
    directory = tmp_path_factory.mktemp("new") / "verifier"
    make_verifier(directory, amd)
    return directory


@pytest.fixture
def office(tmp_path: Path, new_verifier: Path, amd: AmdRoot) -> Iterator[Owner]:
    """Give a verifier that is not on any network."""
    directory = tmp_path / "owner"
    shutil.copytree(new_verifier, directory)
    with Owner.opened(directory, amd) as owner:
        yield owner


@pytest.fixture
def owner(office: Owner) -> Iterator[Owner]:
    """Give the same verifier, serving over HTTP."""
    with office.served():
        yield office


@pytest.fixture
def volume(tmp_path: Path) -> tuple[VolumeAt, bytes]:
    """Give a LUKS2 volume whose keyslot takes an unlock key, and that key."""
    unlock_key = b"\x01an unlock key that is findable!"[:32].ljust(32, b"\xfe")
    image = tmp_path / "disk.img"
    uuid = disk.make_volume(image, unlock_key)
    disk.seal(image, unlock_key)
    return VolumeAt(uuid, "cryptroot", image), unlock_key


def enrol_grub_vm(owner: Owner, uuid: str, unlock_key: bytes) -> None:
    """Enrol the VM below an SVSM whose honest GRUB boot is accepted."""
    enrol_vm_below_svsm(owner, uuid, unlock_key, "grub", measured_boot.grub())


def enrol_vm_below_svsm(
    owner: Owner, uuid: str, unlock_key: bytes, boot_way: BootWay, boot: MeasuredBoot
) -> None:
    """Enrol the VM below an SVSM with the one boot that is accepted, in a profile named after its boot way."""
    owner.enrol_profile(boot_way, boot_way, "svsm-vtpm", SVSM)
    owner.enrol_vm(VM, boot_way)
    owner.enrol_volume(VM, uuid, unlock_key)
    owner.accept_boot(VM, boot_way, boot, boot_way)


def enrol_direct_vm(owner: Owner, uuid: str, unlock_key: bytes) -> None:
    """Enrol the VM without an SVSM: its measurement covers everything."""
    owner.enrol_profile("direct", "direct", "snp-direct", DIRECT)
    owner.enrol_vm(VM, "direct")
    owner.enrol_volume(VM, uuid, unlock_key)


@pytest.fixture
def enrolled(tmp_path: Path, owner: Owner, volume: tuple[VolumeAt, bytes]) -> Enrolled:
    """Give an enrolled VM below an SVSM whose honest GRUB boot is accepted."""
    at, unlock_key = volume
    enrol_grub_vm(owner, at.uuid, unlock_key)
    return Enrolled(owner, tmp_path, at, unlock_key)


@pytest.fixture
def enrolled_direct(tmp_path: Path, owner: Owner, volume: tuple[VolumeAt, bytes]) -> Enrolled:
    """Give an enrolled VM without an SVSM: its measurement covers everything."""
    at, unlock_key = volume
    enrol_direct_vm(owner, at.uuid, unlock_key)
    return Enrolled(owner, tmp_path, at, unlock_key, "snp-direct")
