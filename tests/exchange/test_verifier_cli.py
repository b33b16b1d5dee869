"""Every verb of the owner's command line, by table: strict, in one idiom, and never a traceback."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.desks import CHIP, DIGEST, FLOOR, SESSION, UUID, Desk, run

from kagimori_verifier.cli.main import parser


def verbs(made: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Name every verb and every group of verbs."""
    for action in made._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield (*words, name)
                yield from verbs(sub, (*words, name))


GROUPS_AND_VERBS = list(verbs(parser()))
VERBS = [
    one
    for one in GROUPS_AND_VERBS
    if not any(other[: len(one)] == one != other for other in GROUPS_AND_VERBS)
]

GOOD: dict[tuple[str, ...], Callable[[Desk], tuple[str | Path, ...]]] = {
    ("init",): lambda desk: ("--dir", desk.directory / "new"),
    ("identity", "show"): lambda _: (),
    ("identity", "rotate"): lambda _: (),
    ("upgrade",): lambda _: (),
    ("backup",): lambda desk: (f"{desk.directory}/backup-{os.urandom(4).hex()}",),
    ("vm", "add"): lambda _: ("web2", "--profile", "debian"),
    ("vm", "list"): lambda _: (),
    ("vm", "show"): lambda _: ("web1",),
    ("vm", "enable"): lambda _: ("web1",),
    ("vm", "disable"): lambda _: ("web1",),
    ("vm", "remove"): lambda _: ("web1",),
    ("vm", "config"): lambda _: ("web1",),
    ("vm", "code"): lambda _: ("web1", "--expires", "30m"),
    ("vm", "chip", "add"): lambda _: ("web1", "ab" * 64),
    ("vm", "chip", "remove"): lambda _: ("web1", CHIP.upper()),
    ("volume", "list"): lambda _: (),
    ("profile", "add"): lambda _: ("uki", "--boot-way", "uki", "--tcb-floor", FLOOR),
    ("profile", "list"): lambda _: (),
    ("profile", "show"): lambda _: ("debian",),
    ("reference", "measurement", "list"): lambda _: (),
    ("reference", "measurement", "remove"): lambda _: (DIGEST, "--profile", "debian"),
    ("reference", "list"): lambda _: (),
    ("reference", "show"): lambda _: ("1",),
    ("reference", "remove"): lambda _: ("1",),
    ("endorsements", "list"): lambda _: (),
    ("endorsements", "root", "list"): lambda _: (),
    ("ledger", "list"): lambda _: (),
    ("ledger", "refusals"): lambda _: (),
    ("ledger", "verify"): lambda _: (),
    ("explain",): lambda _: ("report.tie",),
}
BAD: dict[tuple[str, ...], tuple[str, ...]] = {
    ("init",): ("--dir", "{desk}"),
    ("backup",): ("{desk}/verifier.toml",),
    ("restore",): ("{desk}/verifier.toml", "--dir", "{desk}/restored", "--kek", "{desk}/kek"),
    ("recovery", "import"): ("--vm", "nobody", "--uuid", UUID),
    ("identity", "activate"): (),
    ("identity", "retire"): ("0123456789abcdef",),
    ("vm", "add"): ("web1", "--profile", "debian"),
    ("vm", "show"): ("nobody",),
    ("vm", "enable"): ("nobody",),
    ("vm", "disable"): ("nobody",),
    ("vm", "remove"): ("nobody",),
    ("vm", "config"): ("nobody",),
    ("vm", "code"): ("nobody",),
    ("vm", "chip", "add"): ("nobody", CHIP),
    ("vm", "chip", "remove"): ("web1", "ab" * 64),
    ("volume", "add"): ("--vm", "nobody", "--device", "/dev/null", "--key-file", "/dev/null"),
    ("volume", "recovery"): (*("--vm", "web1", "--uuid", UUID, "--device", "/dev/null", "--output-fd", "1"),),
    ("volume", "remove"): ("--vm", "web1", UUID),
    ("image", "enrol"): ("/dev/null", "--vm", "nobody", "--key-file", "/dev/null"),
    ("volume", "reseal"): ("--vm", "nobody", "--uuid", UUID, "--device", "/dev/null"),
    ("volume", "accept"): ("--vm", "web1", UUID),
    ("volume", "undo"): ("--vm", "web1", UUID),
    ("volume", "provenance"): ("--vm", "web1", UUID, "unknown"),
    ("profile", "add"): ("debian", "--boot-way", "grub", "--tcb-floor", FLOOR),
    ("profile", "show"): ("nothing",),
    ("profile", "edit"): ("debian", "--file", "/dev/null"),
    ("profile", "remove"): ("debian",),
    ("reference", "measurement", "add"): (
        *(DIGEST, "--profile", "nothing", "--kind", "snp-direct", "--label", "x"),
    ),
    ("reference", "measurement", "remove"): (DIGEST, "--profile", "nothing"),
    ("reference", "pcr", "add"): ("--vm", "nobody", "--label", "x", "--pcrs", "{pcrs}"),
    ("reference", "show"): ("99",),
    ("reference", "remove"): ("99",),
    ("reference", "accept"): (SESSION, "--yes"),
    ("endorsements", "import"): ("/dev/null",),
    ("endorsements", "root", "add"): ("--certificate", "/dev/null", "--label", "x"),
    ("endorsements", "root", "remove"): ("ab" * 32,),
    ("explain",): (SESSION,),
    ("snp", "show"): ("/dev/null",),
    ("snp", "verify"): ("/dev/null", "--vek", "/dev/null", "--ca", "{desk}"),
    ("eventlog", "show"): ("/dev/null",),
    ("eventlog", "replay"): ("/dev/null",),
    ("quote", "verify"): (
        *("--attest", "/dev/null", "--signature", "/dev/null"),
        *("--ak", "/dev/null", "--qualifying", "00"),
    ),
    ("certs", "show"): ("/dev/null",),
}
NEEDS_NOTHING = {
    *(("init",), ("restore",), ("explain",), ("snp", "show"), ("snp", "verify")),
    *(("eventlog", "show"), ("eventlog", "replay"), ("quote", "verify"), ("certs", "show")),
}


def test_the_tables_of_this_file_know_every_verb() -> None:
    """A new verb gets its rows, or this fails."""
    assert set(VERBS) == set(GOOD) | set(BAD) | {("serve",)}


@pytest.mark.parametrize("words", [(), *GROUPS_AND_VERBS], ids=" ".join)
def test_help_of_every_verb_has_an_example(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """What it does, how it is called, and what its exit codes mean."""
    done = run(capsys, *words, "--help")
    assert done.code == 0
    assert "example:\n  kagimori-verifier " in done.out
    assert "exit codes:" in done.out
    assert "--json" in done.out
    assert "--config" in done.out


@pytest.mark.parametrize("words", GOOD, ids=" ".join)
def test_json_is_one_value_on_stdout_and_the_same_words_work_without(
    words: tuple[str, ...], furnished: Desk
) -> None:
    """Programs read stdout whole; people get the same verb in lines."""
    before = furnished.contents()
    shown = furnished(*words, *GOOD[words](furnished), "--json")
    assert shown.code == 0, shown.err
    assert shown.json is not None
    for path, content in before.items():
        Path(path).write_bytes(content)
    shutil.rmtree(furnished.directory / "new", ignore_errors=True)
    for journal in furnished.directory.glob("verifier.db-*"):
        journal.unlink()
    told = furnished(*words, *GOOD[words](furnished))
    assert told.code == 0, told.err
    assert told.out.strip()


@pytest.mark.parametrize("words", BAD, ids=" ".join)
def test_every_error_is_named_with_and_without_json(words: tuple[str, ...], furnished: Desk) -> None:
    """What, expected, found; one JSON value; an exit code of the tree; and nothing was written."""
    pcrs = furnished.directory / "pcrs.json"
    pcrs.write_text(json.dumps({"sha256": {"8": "00" * 32}}))
    arguments = [word.format(desk=furnished.directory, pcrs=pcrs) for word in BAD[words]]
    before = furnished("ledger", "verify", "--json").json
    told = furnished(*words, *arguments)
    assert told.code in {2, 3, 7, 8}
    assert told.out == ""
    assert told.err.startswith("kagimori-verifier: ")
    assert "Traceback" not in told.err
    as_json = furnished("--json", *words, *arguments)
    assert as_json.code == told.code
    assert {"code", "what"} <= set(as_json.json["error"])
    assert as_json.error == as_json.error.lower()
    assert furnished("ledger", "verify", "--json").json == before


@pytest.mark.parametrize("words", [one for one in VERBS if one not in NEEDS_NOTHING], ids=" ".join)
@pytest.mark.parametrize("first", [True, False], ids=["before the verb", "after it"])
def test_a_verb_without_a_verifier_says_where_it_looked(
    words: tuple[str, ...], first: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--config and --json count before the verb and after it."""
    pcrs = tmp_path / "pcrs.json"
    pcrs.write_text(json.dumps({"sha256": {"8": "00" * 32}}))
    rest = [word.format(pcrs=pcrs, desk=tmp_path) for word in BAD.get(words, ())]
    if words in GOOD and not rest:
        rest = [str(word) for word in GOOD[words](Desk(tmp_path, capsys))]
    common = ("--config", str(tmp_path / "absent.toml"), "--json")
    done = run(capsys, *common, *words, *rest) if first else run(capsys, *words, *rest, *common)
    # Some verbs look at their file first, and find it wrong.
    assert done.error in {"settings.read", "policy.invalid", "certificates.layout"}
    if done.error == "settings.read":
        assert str(tmp_path / "absent.toml") in done.json["error"]["what"]


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("nothing",),
        ("vm",),
        ("vm", "add"),
        ("vm", "add", "Web One", "--profile", "debian"),
        ("vm", "add", "web2", "--profile", "debian", "--chip", "00" * 64),
        ("vm", "add", "web2", "--profile", "debian", "--chip", "ab"),
        ("vm", "add", "web2", "--profile", "\udcff"),
        ("vm", "add", "web2", "--prof", "debian"),
        ("vm", "chip", "add", "web1", "zz" * 64),
        ("ledger", "list", "--limit", "99999999999999999999"),
        ("ledger", "list", "--limit", "-1"),
        ("reference", "show", "99999999999999999999"),
        ("reference", "measurement", "add", "5a", "--profile", "p", "--kind", "snp-direct", "--label", "x"),
        ("reference", "pcr", "add", "--label", "x", "--pcrs", "x"),
        ("reference", "pcr", "add", "--vm", "a", "--profile", "b", "--label", "x", "--pcrs", "x"),
        ("reference", "pcr", "add", "--vm", "a", "--label", "\x1b[2J", "--pcrs", "x"),
        ("profile", "add", "x", "--boot-way", "legacy", "--tcb-floor", FLOOR),
        ("profile", "add", "x", "--boot-way", "grub", "--tcb-floor", "Milan"),
        (
            "profile",
            "add",
            "x",
            "--boot-way",
            "grub",
            "--tcb-floor",
            "Milan:boot_loader=999,tee=0,snp=0,microcode=0",
        ),
        ("volume", "add", "--vm", "web1", "--device", "x", "--passphrase-fd", "-1"),
        ("volume", "add", "--vm", "web1", "--device", "x", "--name", 'a"b'),
        ("endorsements", "import"),
        ("init", "--dir", "x", "--listen", "nothing"),
        ("init", "--dir", "x", "--public-url", 'http://a"b'),
        ("init", "--dir", "x", "--public-url", "ftp://a"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_a_usage_error(
    words: tuple[str, ...], furnished: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, and with --json one value, too."""
    monkeypatch.chdir(furnished.directory)
    before = furnished.contents()
    done = furnished("--json", *words)
    assert done.code == 2
    assert {"code", "what"} <= set(done.json["error"])
    assert "Traceback" not in done.err
    assert furnished.contents() == before


FILES: list[tuple[str, ...]] = [
    ("profile", "edit", "debian", "--file"),
    ("reference", "pcr", "add", "--vm", "web1", "--label", "x", "--pcrs"),
    ("reference", "pcr", "add", "--vm", "web1", "--label", "x", "--event-log"),
    ("endorsements", "import"),
    ("endorsements", "root", "add", "--label", "x", "--certificate"),
    ("volume", "add", "--vm", "web1", "--key-file", "/dev/null", "--device"),
]
GARBAGE = {
    "nothing": b"",
    "zeros": bytes(5000),
    "text": b"hello\n",
    "no UTF-8": b"\xff\xfe" * 100,
    "lists in lists": b"[" * 100_000,
    "an object": b"{}",
    "empty values": b'{"sha256":{}}',
    "broken PEM": b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    "half a PEM": b"-----BEGIN ",
    "broken DER": b"\x30\x82\xff\xff" + bytes(100),
    "a certificate table": bytes.fromhex("63da758de6644564adc5f4b93be8accd") + b"\xff" * 8 + bytes(24),
}


@pytest.mark.parametrize("words", FILES, ids=" ".join)
def test_a_file_of_garbage_is_named_and_changes_nothing(words: tuple[str, ...], furnished: Desk) -> None:
    """Whatever it holds: one of our errors, and no line in the ledger."""
    before = furnished("ledger", "verify", "--json").json
    path = furnished.directory / "garbage"
    for name, content in GARBAGE.items():
        path.write_bytes(content)
        done = furnished("--json", *words, path)
        assert done.code in {2, 3, 7, 8}, name
        assert done.error, name
    for missing in (furnished.directory / "absent", furnished.directory, Path("/dev/full")):
        assert furnished("--json", *words, missing).code in {2, 3, 7, 8}, missing
    assert furnished("ledger", "verify", "--json").json == before


def test_a_file_without_end_is_not_read_to_its_end(furnished: Desk) -> None:
    """A device in a file's place is refused by its size."""
    for words in FILES[:3]:
        assert furnished("--json", *words, "/dev/zero").error == "file.size"


def test_settings_of_garbage_are_named_by_every_verb(desk: Desk) -> None:
    """The file that --config names is one more file."""
    for content in GARBAGE.values():
        desk.config.write_bytes(content)
        assert desk("--json", "vm", "list").error in {"settings.toml", "settings.key"}
