"""``certs show``, and what all commands that look at one artefact have in common."""

from __future__ import annotations

import errno
import os
import random
import shlex
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.desks import outside, run

from kagimori_protocol import certificate_table
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.machine import SnpMachine, pack_certificate_table
from kagimori_verifier.cli.main import MODULES, parser

SHOWN = (("snp", "show"), ("eventlog", "show"), ("eventlog", "replay"), ("certs", "show"))


def written(tmp: Path, content: bytes) -> Path:
    """Write a file."""
    path = tmp / "artefact"
    path.write_bytes(content)
    return path


def test_a_table_with_every_kind_of_entry_is_shown(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Certificates by name, chip, firmware and dates; a revocation list; what nobody knows, in hex."""
    machine = SnpMachine(AmdRoot.cached(cache / "amd"))
    unknown = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")
    info = uuid.UUID("ecae0c0f-9502-43b1-afa2-0ae2e0d565b6")
    payloads = machine.chain() | {
        certificate_table.CRL: machine.root.crl([7]),
        unknown: b"\x01\x02",
        info: bytes(8),
    }
    table = pack_certificate_table(payloads).ljust(0x4000, b"\0")
    rows = {
        row["entry"]: row
        for row in run(capsys, "certs", "show", written(tmp_path, table), "--json").json["entries"]
    }
    assert rows["VCEK"]["chip"] == machine.chip_id.hex()
    assert rows["ARK"]["pinned"] == "no: not a root of AMD's"
    assert rows["CRL"]["revoked"] == ["7"]
    assert rows[str(unknown)]["payload"] == "0102"
    assert rows["platform info"]["guid"] == str(info)
    told = run(capsys, "certs", "show", written(tmp_path, table))
    assert told.code == 0
    assert "boot loader" in told.out
    assert "Nothing here is verified" in told.out


def test_an_entry_that_is_no_certificate_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rest of the table is shown all the same."""
    table = pack_certificate_table(
        {certificate_table.VCEK: b"0\x03\x02\x01\x00", certificate_table.ARK: b"no"}
    )
    done = run(capsys, "certs", "show", written(tmp_path, table), "--json")
    assert done.code == 1
    assert [reason[:24] for reason in done.json["reasons"]] == [
        "certificates.entry: VCEK",
        "certificates.entry: ARK:",
    ]


def test_a_host_that_supplied_nothing_is_told_from_a_file_that_is_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table of zeros is what the kernel gives without certificates."""
    done = run(capsys, "certs", "show", written(tmp_path, bytes(16384)))
    assert (done.code, done.out) == (0, "No certificates: the host supplied none.\n")
    assert run(capsys, "certs", "show", written(tmp_path, b""), "--json").error == "file.empty"


def test_a_real_table_names_amds_root(vectors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its pinned key, not by its name."""
    rows = run(capsys, "certs", "show", vectors / "certtable" / "veraison-genoa-auxblob.bin", "--json").json[
        "entries"
    ]
    assert rows[0]["pinned"] == "AMD's ARK-Genoa"


@pytest.mark.parametrize("verb", SHOWN, ids=" ".join)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_no_bytes_end_in_a_traceback(
    verb: tuple[str, str], content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever a file holds, there is a verdict or a reason."""
    path = written(tmp_path, content)
    done = run(capsys, *verb, path, "--json")
    assert done.code in (0, 1, 2)
    assert "Traceback" not in done.err
    told = run(capsys, *verb, path)
    assert told.code == done.code


@pytest.mark.parametrize("verb", SHOWN, ids=" ".join)
@pytest.mark.parametrize("case", ["absent", "a directory", "endless", "a zero byte", "no UTF-8", "text"])
def test_a_file_that_cannot_be_read_as_it_is_says_why(
    verb: tuple[str, str], case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was expected, what was found, what to do, and exit code 2; with --json one object."""
    strange = tmp_path / os.fsdecode(b"caf\xe9 \x1b[2J")
    strange.write_bytes(b"\x01" * 77)
    (tmp_path / "text").write_text("hello\n" * 99)
    paths: dict[str, str | Path] = {
        "absent": tmp_path / "absent",
        "a directory": tmp_path,
        "endless": "/dev/zero",
        "a zero byte": "a\0b",
        "no UTF-8": strange,
        "text": tmp_path / "text",
    }
    done = run(capsys, *verb, paths[case], "--json")
    assert (done.code, done.json["verified"]) == (2, False)
    assert len(done.json["reasons"]) == 1
    assert {"code", "what", "expected", "found", "todo"} <= set(done.json["error"])
    assert "\x1b" not in done.err
    if case == "endless":
        assert "at most" in done.json["error"]["expected"]


def test_a_file_that_this_user_may_not_read_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system's own words; made up here, since root may read everything."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    path = written(tmp_path, b"secret")
    monkeypatch.setattr(Path, "open", refuse)
    done = run(capsys, "snp", "show", path, "--json")
    assert (done.code, done.json["error"]["found"]) == (2, "Permission denied")


@pytest.mark.parametrize(
    "words",
    [
        ("snp",),
        ("snp", "verify"),
        ("snp", "show"),
        ("snp", "show", "a", "b"),
        ("eventlog", "repl"),
        ("quote", "verify", "--attest", "x"),
        ("certs", "show", "--pcrs", "x", "y"),
    ],
    ids=" ".join,
)
def test_words_that_make_no_sense_are_a_usage_error(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing was verified, for programs that look only there."""
    done = run(capsys, *words, "--json")
    assert (done.code, done.error, done.json["verified"]) == (2, "usage", False)


def test_every_verb_is_declared_by_the_module_that_is_imported_for_it() -> None:
    """A verb that stands at the wrong module would be unknown."""
    for verb in MODULES:
        made = parser(verb)
        (verbs,) = (action for action in made._actions if hasattr(action, "add_parser"))
        assert verb in (verbs.choices or {})
    (verbs,) = (action for action in parser()._actions if hasattr(action, "add_parser"))
    assert list(verbs.choices or {}) == list(MODULES)


@pytest.mark.parametrize(
    "words", ["snp show", "eventlog replay", "quote verify --attest a --signature b --ak c --qualifying 00"]
)
def test_no_verifier_and_no_database_is_loaded_to_look_at_a_file(words: str) -> None:
    """They start fast, and on a machine where nothing is set up: the import budget of these verbs."""
    words += " /dev/null" if "quote" not in words else ""
    program = (
        "import sys; from kagimori_verifier.cli import main; code = main(sys.argv[1:]); "
        "print(code, [name for name in ('sqlalchemy', 'alembic', 'starlette', 'uvicorn', 'rich', 'structlog', "
        "'prometheus_client', 'kagimori_verifier.settings', 'kagimori_verifier.pipeline') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words.split()],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout == "2 []\n"


def test_as_a_process_a_reader_that_has_gone_is_no_traceback(vectors: Path) -> None:
    """``eventlog show LOG | head`` ends quietly."""
    log = vectors / "eventlog" / "ubuntu-2404-amd-sevsnp.bin"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stdout:
        done = outside("eventlog", "show", log, stdout=stdout, stderr=subprocess.PIPE, capture_output=False)
    assert done.stderr == ""
    noise = random.Random(6).randbytes(3000)
    refused = subprocess.run(
        [sys.executable, "-m", "kagimori_verifier", "snp", "show", "-"],
        input=noise,
        capture_output=True,
        check=False,
    )
    assert refused.returncode == 2
    assert b"expected: 1184 bytes" in refused.stderr


@pytest.mark.parametrize("form", ["--json", ""])
@pytest.mark.parametrize("end", ["a pipe that nobody reads", "closed"])
def test_as_a_process_a_verdict_is_the_exit_code_whoever_listens(
    end: str, form: str, vectors: Path, tmp_path: Path
) -> None:
    """``... | grep -q`` under pipefail, or ``>&-``: what does not hold must not pass for what holds."""
    broken = tmp_path / "log.bin"
    broken.write_bytes((vectors / "eventlog" / "rhel8-uefi.bin").read_bytes()[:-1])
    whole = vectors / "eventlog" / "ubuntu-2404-amd-sevsnp.bin"
    pcrs = whole.with_name(f"{whole.name}.pcrs.json")
    for words, code in (((broken,), 1), ((whole, "--pcrs", pcrs), 0), ((tmp_path / "absent",), 2)):
        command = [sys.executable, "-m", "kagimori_verifier", "eventlog", "replay", *map(str, words), form]
        shell = " ".join(map(shlex.quote, filter(None, command)))
        if end == "closed":
            done = subprocess.run(["sh", "-c", f"{shell} >&-"], capture_output=True, text=True, check=False)
        else:
            reader, writer = os.pipe()
            os.close(reader)
            with os.fdopen(writer, "wb") as stdout:
                done = subprocess.run(
                    ["sh", "-c", shell], stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
                )
        assert done.returncode == code
        assert "Traceback" not in done.stderr
