"""A verifier in a directory and the owner's command line on it, for the tests of its verbs."""

from __future__ import annotations

import io
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog

from kagimori_simulator import measured_boot
from kagimori_verifier import learning, settings
from kagimori_verifier.cli import main
from kagimori_verifier.store import Store, observations
from kagimori_verifier.store.observations import Observation

CHIP = bytes(range(64)).hex()
DIGEST = "5a" * 48
UUID = "00000000-0000-4000-8000-000000000000"
SESSION = "0123456789abcdef"
FLOOR = "Milan:boot_loader=4,tee=0,snp=24,microcode=219"
WAIT_S = 60


class Terminal(io.StringIO):
    """A stdin at which somebody sits."""

    def isatty(self) -> bool:
        """Say so."""
        return True


@dataclass
class Done:
    """What a verb gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:  # noqa: ANN401 - whatever JSON can hold
        """Give the one JSON value on stdout."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """Give the code of the error."""
        assert self.code != 0
        assert "Traceback" not in self.err
        return str(self.json["error"]["code"])


@dataclass
class Desk:
    """A verifier in a directory, and the command line."""

    directory: Path
    capsys: pytest.CaptureFixture[str]

    @property
    def config(self) -> Path:
        """Its settings."""
        return self.directory / "verifier.toml"

    def __call__(self, *words: str | Path) -> Done:
        """Run a verb on this verifier."""
        return run(self.capsys, "--config", self.config, *words)

    def good(self, *words: str | Path) -> Any:  # noqa: ANN401 - whatever JSON can hold
        """Run a verb that must work; gives its JSON."""
        done = self("--json", *words)
        assert done.code == 0, done.err
        return done.json

    def contents(self) -> dict[str, bytes]:
        """Give every file, so that one can see that nothing was touched."""
        return {str(path): path.read_bytes() for path in self.directory.rglob("*") if path.is_file()}

    def store(self) -> Store:
        """Open its database."""
        return Store.open(settings.load(self.config).database_url)


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> Done:
    """Run the command line in this process."""
    capsys.readouterr()
    try:
        code = main([str(word) for word in words])
    except SystemExit as ended:
        code = int(ended.code or 0)
    out, err = capsys.readouterr()
    return Done(code, out, err)


def outside(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401 - subprocess's own
    """Run the command line as a process of its own."""
    command = [sys.executable, "-m", "kagimori_verifier", *map(str, words)]
    return subprocess.run(
        command, check=False, timeout=WAIT_S, **({"capture_output": True, "text": True} | options)
    )


def furnish(desk: Desk) -> None:
    """Add a profile, a measurement, a VM and a boot state."""
    desk.good("profile", "add", "debian", "--boot-way", "grub", "--tcb-floor", FLOOR)
    measurement = ("reference", "measurement", "add", DIGEST, "--profile", "debian")
    desk.good(*measurement, "--kind", "svsm-vtpm", "--label", "svsm", "--svsm-feature", "vtpm")
    desk.good("vm", "add", "web1", "--profile", "debian", "--chip", CHIP)
    log = desk.directory / "log"
    log.write_bytes(measured_boot.grub().event_log())
    desk.good("reference", "pcr", "add", "--vm", "web1", "--label", "a boot", "--event-log", log)


def observed(desk: Desk, *, confirmed: bool) -> None:
    """Keep what a session showed."""
    pcrs = learning.from_event_log(measured_boot.grub().event_log())
    store = desk.store()
    with store.write() as txn:
        observations.add(txn, Observation(SESSION, "web1", "debian", 1, False, pcrs))
        if confirmed:
            observations.confirm(txn, SESSION)
    store.close()


@pytest.fixture(scope="session")
def new_desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the directory of a verifier fresh from init, to be copied."""
    directory = tmp_path_factory.mktemp("desk") / "new"
    words = ["init", "--dir", str(directory), "--public-url", "https://keys.example:8117"]
    assert main(words) == 0
    return directory


@pytest.fixture
def desk(tmp_path: Path, new_desk: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    """Give a new verifier."""
    shutil.copytree(new_desk, tmp_path / "desk")
    return Desk(tmp_path / "desk", capsys)


@pytest.fixture
def furnished(new_desk: Path, desk: Desk) -> Desk:
    """Give a verifier that knows a profile, a measurement, a VM and a boot state."""
    kept = new_desk.with_name("furnished")
    if not kept.exists():
        furnish(desk)
        shutil.copytree(desk.directory, kept)
    shutil.copytree(kept, desk.directory, dirs_exist_ok=True)
    return desk


@pytest.fixture(autouse=True)
def logs_of_its_own() -> Iterator[None]:
    """Undo what `serve` does to logging when it runs in this process: its stderr is a test's, and closed soon."""
    before = list(logging.root.handlers)
    yield
    structlog.reset_defaults()
    for handler in [one for one in logging.root.handlers if one not in before]:
        logging.root.removeHandler(handler)
