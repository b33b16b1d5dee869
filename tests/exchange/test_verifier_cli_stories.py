"""What an owner does with the command line, and what it refuses to do."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from tests.desks import CHIP, FLOOR, SESSION, UUID, Desk, Terminal, observed, outside, run

from kagimori_agent import config as agent_config
from kagimori_simulator.amd import AmdRoot
from kagimori_verifier import app
from kagimori_verifier.cli.main import CONFIG_VARIABLE
from kagimori_verifier.store import vms

pytestmark = pytest.mark.slow  # the quick suite has three minutes


def test_init_makes_everything_and_only_its_owner_may_read_it(new_desk: Path) -> None:
    """Settings, key, database, certificates; the KEK and the database are private."""
    assert {path.name for path in new_desk.iterdir()} >= {
        "verifier.toml",
        "kek",
        "verifier.db",
        "endorsements",
    }
    for name in ("kek", "verifier.db"):
        assert (new_desk / name).stat().st_mode & 0o077 == 0


def test_a_second_init_refuses_and_touches_nothing(desk: Desk) -> None:
    """Not even by a byte."""
    before = desk.contents()
    done = run(desk.capsys, "init", "--dir", desk.directory, "--json")
    assert done.code == 3
    assert done.error == "init.exists"
    assert desk.contents() == before


@pytest.mark.parametrize("name", ["kek", "verifier.db"])
def test_init_beside_an_old_key_or_database_touches_neither(desk: Desk, name: str) -> None:
    """They may be all that is left of a verifier."""
    for path in desk.directory.iterdir():
        if path.is_file() and path.name != name:
            path.unlink()
    before = desk.contents()
    assert run(desk.capsys, "init", "--dir", desk.directory, "--json").code == 3
    assert desk.contents() == before


def test_a_new_key_may_lie_where_only_systemd_reads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not beside the database: the settings name the credential that it is handed over as."""
    kek = tmp_path / "credstore" / "kagimori-kek"
    done = run(capsys, "init", "--dir", tmp_path / "new", "--kek-credential", kek)
    assert done.code == 0
    assert f"made {kek}:" in done.out
    assert len(kek.read_bytes()) == 32
    assert kek.stat().st_mode & 0o077 == 0
    assert not (tmp_path / "new" / "kek").exists()
    desk = Desk(tmp_path / "new", capsys)
    assert (
        run(desk.capsys, "--config", desk.config, "--json", "backup", tmp_path / "b").error
        == "kek.credential"
    )
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(kek.parent))
    desk.good("backup", tmp_path / "backup")


def test_a_new_verifier_never_takes_anothers_key_nor_removes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The key at the usual place may be all that opens a database elsewhere."""
    kek = tmp_path / "kagimori-kek"
    kek.write_bytes(bytes(32))
    kek.chmod(0o600)
    done = run(capsys, "init", "--dir", tmp_path / "new", "--kek-credential", kek, "--json")
    assert done.error == "kek.exists"
    assert kek.read_bytes() == bytes(32)
    assert not (tmp_path / "new").exists()


def test_an_init_that_was_killed_is_completed_with_the_key_that_it_made_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its draft says that it was begun; a key that was not written to its end is made anew."""
    for name, written in (("whole", bytes(range(32))), ("torn", bytes(7))):
        kek, directory = tmp_path / f"kek-{name}", tmp_path / name
        directory.mkdir()
        (directory / "verifier.toml.new").touch()
        kek.write_bytes(written)
        kek.chmod(0o600)
        assert run(capsys, "init", "--dir", directory, "--kek-credential", kek).code == 0
        assert (kek.read_bytes() == written) == (name == "whole")
        assert len(kek.read_bytes()) == 32


def test_an_init_that_fails_takes_back_the_key_that_it_made_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the same words work once there is room."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    words = ("init", "--dir", tmp_path / "new", "--kek-credential", tmp_path / "kagimori-kek", "--json")
    with monkeypatch.context() as broken:
        broken.setattr(app, "create", full)
        assert run(capsys, *words).error == "init.write"
    assert not (tmp_path / "kagimori-kek").exists()
    assert run(capsys, *words).code == 0


def test_an_init_that_fails_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the next one works: no key without a database, no draft."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(app, "create", full)
        assert run(capsys, "init", "--dir", tmp_path / "new", "--json").error == "init.write"
    assert not (tmp_path / "new").exists()
    assert run(capsys, "init", "--dir", tmp_path / "new", "--json").code == 0


@pytest.mark.parametrize(
    "words", [("serve",), ("volume", "add", "--vm", "web1", "--key-file", "/dev/null", "--device")]
)
def test_a_kek_that_others_may_read_is_refused_where_it_is_needed(
    words: tuple[str, ...], furnished: Desk
) -> None:
    """And only there: verbs that need no secret do not touch it."""
    (furnished.directory / "kek").chmod(0o644)
    device = () if words == ("serve",) else ("/dev/null",)
    assert furnished("--json", *words, *device).error == "kek.mode"
    assert furnished.good("vm", "list")


def test_a_kek_of_another_verifier_is_refused_before_a_key_is_wrapped_by_it(furnished: Desk) -> None:
    """Such a key could never be released."""
    (furnished.directory / "kek").write_bytes(os.urandom(32))
    words = ("volume", "add", "--vm", "web1", "--key-file", "/dev/null", "--device", "/dev/null")
    assert furnished("--json", *words).error == "kek.other"
    assert furnished("--json", "serve").error == "kek.other"


def test_what_vm_config_prints_an_agent_takes(furnished: Desk) -> None:
    """With volumes and without, for each kind, and with the cap of the policy."""
    path = furnished.directory / "agent.toml"
    public = furnished.good("identity", "show")["public_key"]
    store = furnished.store()
    with store.write() as txn:
        for number in range(3):
            uuid = UUID[:-1] + str(number)
            vms.add_volume(txn, vms.VolumeRow("web1", uuid, "active", b"x", 1, 0, f"crypt{number}", number))
        vms.add_volume(txn, vms.VolumeRow("web1", UUID[:-1] + "9", "adding", b"x", 1, 0, "half", 9))
    store.close()
    path.write_text(furnished("vm", "config", "web1").out)
    loaded = agent_config.load(path)
    assert loaded.vm_id == "web1"
    assert loaded.kind == "svsm-vtpm"
    assert loaded.tpm.cap_pcr == 15
    assert [volume.name for volume in loaded.volumes] == ["crypt0", "crypt1", "crypt2"]
    assert loaded.verifiers[0].urls == ["https://keys.example:8117"]
    assert public in path.read_text()
    assert furnished.good("vm", "config", "web1")["agent_toml"] == path.read_text()


def test_an_agent_caps_the_pcr_that_its_policy_looks_at(furnished: Desk) -> None:
    """Another cap PCR in the profile, and the old one in agent.toml, would leave the boot uncapped."""
    policy = furnished.good("profile", "show", "debian") | {"cap_pcr": 13}
    file = furnished.directory / "policy.json"
    file.write_text(json.dumps(policy))
    furnished.good("profile", "edit", "debian", "--file", file)
    path = furnished.directory / "agent.toml"
    path.write_text(furnished("vm", "config", "web1").out)
    assert agent_config.load(path).tpm.cap_pcr == 13


def test_who_accepts_a_door_reads_what_is_given_up(furnished: Desk) -> None:
    """And who adds a profile whose logs hold no command line is told that its VMs will get no key."""
    words = ("profile", "add", "--boot-way", "uki", "--tcb-floor", FLOOR)
    assert "no command line is known" in furnished(*words, "silent").out
    accepted = ("--accept-door", "command-line", "--accept-door", "resume")
    told = furnished(*words, "lax", *accepted).out
    assert "given up, command-line: what is booted may leave any door open" in told
    assert "given up, resume: a disk of the host's" in told
    known = furnished(*words, "strict", "--command-line", "root=/dev/vda ro noresume").out
    assert "no command line" not in known
    assert "given up" not in known
    policy = furnished.good("profile", "show", "strict")
    assert (policy["command_lines"], policy["accepted_doors"]) == (["root=/dev/vda ro noresume"], [])
    assert furnished(*words, "odd", "--accept-door", "everything").code == 2


def test_a_vm_without_an_svsm_is_told_its_kind(furnished: Desk) -> None:
    """The hint follows from what its profile knows."""
    furnished.good("profile", "add", "direct", "--boot-way", "direct", "--tcb-floor", FLOOR)
    words = ("reference", "measurement", "add", "d1" * 48, "--profile", "direct", "--kind", "snp-direct")
    furnished.good(*words, "--label", "kernel")
    furnished.good("vm", "add", "web2", "--profile", "direct")
    path = furnished.directory / "agent.toml"
    path.write_text(furnished("vm", "config", "web2", "--verifier-name", "office").out)
    loaded = agent_config.load(path)
    assert loaded.kind == "snp-direct"
    assert loaded.verifiers[0].name == "office"


def test_what_profile_show_prints_profile_edit_takes(furnished: Desk) -> None:
    """From a file and from stdin."""
    shown = furnished("profile", "show", "debian").out
    file = furnished.directory / "policy.json"
    file.write_text(shown)
    furnished.good("profile", "edit", "debian", "--file", file)
    done = outside("--config", furnished.config, "profile", "edit", "debian", input=shown)
    assert done.returncode == 0, done.stderr
    assert furnished("profile", "show", "debian").out == shown


def test_a_profile_gets_no_value_that_belongs_to_one_vm(furnished: Desk) -> None:
    """Two VMs that share an initramfs' value could each boot as the other."""
    log = furnished.directory / "log"
    words = ("reference", "pcr", "add", "--profile", "debian", "--label", "x", "--event-log", log)
    assert furnished("--json", *words, "--pcr", "9").error == "reference.vm-owned"
    assert furnished.good(*words)["pcrs"] == [0, 1, 2, 3, 4, 5, 7, 14]


def test_a_profile_that_comes_again_does_not_know_what_the_old_one_knew(furnished: Desk) -> None:
    """Removed means forgotten, boot states too."""
    log = furnished.directory / "log"
    furnished.good("profile", "add", "old", "--boot-way", "grub", "--tcb-floor", FLOOR)
    furnished.good("reference", "pcr", "add", "--profile", "old", "--label", "x", "--event-log", log)
    furnished.good("profile", "remove", "old")
    furnished.good("profile", "add", "old", "--boot-way", "grub", "--tcb-floor", FLOOR)
    assert [row["owner"] for row in furnished.good("reference", "list")] == ["web1"]


def test_a_vm_that_comes_again_does_not_know_what_the_old_one_knew(furnished: Desk) -> None:
    """Neither boot states nor chips nor volumes."""
    furnished.good("vm", "remove", "web1")
    furnished.good("vm", "add", "web1", "--profile", "debian")
    assert furnished.good("reference", "list") == []
    shown = furnished.good("vm", "show", "web1")
    assert (shown["chips"], shown["volumes"]) == ([], [])


def test_nothing_is_accepted_before_its_confirm(furnished: Desk) -> None:
    """An AK that nobody has proven could have quoted anything."""
    observed(furnished, confirmed=False)
    assert furnished("--json", "reference", "accept", SESSION, "--yes").error == "accept.unconfirmed"
    assert len(furnished.good("reference", "list")) == 1


def test_accepting_asks_and_in_a_pipe_needs_a_yes(furnished: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes is told first; nobody there to ask is a no, and so is the end of the input."""
    observed(furnished, confirmed=True)
    done = outside("--config", furnished.config, "reference", "accept", SESSION, input="y\n")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(furnished.good("reference", "list")) == 1
    for answer in ("", "\n", "n\n", "yes please\n"):
        monkeypatch.setattr("sys.stdin", Terminal(answer))
        assert furnished("reference", "accept", SESSION).code == 1
    assert len(furnished.good("reference", "list")) == 1
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    assert furnished("reference", "accept", SESSION, "--label", "after update").code == 0
    assert "after update" in {row["label"] for row in furnished.good("reference", "list")}
    assert furnished.good("ledger", "list", "--session", SESSION)[0]["event"] == "reference-accepted"


def test_roots_and_certificates_are_imported_listed_and_forgotten(furnished: Desk, amd: AmdRoot) -> None:
    """A foreign root is trusted by name, and only once."""
    ark, crl = furnished.directory / "ark.der", furnished.directory / "crl.der"
    ark.write_bytes(amd.ark_der)
    crl.write_bytes(amd.crl())
    assert len(furnished.good("endorsements", "import", ark, crl)["imported"]) == 2
    furnished.good("endorsements", "import", ark)
    assert len(furnished.good("endorsements", "list")) == 2
    added = furnished.good("endorsements", "root", "add", "--certificate", ark, "--label", "simulated")
    words = ("--json", "endorsements", "root", "add", "--certificate", ark, "--label", "again")
    assert furnished(*words).error == "root.exists"
    pins = {row["spki_sha256"]: row["whose"] for row in furnished.good("endorsements", "root", "list")}
    assert pins[added["spki_sha256"]] == "simulated"
    furnished.good("endorsements", "root", "remove", added["spki_sha256"])
    for pin in [pin for pin, whose in pins.items() if whose == "AMD"]:
        assert furnished("--json", "endorsements", "root", "remove", pin).code == 3


def test_every_act_of_the_owner_is_in_the_ledger(furnished: Desk) -> None:
    """In order, and the chain holds."""
    furnished.good("vm", "disable", "web1")
    furnished.good("vm", "chip", "remove", "web1", CHIP)
    furnished.good("vm", "remove", "web1")
    events = [row["event"] for row in furnished.good("ledger", "list")][::-1]
    assert events == [
        *("profile-added", "measurement-added", "vm-added", "enrol-code", "reference-added"),
        *("vm-disabled", "vm-chips", "vm-removed"),
    ]
    assert furnished.good("ledger", "verify")["lines"] == len(events)


def test_the_settings_are_found_by_the_environment_too(
    furnished: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And --config is stronger."""
    monkeypatch.setenv(CONFIG_VARIABLE, str(furnished.config))
    assert run(furnished.capsys, "vm", "list", "--json").json[0]["vm_id"] == "web1"
    assert run(furnished.capsys, "vm", "list", "--json", "--config", "/absent").error == "settings.read"


def test_what_was_chosen_by_others_cannot_speak_to_the_terminal(furnished: Desk) -> None:
    """A path of the owner's disk is printed, too."""
    done = furnished("profile", "edit", "debian", "--file", "/absent/\x1b[2J")
    assert done.code == 2
    assert "\x1b" not in done.err


def test_as_a_program_it_is_quiet_when_its_reader_has_gone(furnished: Desk) -> None:
    """`kagimori-verifier ledger list | head -1` ends without a complaint."""
    reader, writer = os.pipe()
    os.close(reader)
    words = ("--config", furnished.config, "ledger", "list")
    done = outside(*words, stdout=writer, stderr=subprocess.PIPE, capture_output=False)
    failed = outside(
        "--json", "vm", "list", "--config", "/x", stdout=writer, stderr=subprocess.PIPE, capture_output=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert failed.returncode == 3
    assert "Traceback" not in failed.stderr


def test_a_disk_that_is_full_is_named(furnished: Desk) -> None:
    """Output that could not be written is no success."""
    with Path("/dev/full").open("w") as full:
        words = ("--config", furnished.config, "ledger", "list")
        done = outside(*words, stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert "No space left" in done.stderr


def test_any_locale_can_show_any_label(furnished: Desk) -> None:
    """Letters that the terminal's encoding has not are escaped."""
    log = furnished.directory / "log"
    furnished.good("reference", "pcr", "add", "--vm", "web1", "--label", "鍵", "--event-log", log)
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = outside("--config", furnished.config, "reference", "list", env=environment)
    assert done.returncode == 0, done.stderr
    assert "u9375" in done.stdout
