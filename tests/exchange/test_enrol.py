"""A whole enrolment (ADR 9): code, booted system, real HTTP, swtpm, cryptsetup on LUKS2 files; then the next boot unlocks."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from tests.installed import PASSPHRASE, Installed, in_base64, opens, quiet, slots
from tests.worlds import VM

from kagimori_agent import attempt, config, confirm, enrol, exchange, host_doors, keyslots
from kagimori_agent.attempt import attest
from kagimori_agent.budget import Backoff
from kagimori_agent.unlock import dry_run, unlock
from kagimori_protocol import luks2_change, messages
from kagimori_protocol.errors import DiskError, NetworkError, OperatorError, Refused, UsageError
from kagimori_simulator.world import VerifierAt
from kagimori_verifier.store import vms

pytestmark = pytest.mark.slow  # a swtpm, a server and cryptsetup for each


def test_two_volumes_are_enrolled_at_once_and_open_at_the_next_boot(installed: Installed) -> None:
    """One code, one attestation; the passphrase still opens, agent.toml names the volumes, and the old headers are kept."""
    with installed.booted() as (_, toml):
        done = installed.enrol(toml, installed.code())
        assert done.confirmed
        assert [volume.uuid for volume in done.added] == [one.uuid for one in installed.volumes]
        known = [one.uuid for one in config.load(toml).volumes]
        assert known == [one.uuid for one in installed.volumes]
    assert set(installed.states().values()) == {"active"}
    for volume, kept in zip(installed.volumes, done.backups, strict=True):
        assert opens(volume.device, PASSPHRASE)
        assert slots(volume.device) == ["1"]
        assert kept.stat().st_mode & 0o777 == 0o600
        assert b"kagimori-header" not in kept.read_bytes()
    with installed.booted(*installed.volumes) as (_, toml):
        verdict, _ = dry_run(config.load(toml), quiet)
        told = next(check for check in verdict.checks if check.id == "volume.provenance")
        assert verdict.allowed
        assert told.found.count("the host may know") == 2
        unlocked = unlock(config.load(toml), quiet, prove=True)
    assert [one.how for one in unlocked.volumes] == ["proved", "proved"]


def test_no_code_is_spent_on_a_passphrase_that_opens_nothing(installed: Installed) -> None:
    """Everything that can fail without the verifier comes before it."""
    code = installed.code()
    with installed.booted() as (_, toml):
        with pytest.raises(DiskError) as caught:
            enrol.prepared(
                config.load(toml), [installed.volumes[0].device], [], lambda *_: b"another passphrase"
            )
        assert caught.value.code == "enrol.passphrase"
        assert installed.enrol(toml, code).confirmed


def test_a_code_is_good_once_and_a_refusal_changes_no_disk(installed: Installed) -> None:
    """The second time the VM's own agent is told so, by the named check."""
    code = installed.code()
    with installed.booted() as (_, toml):
        installed.enrol(toml, code)
        with installed.owner.verifier.store.write() as txn:
            for row in vms.volumes(txn, VM):
                vms.remove_volume(txn, VM, row.uuid, row.version)
        before = [one.device.read_bytes() for one in installed.volumes]
        with pytest.raises(Refused) as caught:
            installed.enrol(toml, code)
    assert "enrol.code" in str(caught.value)
    assert before == [one.device.read_bytes() for one in installed.volumes]


def test_a_code_survives_a_network_that_loses_every_answer_for_a_while(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verifier has used it, and gives the same evidence the same keys as long as the session lives."""
    post, lost = exchange.post, [0]

    def losing(endpoint: exchange.Endpoint, path: str, body: bytes, **limits: Any) -> exchange.Reply:  # noqa: ANN401 - post's
        reply = post(endpoint, path, body, **limits)
        if path == messages.PATH_RELEASE and lost[0] < 2 * attempt.SENDINGS:
            lost[0] += 1
            raise NetworkError("home: no answer in time.", code="network.timeout")
        return reply

    monkeypatch.setattr(exchange, "post", losing)
    monkeypatch.setattr(Backoff, "next_s", lambda _: 0.01)
    with installed.booted() as (_, toml):
        assert installed.enrol(toml, installed.code()).confirmed
    assert lost == [2 * attempt.SENDINGS]
    assert [slots(one.device) for one in installed.volumes] == [["1"], ["1"]]
    assert installed.owner.events().count("released") == 1


def test_an_agent_toml_of_the_hosts_is_found_out_by_the_code(installed: Installed) -> None:
    """T18: its verifier would make a key that the host knows, and answer with a signature that the file vouches for."""
    code = installed.code()
    with installed.booted() as (world, _):
        at = VerifierAt("home", [installed.owner.url], [in_base64(bytes(range(32)))])
        toml = world.agent_toml(VM, [at], [])
        with pytest.raises(OperatorError) as caught:
            installed.enrol(toml, code)
    assert caught.value.code == "enrol.verifier"
    assert installed.owner.events() == ["enrol-code"]


def test_what_was_written_is_taken_back_if_the_next_volume_fails(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the verifier drops both keys: nothing is enrolled by halves."""
    add = keyslots.add
    calls: list[int] = []

    def second_fails(*arguments: Any) -> luks2_change.Change:  # noqa: ANN401 - keyslots.add's
        calls.append(1)
        if len(calls) == 2:
            raise DiskError("The second disk is gone.", code="enrol.device")
        return add(*arguments)

    monkeypatch.setattr(keyslots, "add", second_fails)
    with installed.booted() as (_, toml), pytest.raises(DiskError, match="gone"):
        installed.enrol(toml, installed.code())
    assert [slots(one.device) for one in installed.volumes] == [[], []]
    assert all(opens(one.device, PASSPHRASE) for one in installed.volumes)
    assert installed.states() == {}


def test_a_host_that_shows_another_volumes_header_after_the_exchange_gets_no_keyslot_in_it(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T2: one passphrase often opens several volumes, so each header that is changed is asked for its name."""
    root, data = (one.device for one in installed.volumes)
    with data.open("rb") as file:
        header = file.read(16 << 20)

    def swapping(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - attest's own
        answered = attest(*arguments, **options)
        with root.open("r+b") as file:
            file.write(header)
        return answered

    monkeypatch.setattr("kagimori_agent.enrol.attest", swapping)
    with installed.booted() as (_, toml), pytest.raises(DiskError) as caught:
        installed.enrol(toml, installed.code())
    assert caught.value.code == "enrol.device"
    assert [slots(root), slots(data)] == [[], []]
    assert installed.states() == {}


def test_a_confirmation_that_could_not_be_sent_is_kept_where_the_boot_has_left_no_place(
    installed: Installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first enrolment comes before any boot with an agent in it, so nobody has made /run/kagimori yet."""
    kept = tmp_path / "run/kagimori/confirm"
    kept.parent.parent.mkdir()
    monkeypatch.setattr(confirm, "PATH", kept)
    monkeypatch.setattr(enrol, "send_confirm", lambda *_: False)
    with installed.booted() as (_, toml):
        done = installed.enrol(toml, installed.code())
        assert (done.confirmed, done.kept) == (False, True)
        assert set(installed.states().values()) == {"staged"}
        assert kept.parent.stat().st_mode & 0o777 == 0o700
        assert confirm.resend(quiet, kept) == "home"
    assert set(installed.states().values()) == {"active"}


def test_where_a_confirmation_can_be_kept_nowhere_the_command_says_how_to_start_anew(
    installed: Installed,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`kagimori-agent confirm` would find nothing to send."""
    monkeypatch.setattr(host_doors, "open_doors", lambda *_: [])
    monkeypatch.setattr(confirm, "PATH", tmp_path / "no-run/kagimori/confirm")
    monkeypatch.setattr(enrol, "send_confirm", lambda *_: False)
    with installed.booted() as (_, toml):
        assert installed.run_enrol(toml) == 0
    out, _ = capsys.readouterr()
    assert "agent confirm`" not in out
    assert "enrol --undo" in out
    assert "volume undo" in out


def test_an_enrolment_is_undone_by_one_command_on_each_side(installed: Installed) -> None:
    """The keyslot goes once another was proved, never the last one."""
    volume = installed.volumes[0]
    with installed.booted() as (_, toml):
        installed.enrol(toml, installed.code())
        loaded = config.load(toml)
    targets = enrol.prepared(loaded, [volume.device], [], lambda *_: PASSPHRASE)
    assert enrol.undo(targets, [], quiet, installed.directory / "headers") == [volume.uuid]
    assert slots(volume.device) == []
    assert opens(volume.device, PASSPHRASE)
    with pytest.raises(UsageError) as caught:
        enrol.undo(targets, [], quiet, installed.directory / "headers")
    assert caught.value.code == "enrol.slot"


def test_a_system_with_open_doors_enrols_nothing(installed: Installed, tmp_path: Path) -> None:
    """Until each is closed, or accepted by name."""
    root = tmp_path / "root"
    for directory in ("etc/kagimori", "proc", "sys/class/block"):
        (root / directory).mkdir(parents=True)
    (root / "etc/systemd/system").mkdir(parents=True)
    (root / "etc/systemd/system/qemu-guest-agent.service").write_text("[Service]\n")
    doors = host_doors.open_doors(root, [])
    assert doors
    with pytest.raises(OperatorError) as caught:
        enrol.require_closed([], root)
    assert caught.value.code == "enrol.doors"
    lines = "".join(f"{door.id} the owner wants it\n" for door in doors)
    (root / host_doors.ACCEPTED).write_text(lines)
    enrol.require_closed([], root)


def test_the_command_takes_code_and_passphrase_by_descriptors_and_tells_it_as_json(
    installed: Installed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a program runs it; neither stands in an argument, nor in what is printed."""
    monkeypatch.setattr(host_doors, "open_doors", lambda *_: [])
    code = installed.code().text()
    with installed.booted() as (_, toml):
        assert installed.run_enrol(toml, "--json", code=code.upper()) == 0
    out, err = capsys.readouterr()
    told = json.loads(out[out.index("{\n") :])  # behind what the verifier logs in this process
    assert (told["confirmed"], [one["slot"] for one in told["volumes"]]) == (True, ["1", "1"])
    assert code not in out + err
    assert PASSPHRASE.decode() not in out + err


KILLED = """
import os, signal, sys
from pathlib import Path
from kagimori_agent import config, enrol, keyslots
from kagimori_protocol.enrol_code import EnrolCode
toml, device, backups, code, passphrase, where = sys.argv[1:]
write, at = os.pwrite, int(where)
count = [0]
loaded = config.load(Path(toml))
targets = enrol.prepared(loaded, [Path(device)], [], lambda *_: passphrase.encode())
def counting(file, data, offset):
    if os.readlink(f"/proc/self/fd/{file}") == device:
        count[0] += 1
        if count[0] > at:
            os.kill(os.getpid(), signal.SIGKILL)
    return write(file, data, offset)
os.pwrite = counting
enrol.enrol(loaded, Path(toml), EnrolCode.parse(code), targets, lambda _: None, backups=Path(backups))
"""


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_an_agent_that_is_killed_at_a_write_leaves_a_volume_that_opens_and_can_be_enrolled(
    installed: Installed, writes: int
) -> None:
    """Kill -9 before each write of the header; the same thing done again, with a new code, ends well."""
    volume = installed.volumes[0]
    with installed.booted() as (_, toml):
        words = [
            toml,
            volume.device,
            installed.directory / "headers",
            installed.code().text(),
            PASSPHRASE.decode(),
            writes,
        ]
        program = textwrap.dedent(KILLED)
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, words)], capture_output=True, check=False, timeout=60
        )
        assert done.returncode == -9, done.stderr.decode()
        assert opens(volume.device, PASSPHRASE)
        assert installed.states() == {volume.uuid: "staged"}
        told: list[str] = []
        assert installed.enrol(toml, installed.code(), say=told.append).confirmed
    left = f"--device {volume.device} --slot 1`"
    assert any(left in line for line in told) == (writes > 1), told
    assert opens(volume.device, PASSPHRASE)
    with installed.booted(*installed.volumes) as (_, toml):
        assert len(unlock(config.load(toml), quiet, prove=True).volumes) == 2


def test_no_argument_and_no_environment_of_cryptsetup_holds_a_secret(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T17: passphrase and key reach it by pipes, and the new key is in no file that was written."""
    seen: list[bytes] = []
    keys: list[bytes] = []
    start, add = subprocess.run, keyslots.add

    def watched(command: list[str], **options: Any) -> Any:  # noqa: ANN401 - subprocess's own
        seen.append(repr([command, options.get("env")]).encode())
        return start(command, **options)

    def kept(*arguments: Any) -> luks2_change.Change:  # noqa: ANN401 - keyslots.add's
        keys.append(arguments[2])
        return add(*arguments)

    monkeypatch.setattr(subprocess, "run", watched)
    monkeypatch.setattr(keyslots, "add", kept)
    with installed.booted() as (_, toml):
        installed.enrol(toml, installed.code())
    assert len(seen) > 4
    assert len(keys) == 2
    for secret in (PASSPHRASE, *keys):
        assert not any(secret in one or repr(secret).encode() in one for one in seen)
        for path in installed.directory.rglob("*"):
            if path.is_file():
                assert secret not in path.read_bytes(), path
