"""After a whole run with real processes the unlock key is nowhere but where it belongs (THREATS T17).

Looked at: arguments and environment of every process while it runs, what the processes printed, every file in their
directories, the database with its log, the ledger. And the search itself is shown to find what is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sqlalchemy import select
from tests.worlds import Enrolled, Owner, enrol_grub_vm

from kagimori_simulator import disk
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.world import VolumeAt
from kagimori_verifier.keystore.kek import FileKek
from kagimori_verifier.store import schema

SLOW_KEYSLOT = "300000"
"""Iterations that keep cryptsetup busy long enough to be looked at."""
UNLOCK_S = 60


def forms(secret: bytes) -> dict[str, bytes]:
    """Give the forms that a secret takes when somebody writes it down."""
    found = {
        "raw": secret,
        "hex": secret.hex().encode(),
        "upper hex": secret.hex().upper().encode(),
        "bytes of Python": repr(secret)[2:-1].encode(),
        "list of numbers": json.dumps(list(secret))[1:-1].encode(),
        "JSON of numbers": json.dumps(list(secret), separators=(",", ":"))[1:-1].encode(),
    }
    for before in range(3):  # where it stands in something longer decides how its bits fall into letters
        shifted = bytes(before) + secret
        whole = slice((before * 8 + 5) // 6, len(shifted) * 8 // 6)
        found[f"base64 after {before}"] = b64encode(shifted)[whole]
        found[f"urlsafe base64 after {before}"] = urlsafe_b64encode(shifted)[whole]
    return found


def sightings(secret: bytes, where: str, content: bytes) -> list[str]:
    """Tell in which forms a secret stands in some bytes."""
    return [f"{form} in {where}" for form, pattern in forms(secret).items() if pattern in content]


def search_files(secret: bytes, directory: Path) -> list[str]:
    """Look into every file below a directory."""
    return [
        sighting
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        for sighting in sightings(secret, str(path.relative_to(directory)), path.read_bytes())
    ]


@dataclass
class Watch:
    """Looks at arguments and environment of every process, again and again, until it is told to stop."""

    seen: dict[str, set[bytes]] = field(default_factory=lambda: {"cmdline": set(), "environ": set()})
    _end: threading.Event = field(default_factory=threading.Event)

    @classmethod
    @contextlib.contextmanager
    def watching(cls) -> Iterator[Watch]:
        watch = cls()
        thread = threading.Thread(target=watch._run)
        thread.start()
        try:
            yield watch
        finally:
            watch._end.set()
            thread.join(10)

    def sightings(self, secret: bytes) -> list[str]:
        return [
            sighting
            for where, contents in self.seen.items()
            for content in contents
            for sighting in sightings(secret, where, content)
        ]

    def saw(self, program: bytes) -> bool:
        return any(content.split(b"\x00")[0].endswith(program) for content in self.seen["cmdline"])

    def _run(self) -> None:
        while not self._end.wait(0.02):
            for process in Path("/proc").iterdir():
                if process.name.isdigit():
                    for where, contents in self.seen.items():
                        with contextlib.suppress(OSError):  # it has ended
                            contents.add((process / where).read_bytes())


@dataclass
class Aftermath:
    """What was left of one run: where to look, what was watched, what the agent said."""

    directory: Path
    owner: Path
    unlock_key: bytes
    watch: Watch
    agent: dict[str, object]
    while_running: list[str]
    files_while_running: set[str]


def _slow_volume(path: Path, key: bytes) -> VolumeAt:
    """Make a volume whose keyslot takes a second to open."""
    with path.open("wb") as file:
        file.truncate(20 << 20)
    command = ["cryptsetup", "luksFormat", "--batch-mode", "--type", "luks2", "--pbkdf", "pbkdf2"]
    command += ["--pbkdf-force-iterations", SLOW_KEYSLOT, "--key-file", "-", str(path)]
    subprocess.run(command, input=key, check=True, timeout=UNLOCK_S)
    uuid = subprocess.run(["cryptsetup", "luksUUID", path], capture_output=True, check=True).stdout.decode()
    disk.seal(path, key)
    return VolumeAt(uuid.strip(), "cryptroot", path)


@contextlib.contextmanager
def _verifier_process(directory: Path) -> Iterator[str]:
    """Run the verifier as an operator does; yields its URL."""
    command = [
        sys.executable,
        "-m",
        "kagimori_verifier",
        "--json",
        "--config",
        str(directory / "verifier.toml"),
    ]
    with (directory / "stderr").open("wb") as stderr:
        process = subprocess.Popen([*command, "serve"], stdout=subprocess.PIPE, stderr=stderr)
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            yield json.loads(first)["url"]
        finally:
            process.terminate()
            rest, _ = process.communicate(timeout=20)
            (directory / "stdout").write_bytes(first + rest)
    assert process.returncode == 0


@pytest.fixture(scope="module")
def aftermath(tmp_path_factory: pytest.TempPathFactory, new_verifier: Path, amd: AmdRoot) -> Aftermath:
    """Unlock once: verifier, agent, cryptsetup and swtpm are processes, and all are watched."""
    directory = tmp_path_factory.mktemp("secrets")
    owner_directory = directory / "owner"
    shutil.copytree(new_verifier, owner_directory)
    key = secrets.token_bytes(32)
    volume = _slow_volume(directory / "disk.img", key)
    with Owner.opened(owner_directory, amd) as owner:
        enrol_grub_vm(owner, volume.uuid, key)
        enrolled = Enrolled(owner, directory, volume, key)
    with (
        Watch.watching() as watch,
        _verifier_process(owner_directory) as url,
        enrolled.booted(verifiers=[enrolled.verifier(url)]) as (world, _),
    ):
        config = str(world.directory / "agent.toml")
        done = subprocess.run(
            [sys.executable, "-m", "kagimori_agent", "unlock", "--json", "--prove", "--config", config],
            capture_output=True,
            timeout=UNLOCK_S,
            check=False,
        )
        (directory / "agent.stdout").write_bytes(done.stdout)
        (directory / "agent.stderr").write_bytes(done.stderr)
        assert done.returncode == 0, done.stderr.decode()
        running = search_files(key, directory)
        files = {path.name for path in directory.rglob("*")}
    return Aftermath(directory, owner_directory, key, watch, json.loads(done.stdout), running, files)


def test_the_run_was_a_whole_one(aftermath: Aftermath) -> None:
    """The volume took the key, the boot is capped, the verifier knows: so the key was in all the places it can be in."""
    assert aftermath.agent["confirmed"] is True
    assert [volume["how"] for volume in aftermath.agent["volumes"]] == ["proved"]  # type: ignore[attr-defined]  # JSON
    assert {"verifier.db", "verifier.db-wal", "agent.toml", "disk.img"} <= aftermath.files_while_running


def test_no_argument_and_no_environment_ever_held_the_key(aftermath: Aftermath) -> None:
    """Every user of a machine may read other processes' arguments; crash reports carry environments."""
    assert aftermath.watch.saw(b"/cryptsetup"), "the watch was too slow to see the program that gets the key"
    assert aftermath.watch.saw(b"swtpm")
    assert aftermath.watch.sightings(aftermath.unlock_key) == []


def test_no_file_holds_the_key_while_it_runs_or_afterwards(aftermath: Aftermath) -> None:
    """Database, its log, settings, evidence, what the processes printed, the disk itself: all files there are."""
    assert aftermath.while_running == []
    assert search_files(aftermath.unlock_key, aftermath.directory) == []
    assert (aftermath.owner / "stderr").read_bytes().count(b"replied") >= 3, "the log was on"


def test_no_row_of_the_database_holds_the_key(aftermath: Aftermath, amd: AmdRoot) -> None:
    """Whatever the file looks like, the values in it are searched one by one; the ledger is among them."""
    with Owner.opened(aftermath.owner, amd) as owner:
        assert owner.events() == ["released", "confirmed-opened"]
        with owner.verifier.store.read() as txn:
            rows = {name: list(txn.execute(select(table))) for name, table in schema.metadata.tables.items()}
    assert rows["volume"]
    assert rows["redemption"]
    found = [
        sighting
        for name, contents in rows.items()
        for row in contents
        for value in row
        for sighting in sightings(
            aftermath.unlock_key, name, value if isinstance(value, bytes) else str(value).encode()
        )
    ]
    assert found == []


def test_the_key_that_wraps_all_others_is_in_its_own_file_only(aftermath: Aftermath) -> None:
    """A KEK beside the database that it protects, in a log or a backup of it, would protect nothing."""
    kek = FileKek(aftermath.owner / "kek").read()
    places = {sighting.split(" in ")[1] for sighting in search_files(kek, aftermath.directory)}
    assert places == {"owner/kek"}
    assert aftermath.watch.sightings(kek) == []


WRITERS: dict[str, Callable[[bytes], bytes]] = {
    "raw": lambda secret: secret,
    "hex": lambda secret: secret.hex().encode(),
    "upper hex": lambda secret: b"KEY=" + secret.hex().upper().encode(),
    "base64": b64encode,
    "base64 within base64": lambda secret: b64encode(b"x" + secret + b"y"),
    "urlsafe base64": lambda secret: urlsafe_b64encode(b"xy" + secret),
    "JSON": lambda secret: json.dumps({"unlock_key": list(secret)}).encode(),
    "repr": lambda secret: repr({"unlock_key": secret}).encode(),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_key_that_is_planted_in_a_file_is_found(tmp_path: Path, writer: str) -> None:
    """A search that finds nothing proves something only if it would have found it."""
    secret = bytes(range(200, 232))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(b"before" + WRITERS[writer](secret) + b"after")
    assert {re.sub(r".* in ", "", one) for one in search_files(secret, tmp_path)} == {"deep/file"}
    assert search_files(bytes(range(32)), tmp_path) == []


@pytest.mark.parametrize("where", ["cmdline", "environ"])
def test_a_key_that_is_planted_in_a_process_is_found(where: str) -> None:
    """The same for the watch over processes: one that lives as long as a keyslot takes."""
    secret = secrets.token_bytes(32)
    with Watch.watching() as watch:
        argument, environment = ([secret.hex()], {}) if where == "cmdline" else ([], {"KEY": secret.hex()})
        command = [sys.executable, "-c", "import time; time.sleep(0.5)", *argument]
        subprocess.run(command, env=os.environ | environment, check=True)
    assert f"hex in {where}" in watch.sightings(secret)
