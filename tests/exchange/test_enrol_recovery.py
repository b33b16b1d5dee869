"""A recovery code that is made with an enrolment's one-time code: on paper from the first day, and nowhere else (ADR 11)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests import volumes
from tests.desks import Desk, outside
from tests.exchange.test_enrol import KILLED
from tests.exchange.test_secrets import Watch, search_files, sightings
from tests.exchange.test_volume_recovery import Paper, by_pipe
from tests.installed import PASSPHRASE, Installed, opens, quiet, slots
from tests.worlds import SVSM, VM, Owner, make_verifier

from kagimori_agent import config, enrol, host_doors, keyslots
from kagimori_agent.unlock import unlock
from kagimori_protocol import recovery_code
from kagimori_protocol.enrol_code import EnrolCode
from kagimori_protocol.errors import DiskError, OperatorError, UsageError
from kagimori_simulator import measured_boot
from kagimori_simulator.amd import AmdRoot
from kagimori_verifier.store import enrolments

pytestmark = pytest.mark.slow  # a swtpm, a server and cryptsetup for each


def made(installed: Installed, *verb: str) -> tuple[EnrolCode, bytes]:
    """Have both codes made by a process, as an operator does; gives the recovery key that stands on paper."""
    reader, writer = os.pipe()
    words = ("--json", "--config", installed.owner.directory / "verifier.toml")
    done = outside(*words, *(verb or ("vm", "code", VM)), "--recovery-fd", str(writer), pass_fds=(writer,))
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        paper = file.read().decode()
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["recovery"]
    assert paper.strip() not in done.stdout + done.stderr
    return EnrolCode.parse(told["code"]), recovery_code.decode(paper)


def kept(installed: Installed) -> bool:
    """Tell whether the verifier has a recovery key."""
    with installed.owner.verifier.store.read() as txn:
        row = enrolments.code(txn, VM)
    return row is not None and row.recovery is not None


def test_paper_from_the_day_of_the_enrolment_brings_every_volume_back_at_another_verifier(
    installed: Installed, amd: AmdRoot, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The verifier burned down, and there is no backup: one code, two volumes, another verifier, and the VM boots."""
    code, key = made(installed)
    with installed.booted() as (_, toml):
        done = installed.enrol(toml, code)
        assert [(slot, recovery) for _, slot, recovery in done.volumes] == [("1", "2"), ("1", "2")]
        assert done.confirmed
    assert set(installed.states().values()) == {"active"}
    assert not kept(installed)
    for volume in installed.volumes:
        assert volumes.opens(volume.device, key)
        assert opens(volume.device, PASSPHRASE)
        assert slots(volume.device) == ["1", "2"]
    with installed.booted(*installed.volumes) as (_, toml):  # the first verifier's own keys, as without paper
        assert len(unlock(config.load(toml), quiet, prove=True).volumes) == 2
    make_verifier(tmp_path / "second", amd)
    desk = Desk(tmp_path / "second", capsys)
    with Owner.opened(desk.directory, amd) as owner, owner.served():
        owner.enrol_profile("grub", "grub", "svsm-vtpm", SVSM)
        owner.enrol_vm(VM, "grub")
        owner.accept_boot(VM, "grub", measured_boot.grub(), "grub")
        for volume in installed.volumes:
            words = ("recovery", "import", "--vm", VM, "--uuid", volume.uuid, "--name", volume.name)
            imported = by_pipe(desk, recovery_code.encode(key), "--code-fd", *words)
            assert imported.code == 0, imported.err
        with replace(installed, owner=owner).booted(*installed.volumes) as (_, toml):
            assert unlock(config.load(toml), quiet, prove=True).confirmed


def test_the_verifier_that_enrolled_takes_its_volume_back_by_the_code(
    installed: Installed, capsys: pytest.CaptureFixture[str]
) -> None:
    """A backup of before the enrolment knows nothing of it; the paper does."""
    code, key = made(installed)
    volume = installed.volumes[0]
    with installed.booted() as (_, toml):
        installed.enrol(toml, code)
    desk = Desk(installed.owner.directory, capsys)
    desk.good("volume", "remove", "--vm", VM, volume.uuid)
    words = ("recovery", "import", "--vm", VM, "--uuid", volume.uuid)
    assert by_pipe(desk, recovery_code.encode(key), "--code-fd", *words).code == 0
    with installed.booted(volume) as (_, toml):
        assert unlock(config.load(toml), quiet, prove=True).confirmed


def test_the_recovery_key_is_on_paper_and_in_its_keyslots_and_nowhere_else(
    installed: Installed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No argument, environment, log, file, database or ledger has it, nor what either program prints."""
    monkeypatch.setattr(host_doors, "open_doors", lambda *_: [])
    with Watch.watching() as watch:
        code, key = made(installed)
        with installed.booted() as (_, toml):
            assert installed.run_enrol(toml, "--json", code=code.text()) == 0
    assert watch.saw(b"cryptsetup")
    out, err = capsys.readouterr()
    told = json.loads(out[out.index("{\n") :])
    assert [(one["slot"], one["recovery_slot"]) for one in told["volumes"]] == [("1", "2"), ("1", "2")]
    assert all(volumes.opens(one.device, key) for one in installed.volumes)
    paper = recovery_code.encode(key)
    found = [*watch.sightings(key), *sightings(key, "what was printed", (out + err).encode())]
    for spelt in (paper.encode(), paper.replace("-", "").encode()):
        assert not any(spelt in content for contents in watch.seen.values() for content in contents)
        assert spelt not in (out + err).encode()
        for directory in {installed.directory, installed.owner.directory}:
            assert not any(spelt in one.read_bytes() for one in directory.rglob("*") if one.is_file())
    for directory in {installed.directory, installed.owner.directory}:
        found += search_files(key, directory)
    assert found == []


def test_a_person_is_told_what_to_write_down(
    installed: Installed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The UUIDs that `recovery import` will ask for, and that the keyslots are there."""
    monkeypatch.setattr(host_doors, "open_doors", lambda *_: [])
    code, _ = made(installed)
    with installed.booted() as (_, toml):
        assert installed.run_enrol(toml, code=code.text()) == 0
    out, _ = capsys.readouterr()
    (line,) = (one for one in out.splitlines() if one.startswith("recovery keyslots added"))
    assert all(one.uuid in line for one in installed.volumes)


def both_slots(installed: Installed) -> list[list[str]]:
    """Name the sealed keyslots of both volumes."""
    return [slots(one.device) for one in installed.volumes]


def test_what_fails_later_takes_back_both_keyslots_and_ends_the_paper(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verifier is told, and keeps neither key."""
    code, key = made(installed)

    def full(*_: object) -> list[Any]:
        raise OperatorError("The disk is full.", code="enrol.config")

    monkeypatch.setattr(enrol, "add_to_config", full)
    said: list[str] = []
    with installed.booted() as (_, toml), pytest.raises(OperatorError, match="full"):
        installed.enrol(toml, code, say=said.append)
    assert any("keyslots 1 and 2 removed again" in line for line in said), said
    assert both_slots(installed) == [[], []]
    assert not any(volumes.opens(one.device, key) for one in installed.volumes)
    assert all(opens(one.device, PASSPHRASE) for one in installed.volumes)
    assert installed.states() == {}
    assert not kept(installed)


def test_a_recovery_keyslot_that_cannot_be_made_leaves_no_keyslot_at_all(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A volume with the one and not the other would be believed to be on paper."""
    code, _ = made(installed)
    before = [one.device.read_bytes() for one in installed.volumes]
    add = keyslots.add

    def second_fails(image: Any, passphrase: bytes, *rest: Any) -> Any:  # noqa: ANN401 - keyslots.add's
        if passphrase != PASSPHRASE:
            raise DiskError("There is no free keyslot.", code="volume.keyslot")
        return add(image, passphrase, *rest)

    monkeypatch.setattr(keyslots, "add", second_fails)
    with installed.booted() as (_, toml), pytest.raises(DiskError, match="no free keyslot"):
        installed.enrol(toml, code)
    assert before == [one.device.read_bytes() for one in installed.volumes]
    assert installed.states() == {}


def test_both_keyslots_of_an_enrolment_are_undone_by_name(installed: Installed) -> None:
    """No header tells whose a sealed keyslot is, so neither goes unless it is meant."""
    code, _ = made(installed)
    volume = installed.volumes[0]
    with installed.booted() as (_, toml):
        installed.enrol(toml, code)
        loaded = config.load(toml)
    headers = installed.directory / "headers"
    targets = enrol.prepared(loaded, [volume.device], [], lambda *_: PASSPHRASE)
    for named in ([], ["1", "3"], ["1", "1"]):
        with pytest.raises(UsageError) as caught:
            enrol.undo(targets, named, quiet, headers)
        assert (caught.value.code, caught.value.found) == ("enrol.slot", "1, 2")
    assert enrol.undo(targets, ["1", "2"], quiet, headers) == [volume.uuid]
    assert slots(volume.device) == []
    assert opens(volume.device, PASSPHRASE)


def test_a_recovery_code_alone_is_no_other_keyslot_where_it_is_to_go_as_well(installed: Installed) -> None:
    """Who gives it as the key that opens would lose the volume by it."""
    code, key = made(installed)
    volume = installed.volumes[0]
    with installed.booted() as (_, toml):
        installed.enrol(toml, code)
        loaded = config.load(toml)
    targets = enrol.prepared(loaded, [volume.device], [], lambda *_: key)
    with pytest.raises(DiskError) as caught:
        enrol.undo(targets, ["1", "2"], quiet, installed.directory / "headers")
    assert caught.value.code == "enrol.last"
    assert enrol.undo(targets, ["1"], quiet, installed.directory / "headers") == [volume.uuid]
    assert (slots(volume.device), volumes.opens(volume.device, key)) == (["2"], True)


@pytest.mark.parametrize("writes", range(3))
def test_an_agent_that_is_killed_at_a_write_leaves_both_keyslots_or_neither(
    installed: Installed, writes: int
) -> None:
    """Kill -9 before each write of the header; with new codes the same thing ends well, and the newer paper opens."""
    volume = installed.volumes[0]
    code, older = made(installed)
    with installed.booted() as (_, toml):
        words = (
            toml,
            volume.device,
            installed.directory / "headers",
            code.text(),
            PASSPHRASE.decode(),
            writes,
        )
        command = [sys.executable, "-c", textwrap.dedent(KILLED), *map(str, words)]
        done = subprocess.run(command, capture_output=True, check=False, timeout=60)
        assert done.returncode == -9, done.stderr.decode()
        assert opens(volume.device, PASSPHRASE)
        assert slots(volume.device) == ([] if writes < 2 else ["1", "2"])
        assert volumes.opens(volume.device, older) == (writes > 1)
        assert installed.states() == {volume.uuid: "staged"}
        code, newer = made(installed)
        assert installed.enrol(toml, code).confirmed
    assert opens(volume.device, PASSPHRASE)
    assert volumes.opens(volume.device, newer)
    with installed.booted(*installed.volumes) as (_, toml):
        assert len(unlock(config.load(toml), quiet, prove=True).volumes) == 2


@pytest.mark.parametrize("more", [("--recovery",), ("--recovery", "--json"), ("--recovery-fd", "9999")])
@pytest.mark.parametrize("verb", [("vm", "code", VM), ("vm", "add", "web2", "--profile", "grub")])
def test_a_recovery_code_that_nobody_would_see_is_not_made(
    installed: Installed, capsys: pytest.CaptureFixture[str], verb: tuple[str, ...], more: tuple[str, ...]
) -> None:
    """A log that took it would be a second paper; the code that there is stays good."""
    installed.code()
    before = installed.owner.ledger()
    done = Desk(installed.owner.directory, capsys)(*verb, *more)
    assert done.code == 2, done.out
    assert "Nobody would see" in done.err + done.out
    assert installed.owner.ledger() == before


def test_a_vm_that_may_not_enrol_is_not_added_with_a_recovery_code(
    installed: Installed, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its paper would never open anything."""
    desk = Desk(installed.owner.directory, capsys)
    add = ("vm", "add", "web2", "--profile", "grub", "--purpose", "unlock", "--recovery-fd", "2")
    done = desk("--json", *add)
    assert done.error == "enrol.vm"
    assert "k1" not in done.err
    assert [row["vm_id"] for row in desk.good("vm", "list")] == [VM]


def test_a_terminal_is_shown_both_codes_and_how_to_keep_them(
    installed: Installed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a VM that is new as for one that is known."""
    desk = Desk(installed.owner.directory, capsys)
    for verb in (("vm", "add", "web2", "--profile", "grub"), ("vm", "code", VM)):
        paper = Paper()
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", paper)
            assert desk(*verb, "--recovery").code == 0
        told = paper.getvalue().splitlines()
        assert told[0].startswith(f"recovery code of the volumes that {verb[2]} enrols")
        recovery_code.decode("\n".join(told[1:4]))
        assert any("neither this verifier nor the VM's host" in line for line in told)
        assert any(f"code for {verb[2]}: " in line for line in told)
    assert kept(installed)
