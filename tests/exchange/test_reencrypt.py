"""A new volume key before an enrolment: made in the VM, and told to the verifier only where the agent knows it (ADR 9)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.installed import PASSPHRASE, Installed, opens, quiet, slots
from tests.worlds import VM

from kagimori_agent import config, host_doors, keyslots
from kagimori_agent.attempt import attest
from kagimori_agent.reencrypt import end_begun, reencrypt
from kagimori_agent.unlock import unlock
from kagimori_protocol.errors import DiskError, OperatorError
from kagimori_protocol.luks2_layout import build
from kagimori_simulator import disk
from kagimori_verifier.store import enrolments

pytestmark = pytest.mark.slow  # a swtpm, a server and cryptsetup for each

AREA = 16 << 20
"""Bytes of header and keyslots, as cryptsetup lays a volume out."""


def provenances(installed: Installed) -> set[str]:
    """Say who may know the volume keys, as the verifier has it."""
    with installed.owner.verifier.store.read() as txn:
        return {one.provenance for one in enrolments.of_vm(txn, VM)}


def volume_key(image: Path) -> bytes:
    """Ask cryptsetup itself, as a host would that has seen the passphrase."""
    words = ["cryptsetup", "luksDump", "-q", "--dump-volume-key", "--key-file", "-", str(image)]
    said = subprocess.run(words, input=PASSPHRASE, capture_output=True, check=True).stdout
    return bytes.fromhex("".join(said.partition(b"MK dump:")[2].decode().split()))


def area(image: Path) -> bytes:
    """Take a snapshot of header and keyslots, as any host can."""
    with image.open("rb") as file:
        return file.read(AREA)


def put_back(image: Path, snapshot: bytes) -> None:
    """Show a header of before."""
    with image.open("r+b") as file:
        file.write(snapshot)


def test_a_new_volume_key_is_told_to_the_verifier(
    installed: Installed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data is another's under another key; the passphrase and the new key open it, and verdicts say where it was made."""
    monkeypatch.setattr(host_doors, "open_doors", lambda *_: [])
    before = [one.device.read_bytes()[AREA:] for one in installed.volumes]
    with installed.booted() as (_, toml):
        assert installed.run_enrol(toml, "--reencrypt", "--json") == 0
    out, _ = capsys.readouterr()
    done = json.loads(out[out.index("{\n") :])
    for was, one in zip(before, installed.volumes, strict=True):
        assert was != one.device.read_bytes()[AREA:]
        assert opens(one.device, PASSPHRASE)
    assert provenances(installed) == {"attested-vm"}
    assert installed.owner.events(done["session"])[-1] == "confirmed-reencrypted"
    with installed.booted(*installed.volumes) as (_, toml):
        assert len(unlock(config.load(toml), quiet, prove=True).volumes) == 2


def before_it_was_formatted_anew(image: Path) -> bytes:
    """The header that the provider's installer made: the host knows its volume key."""
    return area(image)


def before_an_earlier_reencryption(image: Path) -> bytes:
    """The same, but the volume key that the agent replaces now is already a later one."""
    snapshot = area(image)
    reencrypt(image, PASSPHRASE, quiet)
    return snapshot


@pytest.mark.parametrize("taken", [before_it_was_formatted_anew, before_an_earlier_reencryption])
@pytest.mark.parametrize("when", ["before the exchange", "during the exchange"])
def test_a_host_that_puts_back_a_header_whose_volume_key_it_knows_gets_no_keyslot_over_it(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, taken: Callable[[Path], bytes], when: str
) -> None:
    """T1: the owner's passphrase opens that header, too, so only the volume key tells that it is not the one just made."""
    root, data = (one.device for one in installed.volumes)
    snapshot = taken(root)
    known = {one.uuid: reencrypt(one.device, PASSPHRASE, quiet) for one in installed.volumes}
    assert volume_key(root) == known[installed.volumes[0].uuid]

    def swapping(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - attest's own
        put_back(root, snapshot)
        return attest(*arguments, **options)

    if when == "before the exchange":
        put_back(root, snapshot)
    else:
        monkeypatch.setattr("kagimori_agent.enrol.attest", swapping)
    with installed.booted() as (_, toml), pytest.raises(DiskError) as caught:
        installed.enrol(toml, installed.code(), volume_keys=known)
    assert caught.value.code == "enrol.volume-key"
    assert area(root) == snapshot
    assert [slots(root), slots(data)] == [[], []]
    assert provenances(installed) == set()
    assert installed.states() == {}


def test_a_header_whose_digest_is_of_the_new_volume_key_and_whose_keyslot_is_not_gets_none(
    installed: Installed,
) -> None:
    """The host may copy the new digest into a header of before: cryptsetup holds the keyslot's key against it."""
    root = installed.volumes[0].device
    old = area(root)
    known = reencrypt(root, PASSPHRASE, quiet)
    with keyslots.opened(root) as one:
        new = one.load().header
    put_back(root, old)
    with keyslots.opened(root) as one:
        header = one.load().header
        digest = header.json["digests"]["0"] | digest_of(new)
        forged = replace(
            header, json={**header.json, "digests": {"0": digest}}, seqid=new.seqid + 1, offset=0
        )
        put_back(root, build(forged, keyslots.salts()))
    with keyslots.opened(root) as one:
        image = one.load()
    keyslots.require_volume_key(image, known)
    with pytest.raises(DiskError) as caught:
        keyslots.add(image, PASSPHRASE, bytes(32), 1)
    assert caught.value.code == "volume.keyslot"


def digest_of(header: Any) -> dict[str, Any]:  # noqa: ANN401 - a LuksHeader
    """Give what of its digest does not name keyslots."""
    digest = header.json["digests"]["0"]
    return {name: digest[name] for name in ("salt", "digest", "iterations", "hash")}


def test_the_new_volume_key_is_in_no_argument_and_no_file(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T17: cryptsetup gets it by a pipe."""
    seen: list[bytes] = []
    start = subprocess.run

    def watched(command: list[str], **more: Any) -> Any:  # noqa: ANN401 - subprocess's own
        seen.append(repr([command, more.get("env")]).encode())
        return start(command, **more)

    monkeypatch.setattr(subprocess, "run", watched)
    one = installed.volumes[0]
    key = reencrypt(one.device, PASSPHRASE, quiet)
    assert len(key) == 64
    assert seen
    for secret in (PASSPHRASE, key):
        assert not any(secret in said or repr(secret).encode() in said for said in seen)
        assert not any(
            secret in path.read_bytes() for path in installed.directory.rglob("*") if path.is_file()
        )


@pytest.mark.parametrize(
    ("helped", "words"),
    [
        ("--volume-key-file=STRING", ["--volume-key-file"]),
        (
            "--volume-key-file=STRING --new-volume-key-file=STRING",
            ["--new-key-size", "512", "--new-volume-key-file"],
        ),
    ],
)
def test_each_cryptsetup_is_told_the_new_volume_key_by_its_own_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, helped: str, words: list[str]
) -> None:
    """Since 2.8 the old option names the key that a volume has, and a new one the key that it gets."""
    image = tmp_path / "volume.img"
    disk.make_volume(image, PASSPHRASE)
    said = tmp_path / "said"
    program = tmp_path / "cryptsetup"
    program.write_text(
        f'#!/bin/sh\ncase $1 in --help) echo "{helped}"; exit ;; reencrypt) echo "$*" >{said}; exit 1 ;; esac\n'
        f'exec {shutil.which("cryptsetup")} "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr("kagimori_agent.luks.DIRECTORIES", (tmp_path,))
    with pytest.raises(DiskError):
        reencrypt(image, PASSPHRASE, quiet)
    told = said.read_text().split()
    assert told[told.index("--key-file") - len(words) - 1 :][: len(words)] == words


def interrupted(image: Path) -> None:
    """Format a volume, begin to reencrypt it, and kill that in the middle."""
    with image.open("wb") as file:
        file.truncate(600 << 20)
    words = ["luksFormat", "--batch-mode", "--type", "luks2", "--pbkdf", "pbkdf2"]
    words += ["--pbkdf-force-iterations", "1000", "--key-file", "-", str(image)]
    subprocess.run(["cryptsetup", *words], input=PASSPHRASE, check=True)
    command = [sys.executable, "-c", REENCRYPT, str(image), PASSPHRASE.decode()]
    with subprocess.Popen(command, start_new_session=True) as process:
        with image.open("rb", buffering=0) as file:
            while b"online-reencrypt" not in os.pread(file.fileno(), 16384, 0):
                assert process.poll() is None
                time.sleep(0.01)
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGKILL)  # cryptsetup, too: it is in the same group
    _await_end(process.pid)


def test_a_reencryption_that_was_killed_goes_on_and_the_passphrase_opens_meanwhile(tmp_path: Path) -> None:
    """Kill -9 in the middle; an agent refuses the header until it has ended, and allows it then."""
    image = tmp_path / "large.img"
    interrupted(image)
    assert opens(image, PASSPHRASE)
    with keyslots.opened(image) as one, pytest.raises(DiskError):
        one.load()
    assert end_begun(image, PASSPHRASE, quiet)
    assert opens(image, PASSPHRASE)
    with keyslots.opened(image) as one:
        assert list(one.load().header.json["digests"]) == ["0"]
    assert not end_begun(image, PASSPHRASE, quiet)


def test_what_another_run_had_begun_is_ended_and_vouched_for_by_nobody(
    installed: Installed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its new volume key was known to that run alone, so the header that is there now may be any: no code is spent on it."""
    monkeypatch.setattr(host_doors, "open_doors", lambda *_: [])
    root, data = (one.device for one in installed.volumes)
    interrupted(root)
    before = area(data)
    with installed.booted() as (_, toml):
        assert installed.run_enrol(toml, "--reencrypt", "--json") == OperatorError.exit_code
        _, err = capsys.readouterr()
        assert "--reencrypt` again" in err
        assert "confirmed-reencrypted" not in installed.owner.events()
        assert installed.states() == {}
        assert (opens(root, PASSPHRASE), area(data)) == (True, before)
        assert installed.run_enrol(toml, "--reencrypt", "--json") == 0
    assert provenances(installed) == {"attested-vm"}


def keyslot_of_no_data(image: Path) -> None:
    """Leave what a reencryption leaves that is killed before it begins: the new volume key's keyslot, and its digest."""
    reader, writer = os.pipe()
    os.write(writer, PASSPHRASE)
    os.close(writer)
    words = ["cryptsetup", "luksAddKey", "--batch-mode", "--unbound", "--key-size", "512", "--key-file", "-"]
    words += ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", str(image), f"/proc/self/fd/{reader}"]
    subprocess.run(words, input=PASSPHRASE, check=True, pass_fds=(reader,))
    os.close(reader)


def digest_of_another_number(image: Path) -> None:
    """Leave what a reencryption leaves whose agent is killed as cryptsetup ends."""
    words = [
        "cryptsetup",
        "reencrypt",
        "--batch-mode",
        "--force-offline-reencrypt",
        "--key-file",
        "-",
        str(image),
    ]
    subprocess.run(words, input=PASSPHRASE, check=True)


@pytest.mark.parametrize("leave", [keyslot_of_no_data, digest_of_another_number])
def test_what_a_run_leaves_that_is_killed_at_either_end_is_tidied_by_the_next(
    tmp_path: Path, leave: Callable[[Path], None]
) -> None:
    """An agent refuses such a header, and the command that is said to go on would refuse it as well."""
    image = tmp_path / "volume.img"
    disk.make_volume(image, PASSPHRASE)
    leave(image)
    with keyslots.opened(image) as one, pytest.raises(DiskError) as caught:
        one.load()
    assert caught.value.code == "luks.digests"
    key = reencrypt(image, PASSPHRASE, quiet)
    assert volume_key(image) == key
    with keyslots.opened(image) as one:
        assert len(one.load().header.json["keyslots"]) == 1


def _await_end(group: int) -> None:
    """Wait for all of a killed group: one that is in the middle of a write holds its locks until that has ended."""
    deadline = time.monotonic() + 30
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.killpg(group, 0)
            assert time.monotonic() < deadline, "a killed process does not end"
            time.sleep(0.01)


REENCRYPT = """
import sys
from pathlib import Path
from kagimori_agent.reencrypt import reencrypt
reencrypt(Path(sys.argv[1]), sys.argv[2].encode(), lambda _: None)
"""
