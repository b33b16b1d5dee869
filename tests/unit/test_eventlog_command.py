"""``eventlog show`` and ``eventlog replay``: logs of every kind are read, and no changed one leads to a TPM's PCRs."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.desks import Done, outside, run

from kagimori_protocol.errors import NotAuthentic
from kagimori_verifier.examine import eventlog as examine
from kagimori_verifier.verify import eventlog

IDS = {"sha1": 0x4, "sha256": 0xB, "sha384": 0xC, "sha512": 0xD}
NO_ACTION, SEPARATOR, IPL = 0x3, 0x4, 0xD
PAIRS = (
    "arch-linux-workstation",
    "cos-85-amd-sev",
    "debian-10",
    "glinux-alex",
    "rhel8-uefi",
    "ubuntu-2404-amd-sevsnp",
)


def digest(bank: str, data: bytes) -> bytes:
    """Hash for a bank; unknown ones get bytes of the size of SM3."""
    return hashlib.new(bank, data).digest() if bank in IDS else bytes(32)


def legacy(pcr: int, kind: int, data: bytes, sha1: bytes | None = None) -> bytes:
    """Write a TCG_PCR_EVENT."""
    return struct.pack("<II20sI", pcr, kind, digest("sha1", data) if sha1 is None else sha1, len(data)) + data


def header(banks: Sequence[str] = ("sha256",), pcr: int = 0) -> bytes:
    """Write a TCG_EfiSpecIdEvent."""
    data = b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, len(banks))
    data += b"".join(struct.pack("<HH", IDS.get(bank, 0x12), len(digest(bank, b""))) for bank in banks)
    return legacy(pcr, NO_ACTION, data + b"\0", bytes(20))


def event(pcr: int, kind: int, data: bytes, banks: Sequence[str] = ("sha256",)) -> bytes:
    """Write a TCG_PCR_EVENT2 whose digests are over its data."""
    digests = b"".join(struct.pack("<H", IDS.get(bank, 0x12)) + digest(bank, data) for bank in banks)
    return struct.pack("<III", pcr, kind, len(banks)) + digests + struct.pack("<I", len(data)) + data


def extended(bank: str, *data: bytes, start: int = 0) -> str:
    """Give what a PCR holds after these were measured."""
    value = bytes(len(digest(bank, b"")) - 1) + bytes([start])
    for one in data:
        value = digest(bank, value + digest(bank, one))
    return value.hex()


class Replay:
    """Runs ``eventlog replay`` on bytes."""

    def __init__(self, tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.tmp, self.capsys = tmp, capsys

    def __call__(self, log: bytes, pcrs: object = None) -> Done:
        path = self.tmp / "log.bin"
        path.write_bytes(log)
        words: tuple[str | Path, ...] = ("eventlog", "replay", path, "--json")
        if pcrs is not None:
            file = self.tmp / "pcrs.json"
            file.write_bytes(pcrs if isinstance(pcrs, bytes) else json.dumps(pcrs).encode())
            words = (*words, "--pcrs", file)
        done = run(self.capsys, *words)
        assert "Traceback" not in done.err
        assert done.json["verified"] is (done.code == 0)
        return done

    def holds(self, log: bytes, pcrs: object = None) -> Any:  # noqa: ANN401 - whatever JSON can hold
        done = self(log, pcrs)
        assert (done.code, done.json["reasons"]) == (0, [])
        return done.json

    def fails(self, reason: str, log: bytes, pcrs: object = None, code: int = 1) -> list[str]:
        done = self(log, pcrs)
        assert done.code == code, done.out
        reasons: list[str] = done.json["reasons"]
        assert any(told.startswith(reason) for told in reasons), reasons
        return reasons


@pytest.fixture
def replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Replay:
    """Give the command."""
    return Replay(tmp_path, capsys)


def pair(vectors: Path, name: str) -> tuple[bytes, Mapping[str, Mapping[str, str]]]:
    """Give a real log and the PCRs of its TPM."""
    log = vectors / "eventlog" / f"{name}.bin"
    return log.read_bytes(), json.loads(log.with_name(f"{name}.bin.pcrs.json").read_bytes())


def places(raw: bytes) -> list[tuple[int, int, eventlog.Event]]:
    """Give each event of a real log with where it begins and ends."""
    found, at = [], 0
    log = eventlog.parse(raw)
    for one in log.events:
        agile = at > 0 and len(raw) > 32 and raw[32:48] == b"Spec ID Event03\0"
        digests = sum(2 + len(value) for value in one.digests.values())
        size = 12 + digests + 4 + len(one.data) if agile else 32 + len(one.data)
        found.append((at, at + size, one))
        at += size
    assert at == len(raw)
    return found


# Real logs, changed


@pytest.mark.parametrize("name", PAIRS)
def test_a_changed_digest_of_a_real_log_names_its_pcr(name: str, vectors: Path, replay: Replay) -> None:
    """In whatever bank: the PCR of this event, in this bank, and no other."""
    raw, pcrs = pair(vectors, name)
    chance = random.Random(name)
    measured = [(start, one) for start, _, one in places(raw) if one.type != NO_ACTION]
    for start, one in chance.sample(measured, 8):
        bank = chance.choice(sorted(set(one.digests) & set(pcrs)))
        at = raw.index(one.digests[bank], start)
        changed = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
        (reason,) = replay.fails(f"eventlog.replay: expected PCR {one.pcr} ({bank}) ", changed, pcrs)
        assert pcrs[bank][str(one.pcr)] in reason


@pytest.mark.parametrize("name", PAIRS)
def test_an_event_that_is_missing_from_a_real_log_names_its_pcr(
    name: str, vectors: Path, replay: Replay
) -> None:
    """What was measured cannot be left out, nor told twice."""
    raw, pcrs = pair(vectors, name)
    for start, end, one in random.Random(name).sample(places(raw)[1:], 6):
        if one.type == NO_ACTION:
            continue
        for changed in (raw[:start] + raw[end:], raw[:end] + raw[start:]):
            reasons = replay.fails(f"eventlog.replay: expected PCR {one.pcr} ", changed, pcrs)
            assert len(reasons) == len(pcrs)


@pytest.mark.parametrize("name", PAIRS)
def test_a_real_log_that_is_cut_off_is_refused(name: str, vectors: Path, replay: Replay) -> None:
    """Inside an event the log itself shows it; between two, only the TPM does."""
    raw, pcrs = pair(vectors, name)
    chance = random.Random(name)
    borders = [start for start, _, _ in places(raw)][2:]
    for at in chance.sample(borders, 5):
        replay.fails("eventlog.replay: ", raw[:at], pcrs)
    for at in chance.sample(range(borders[0] + 1, len(raw)), 12):
        if at not in borders:
            replay.fails("eventlog.layout: ", raw[:at])


def test_all_events_of_a_pcr_cannot_be_left_out(vectors: Path, replay: Replay) -> None:
    """GRUB's PCR 9 without any event in the log is not one that the log says nothing about."""
    raw, pcrs = pair(vectors, "ubuntu-2404-amd-sevsnp")
    without = b"".join(raw[start:end] for start, end, one in places(raw) if one.pcr != 9)
    reasons = replay.fails("eventlog.replay: expected PCR 9 (sha256) ", without, pcrs)
    assert all("the log has no event of it" in reason for reason in reasons)


def test_a_start_at_locality_3_cannot_be_denied(vectors: Path, replay: Replay) -> None:
    """PCR 0 starts with 3 there; without the event that says so it comes out differently."""
    raw, pcrs = pair(vectors, "glinux-alex")
    (silent,) = [(start, end) for start, end, one in places(raw)[1:] if one.type == NO_ACTION]
    replay.fails("eventlog.replay: expected PCR 0 ", raw[: silent[0]] + raw[silent[1] :], pcrs)


# What is compared


def test_pcrs_that_the_system_extends_by_itself_are_named_and_not_compared(
    vectors: Path, replay: Replay
) -> None:
    """IMA's PCR 10 moves without the firmware's log; PCR 6 never does."""
    directory = vectors / "gce-tpm" / "gce-cos-85-nonce9009"
    raw, pcrs = (
        (directory / "eventlog.bin").read_bytes(),
        json.loads((directory / "pcrs_sha256.json").read_bytes()),
    )
    told = replay.holds(raw, pcrs)
    assert told["unexplained"] == {"sha256": [10]}
    assert any(note.startswith("not compared: PCR 10 (sha256)") for note in told["notes"])
    replay.fails("eventlog.replay: expected PCR 6 (sha256) ", raw, pcrs | {"6": "00" * 32})
    replay.fails("eventlog.pcrs: ", raw, {"10": pcrs["10"], "16": pcrs["16"]})


def test_a_bank_that_the_log_does_not_have_cannot_be_compared(vectors: Path, replay: Replay) -> None:
    """A log of SHA-1 says nothing of what the TPM has in SHA-256."""
    raw, pcrs = pair(vectors, "debian-10")
    replay.fails("eventlog.bank: ", raw, dict(pcrs) | {"sha256": {"0": "00" * 32}})
    told = replay.holds(raw, pcrs)
    assert any("a verifier refuses a boot with such a log: eventlog.bank" in note for note in told["notes"])
    assert any("only SHA-1 values were compared" in note for note in told["notes"])


def test_pcrs_of_the_log_that_were_not_given_are_named(replay: Replay) -> None:
    """Nobody should think that they were compared."""
    log = header() + event(4, SEPARATOR, b"four") + event(9, IPL, b"nine")
    told = replay.holds(log, {"4": extended("sha256", b"four")})
    assert "not compared: PCR 9 (sha256), which were not given" in told["notes"]
    assert any("nothing was compared" in note for note in replay.holds(log)["notes"])
    both = ("sha1", "sha256")
    told = replay.holds(header(both) + event(4, SEPARATOR, b"four", both), {"4": extended("sha256", b"four")})
    assert any(note.startswith("not compared: the log's sha1 digests") for note in told["notes"])


# Logs of other kinds


@pytest.mark.parametrize(
    "banks",
    [
        ("sha1",),
        ("sha384",),
        ("sha256", "sm3"),
        ("sha1", "sha256", "sha384", "sha512"),
        ("sha512", "sm3", "sha384", "sha256", "sha1"),
    ],
    ids="+".join,
)
def test_a_log_of_any_banks_is_replayed_in_each_that_is_known(banks: tuple[str, ...], replay: Replay) -> None:
    """One to five, in any order; one that nobody here can compute is named."""
    log = header(banks) + event(0, 0x80000008, b"blob", banks) + event(7, SEPARATOR, b"\0" * 4, banks)
    known = [bank for bank in banks if bank in IDS]
    told = replay.holds(log, {bank: {"0": extended(bank, b"blob")} for bank in known})
    assert sorted(told["banks"]) == sorted(known)
    assert any("cannot be replayed here: 0x0012" in note for note in told["notes"]) is ("sm3" in banks)


def test_a_log_without_any_known_bank_leads_nowhere(replay: Replay) -> None:
    """What cannot be computed does not hold."""
    replay.fails("eventlog.bank: ", header(("sm3",)) + event(0, SEPARATOR, b"\0" * 4, ("sm3",)))


@pytest.mark.parametrize("padding", [b"\xff" * 8, b"\xff" * 4000, bytes(4000)], ids=["few", "ones", "zeros"])
@pytest.mark.parametrize("agile", [True, False], ids=["crypto-agile", "legacy"])
def test_the_padded_log_of_a_tdx_guest_is_read(padding: bytes, agile: bool, replay: Replay) -> None:
    """CCEL: the PCR is a measurement register, and the area behind the log is padded."""
    bank = "sha384" if agile else "sha1"
    log = header((bank,)) + event(1, IPL, b"td", (bank,)) if agile else legacy(1, IPL, b"td")
    told = replay.holds(
        log + padding, {bank: {"1": extended(bank, b"td"), "2": "00" * len(digest(bank, b""))}}
    )
    assert f"{len(padding)} bytes after the last event are padding" in told["notes"]
    assert any("a verifier refuses a boot with such a log" in note for note in told["notes"])


def test_a_header_for_a_measurement_register_begins_the_log_of_a_tdx_guest(replay: Replay) -> None:
    """EDK2 writes it so, as PCR 0 of a TPM corresponds to register 1 there; the pipeline does not take it."""
    banks = ("sha384",)
    log = header(banks, pcr=1) + event(1, IPL, b"td", banks) + event(3, IPL, b"os", banks) + b"\xff" * 4096
    told = replay.holds(log, {"1": extended("sha384", b"td"), "2": "00" * 48, "3": extended("sha384", b"os")})
    assert "a log of a TDX guest: PCR n stands for RTMR n-1" in told["notes"]
    told = replay.holds(log, {"0": "aa" * 48, "1": extended("sha384", b"td"), "4": "bb" * 48})
    assert told["unexplained"] == {"sha384": [0, 4]}  # MRTD, and RTMR 3, which is the operating system's
    replay.fails(
        "eventlog.replay: expected PCR 2 (sha384)", log, {"1": extended("sha384", b"td"), "2": "cc" * 48}
    )
    with pytest.raises(NotAuthentic):
        eventlog.parse(log.rstrip(b"\xff"))
    replay.fails("eventlog.layout: ", header(banks, pcr=2) + event(1, IPL, b"td", banks))


@pytest.mark.parametrize("dropped", [0, 4, 5, 9])
def test_a_header_that_says_tdx_opens_no_pcr_of_a_tpm(dropped: int, vectors: Path, replay: Replay) -> None:
    """Nothing vouches for the header: whoever leaves out a PCR's events could write it, too."""
    raw, pcrs = pair(vectors, "ubuntu-2404-amd-sevsnp")
    cut = b"".join(raw[start:end] for start, end, one in places(raw) if one.pcr != dropped or not start)
    forged = (1).to_bytes(4, "little") + cut[4:]
    replay.fails(f"eventlog.replay: expected PCR {dropped} (sha256) ", forged, pcrs)
    few = {str(pcr): pcrs["sha256"][str(pcr)] for pcr in (dropped, 1, 2)}
    replay.fails(f"eventlog.replay: expected PCR {dropped} (sha256) ", forged, few)


def test_a_log_that_calls_itself_tdx_has_no_more_registers_than_a_td(replay: Replay) -> None:
    """Events of a fifth register, or values of more than there are, belong to a TPM."""
    banks = ("sha384",)
    log = header(banks, pcr=1) + event(1, IPL, b"td", banks)
    values = {"0": "aa" * 48, "1": extended("sha384", b"td")}
    replay.fails("eventlog.replay: expected PCR 0 ", log, values | {"7": "bb" * 48})
    replay.fails("eventlog.replay: expected PCR 0 ", log + event(7, IPL, b"db", banks), values)
    replay.fails("eventlog.events: ", struct.pack("<II20sI", 0xFFFFFFFF, NO_ACTION, bytes(20), 0), values)


@pytest.mark.parametrize(
    "rest",
    [
        b"\xff" * 7,
        bytes(7),
        b"\xff" * 40 + b"\0",
        bytes(40) + b"\xff",
        b"\xff" * 40 + bytes(40),
        b"padding!" * 5,
    ],
    ids=["few ones", "few zeros", "ones, then a zero", "zeros, then a one", "both", "text"],
)
def test_what_is_no_padding_is_not_passed_over(rest: bytes, replay: Replay) -> None:
    """Bytes behind a log could be events that somebody broke on purpose."""
    replay.fails("eventlog.layout: ", header() + event(1, IPL, b"td") + rest)


def test_an_area_that_nothing_was_logged_to_is_no_log(replay: Replay) -> None:
    """All zeros would be events of PCR 0 to a careless reader."""
    replay.fails("eventlog.layout: ", bytes(65536), code=2)
    replay.fails("eventlog.layout: ", b"\xff" * 65536, code=2)


@pytest.mark.parametrize("agile", [True, False], ids=["crypto-agile", "legacy"])
def test_windows_events_for_no_pcr_extend_nothing(
    agile: bool, replay: Replay, capsys: pytest.CaptureFixture[str]
) -> None:
    """They stand at the log's end with the index 0xffffffff; they are shown, and not replayed."""
    trailer = event(0xFFFFFFFF, NO_ACTION, b"trust") if agile else legacy(0xFFFFFFFF, NO_ACTION, b"trust")
    log = header() + event(7, SEPARATOR, b"\0" * 4) if agile else legacy(7, SEPARATOR, b"\0" * 4)
    bank = "sha256" if agile else "sha1"
    told = replay.holds(log + trailer, {bank: {"7": extended(bank, b"\0" * 4)}})
    assert set(told["banks"][bank]) == {"7"}
    assert any("1 events are for no PCR" in note for note in told["notes"])
    shown = run(capsys, "eventlog", "show", replay.tmp / "log.bin", "--json").json
    assert shown["events"][-1]["pcr"] is None
    assert "no PCR" in run(capsys, "eventlog", "show", replay.tmp / "log.bin").out


@pytest.mark.parametrize(("locality", "start"), [(0, 0), (3, 3), (4, 4)])
def test_the_locality_of_startup_counts_for_pcr_0(locality: int, start: int, replay: Replay) -> None:
    """And an H-CRTM means 4, with or without a word about it."""
    silent = event(0, NO_ACTION, b"StartupLocality\0" + bytes([locality]))
    log = header() + silent + event(0, 0x8, b"version")
    replay.holds(log, {"0": extended("sha256", b"version", start=start)})
    hcrtm = header() + event(0, 0x80000010, b"HCRTM") + event(0, 0x8, b"version")
    replay.holds(hcrtm, {"0": extended("sha256", b"HCRTM", b"version", start=4)})


def test_silent_events_of_any_content_extend_nothing(replay: Replay) -> None:
    """EV_NO_ACTION carries what firmware likes to say, short or long."""
    silent = b"".join(
        event(pcr, NO_ACTION, data) for pcr, data in ((0, b""), (6, b"x"), (0, b"SP800-155 Event\0" * 3))
    )
    replay.holds(header() + silent + event(6, SEPARATOR, b"\0" * 4), {"6": extended("sha256", b"\0" * 4)})
    replay.fails("eventlog.events: ", header() + silent)


def test_the_pipeline_refuses_what_the_command_reads_beyond_it(replay: Replay) -> None:
    """Padding and events for no PCR are for looking at; no key is ever released because of such a log."""
    good = header() + event(7, SEPARATOR, b"\0" * 4)
    for more in (bytes(64), b"\xff" * 64, event(0xFFFFFFFF, NO_ACTION, b"trust")):
        assert examine.parse(good + more).refusal is not None
        with pytest.raises(NotAuthentic):
            eventlog.parse(good + more)
    assert examine.parse(good).refusal is None


# Files that are something else


@pytest.mark.parametrize(
    "pcrs",
    [
        b"", b"{}", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100000, b'{"sha256": {}}', b'{"sha256": []}',
        b'{"sm3": {"0": "00"}}', b'{"0": "zz"}', b'{"0": 1}', b'{"24": "' + b"00" * 32 + b'"}',
        b'{"00": "' + b"00" * 32 + b'"}', b'{"sha256": {"0": "' + b"00" * 20 + b'"}}',
        b'{"0": "' + b"00" * 20 + b'", "1": "' + b"00" * 32 + b'"}',
        b'{"0": "' + b"00" * 32 + b'", "0": "' + b"11" * 32 + b'"}',
        b'{"sha256": {"0": "' + b"00" * 32 + b'"}, "SHA-256": {"0": "' + b"11" * 32 + b'"}}',
    ],
)  # fmt: skip
def test_pcr_values_in_another_form_are_refused(pcrs: bytes, replay: Replay) -> None:
    """Nothing is guessed: no value, a value twice, of the wrong size or for no PCR."""
    done = replay(header() + event(0, SEPARATOR, b"\0" * 4), pcrs)
    assert done.code == 2
    assert done.error in ("pcrs.layout", "file.empty")


@pytest.mark.parametrize("verb", ["show", "replay"])
@pytest.mark.parametrize(
    "content", [b"", b"\0", b"\xff" * 3, b"text\n" * 50, random.Random(2).randbytes(5000)]
)
def test_bytes_that_are_no_log_are_said_to_be_none(
    verb: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was expected, what was found, and what to do."""
    path = tmp_path / "log.bin"
    path.write_bytes(content)
    done = run(capsys, "eventlog", verb, path, "--json")
    assert done.code == 2
    assert {"what", "expected", "found", "todo"} <= set(done.json["error"])


def test_show_says_of_each_event_how_much_of_it_is_measured(
    vectors: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path that GRUB logs beside a file's digest is text; a command is not."""
    path = vectors / "eventlog" / "ubuntu-2404-amd-sevsnp.bin"
    events = run(capsys, "eventlog", "show", path, "--json").json["events"]
    ipl = [one for one in events if one["type_name"] == "EV_IPL"]
    assert {one["covered"] for one in ipl if one["pcr"] == 8} == {
        "GRUB's text, not the prefix that says what it is"
    }
    assert {one["covered"] for one in ipl if one["pcr"] == 9} == {None}
    told = run(capsys, "eventlog", "show", path).out
    assert "NOT covered by the digest" in told
    assert "extends nothing: the TPM vouches for none of it" in told
    assert "EV_EFI_VARIABLE_DRIVER_CONFIG  SecureBoot = 00" in told
    assert all(one["data"] == "" or bytes.fromhex(one["data"]) for one in events)


def test_as_a_process_with_the_log_on_stdin(vectors: Path) -> None:
    """What a script runs."""
    path = vectors / "eventlog" / "rhel8-uefi.bin"
    with path.open("rb") as stdin:
        done = outside(
            *("eventlog", "replay", "-", "--json", "--pcrs", f"{path}.pcrs.json"),
            stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, capture_output=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr, json.loads(done.stdout)["verified"]) == (0, "", True)
