"""Event logs: what is refused, and what the rest is replayed to."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import TYPE_CHECKING

import pytest

from kagimori_protocol.errors import NotAuthentic
from kagimori_verifier.verify.eventlog import UserspaceExtend, parse, replay, replay_to
from kagimori_verifier.verify.eventlog_layout import MAX_EVENTS, MAX_SIZE
from kagimori_verifier.verify.eventlog_names import LINE_LENGTH, describe

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

NO_ACTION, SEPARATOR, IPL, HCRTM = 0x3, 0x4, 0xD, 0x80000010

WITH_PCRS = (
    "arch-linux-workstation",
    "cos-85-amd-sev",
    "debian-10",
    "glinux-alex",
    "rhel8-uefi",
    "ubuntu-2104-no-secure-boot",
    "ubuntu-2404-amd-sevsnp",
)
WITHOUT_PCRS = (
    "keylime-binary_bios_measurements",
    "sb_cert",
    "tpm2tools-event-sd-boot-fedora37",
    "tpm2tools-event-uefivar",
)


def sha256(data: bytes) -> bytes:
    """Hash for the bank that is judged."""
    return hashlib.sha256(data).digest()


def chain(*digests: bytes, start: bytes = bytes(32)) -> bytes:
    """Extend one digest after the other."""
    for digest in digests:
        start = sha256(start + digest)
    return start


def header(
    algorithms: Sequence[tuple[int, int]] = ((0xB, 32),), vendor: bytes = b"", major: int = 2
) -> bytes:
    """Write a TCG_PCR_EVENT with a TCG_EfiSpecIdEvent."""
    data = b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, major, 0, 2, len(algorithms))
    data += b"".join(struct.pack("<HH", *algorithm) for algorithm in algorithms)
    data += bytes([len(vendor)]) + vendor
    return struct.pack("<II20sI", 0, NO_ACTION, bytes(20), len(data)) + data


def event(pcr: int, kind: int, data: bytes, *digests: tuple[int, bytes]) -> bytes:
    """Write one TCG_PCR_EVENT2; without digests, one of SHA-256 over the data."""
    chosen = digests or ((0xB, sha256(data)),)
    body = b"".join(struct.pack("<H", algorithm) + digest for algorithm, digest in chosen)
    return struct.pack("<III", pcr, kind, len(chosen)) + body + struct.pack("<I", len(data)) + data


def refused(raw: bytes) -> NotAuthentic:
    """Return the error by which ``raw`` is refused."""
    with pytest.raises(NotAuthentic) as caught:
        parse(raw)
    assert caught.value.code == "eventlog.layout"
    assert caught.value.expected
    assert "at byte" in str(caught.value.found) or "StartupLocality" in str(caught.value.expected)
    return caught.value


SEPARATOR_0 = event(0, SEPARATOR, bytes(4))


@pytest.mark.parametrize("name", WITH_PCRS)
def test_a_real_log_replays_to_the_pcrs_of_its_tpm_in_every_bank(vectors: Path, name: str) -> None:
    """Every PCR that the real TPM reported comes out, and the events are those of these PCRs."""
    log = parse((vectors / f"eventlog/{name}.bin").read_bytes())
    banks = json.loads((vectors / f"eventlog/{name}.bin.pcrs.json").read_text())
    for bank, pcrs in banks.items():
        quoted = {int(index): bytes.fromhex(digest) for index, digest in pcrs.items()}
        assert dict(replay(log, bank).values) == quoted
        events = replay_to(log, quoted, bank=bank)
        assert list(events) == sorted(quoted)
        assert sum(map(len, events.values())) == sum(event.type != NO_ACTION for event in log.events)


@pytest.mark.parametrize("name", WITHOUT_PCRS)
def test_a_real_log_without_known_pcrs_is_read_whole_and_described(vectors: Path, name: str) -> None:
    """Each of its events gets a line of printable ASCII that fits a screen."""
    log = parse((vectors / f"eventlog/{name}.bin").read_bytes())
    assert replay(log).values
    assert log.startup_locality == (3 if name.startswith("keylime") else 0)
    for logged in log.events:
        line = describe(logged)
        assert line.isascii()
        assert line.isprintable()
        assert len(line) <= LINE_LENGTH


def test_a_real_quote_names_the_pcr_that_the_kernel_extended_without_a_log(vectors: Path) -> None:
    """COS measures into PCR 10 by IMA, which no firmware log knows: exactly that PCR is named."""
    folder = vectors / "gce-tpm/gce-cos-85-nonce9009"
    log = parse((folder / "eventlog.bin").read_bytes())
    pcrs = json.loads((folder / "pcrs_sha256.json").read_text())
    quoted = {int(index): bytes.fromhex(digest) for index, digest in pcrs.items()}
    with pytest.raises(NotAuthentic, match=r"quoted value of PCR 10\.") as caught:
        replay_to(log, quoted)
    assert caught.value.code == "eventlog.replay"
    assert caught.value.found == "PCR 10 is zero after no logged events"
    del quoted[10]
    assert replay_to(log, quoted)[11] == ()


def test_an_empty_log_is_refused(vectors: Path) -> None:
    """No bytes are no log, whatever the reason."""
    assert "empty" in refused((vectors / "eventlog-bad/keylime-empty.bin").read_bytes()).what
    refused(b"")


def test_a_log_of_one_silent_event_measures_nothing_and_has_no_bank_to_judge(vectors: Path) -> None:
    """It can be shown (it is a SHA-1 log with a StartupLocality event), but proves nothing."""
    log = parse((vectors / "eventlog-bad/short_no_action.bin").read_bytes())
    assert (log.algorithms, log.startup_locality) == (("sha1",), 3)
    assert not replay(log, "sha1").values
    with pytest.raises(NotAuthentic) as caught:
        replay_to(log, {0: bytes(32)})
    assert caught.value.code == "eventlog.bank"


def test_firmware_that_logs_less_than_it_measures_is_caught_at_the_pcr_concerned(vectors: Path) -> None:
    """Without the two ExitBootServices events, PCR 5 differs; told as known extends, it fits."""
    log = parse((vectors / "eventlog-bad/ebs_event_missing_sha1.bin").read_bytes())
    unlogged = [
        UserspaceExtend(5, hashlib.sha1(text).digest(), "ExitBootServices")  # noqa: S324 # the log's only bank
        for text in (b"Exit Boot Services Invocation", b"Exit Boot Services Returned with Success")
    ]
    quoted = dict(replay(log, "sha1", unlogged).values)
    with pytest.raises(NotAuthentic, match=r"quoted value of PCR 5\."):
        replay_to(log, quoted, bank="sha1")
    assert len(replay_to(log, quoted, bank="sha1", userspace_extends=unlogged)[5]) == 3


@pytest.mark.parametrize("name", ["debian-10", "ubuntu-2404-amd-sevsnp"])
@pytest.mark.parametrize(
    "padding", [bytes(7), bytes(64), b"\xff" * 7, b"\xff" * 64], ids=lambda p: p.hex()[:16]
)
def test_padding_behind_the_last_event_is_refused(vectors: Path, name: str, padding: bytes) -> None:
    """The kernel pads the log of a TD, never that of a TPM; bytes that nothing measured have no place."""
    if name == "debian-10" and padding == bytes(64):
        padding = bytes(65)  # two whole legacy events of zeros are events for PCR 0, and change its replay
    refused((vectors / f"eventlog/{name}.bin").read_bytes() + padding)


def test_a_log_cut_short_is_refused_or_does_not_replay(vectors: Path) -> None:
    """Cut inside an event it is no log; cut between two, the quoted PCRs are missed."""
    raw = (vectors / "eventlog/ubuntu-2404-amd-sevsnp.bin").read_bytes()
    whole = parse(raw)
    quoted = dict(replay(whole).values)
    for end in range(0, len(raw), 331):
        refused(raw[:end])
    end = len(raw)
    for last in reversed(whole.events[1:]):
        end -= 4 * 3 + sum(2 + len(digest) for digest in last.digests.values()) + 4 + len(last.data)
        with pytest.raises(NotAuthentic) as caught:
            replay_to(parse(raw[:end]), quoted)
        assert caught.value.code == "eventlog.replay"


def test_a_log_longer_than_any_message_is_refused() -> None:
    """The size is judged before anything is read."""
    assert str(MAX_SIZE) in str(refused(bytes(MAX_SIZE + 1)).expected)


def test_a_log_with_too_many_events_is_refused() -> None:
    """The header counts as an event."""
    tiny = event(0, SEPARATOR, b"")
    assert len(parse(header() + tiny * (MAX_EVENTS - 1)).events) == MAX_EVENTS
    assert "too many" in refused(header() + tiny * MAX_EVENTS).what


@pytest.mark.parametrize("pcr", [24, 0xFFFFFFFF])
def test_an_event_for_a_pcr_that_no_tpm_has_is_refused(pcr: int) -> None:
    """Windows writes PCR 0xFFFFFFFF behind its log; only Linux is judged here."""
    error = refused(header() + SEPARATOR_0 + event(pcr, SEPARATOR, bytes(4)))
    assert error.found == f"PCR {pcr}, at byte {len(header() + SEPARATOR_0)}"


@pytest.mark.parametrize(
    "digests",
    [
        [(0xB, bytes(32)), (0xB, bytes(32))],
        [(0xB, bytes(32)), (0xC, bytes(48))],
        [(0x4, bytes(20)), (0xB, bytes(32)), (0xC, bytes(48))],
    ],
    ids=["twice", "unknown", "too many"],
)
def test_an_event_may_carry_only_algorithms_of_the_header_each_once(digests: list[tuple[int, bytes]]) -> None:
    """The length of any other digest would be a guess."""
    refused(header([(0x4, 20), (0xB, 32)]) + event(0, SEPARATOR, bytes(4), *digests))
    refused(header() + struct.pack("<IIII", 0, SEPARATOR, 0, 0))


def test_a_bank_that_some_event_lacks_makes_the_log_no_log() -> None:
    """Otherwise an extend could be hidden from the bank that is judged."""
    both, one_bank = ((0x4, bytes(20)), (0xB, bytes(32))), ((0xB, bytes(32)),)
    algorithms = header([(0x4, 20), (0xB, 32)])
    for first, second in ((both, one_bank), (one_bank, both)):
        error = refused(algorithms + event(0, SEPARATOR, b"", *first) + event(1, SEPARATOR, b"", *second))
        assert "other banks" in error.what
    assert parse(algorithms + event(0, SEPARATOR, b"", *reversed(both))).algorithms == ("sha1", "sha256")


def test_firmware_may_list_banks_that_it_never_extends() -> None:
    """A real log lists four and computes two; only what every extend has is a bank of the log."""
    silent = event(0, NO_ACTION, b"StartupLocality\0\0", (0x4, bytes(20)), (0xB, bytes(32)))
    log = parse(header([(0x4, 20), (0xB, 32)]) + silent + event(0, SEPARATOR, b"", (0xB, bytes(32))))
    assert log.algorithms == ("sha256",)
    with pytest.raises(NotAuthentic, match="no sha1 bank"):
        replay(log, "sha1")


def test_digests_of_an_unknown_algorithm_are_kept_but_not_replayed() -> None:
    """The header says how long they are, so they can be stepped over."""
    log = parse(
        header([(0x12, 32), (0xB, 32)]) + event(0, SEPARATOR, b"", (0x12, b"x" * 32), (0xB, bytes(32)))
    )
    assert log.algorithms == ("0x0012", "sha256")
    assert log.events[1].digest("0x0012") == b"x" * 32
    assert replay(log).pcr(0) == chain(bytes(32))
    for bank in ("0x0012", "sha384", "md5"):
        with pytest.raises(NotAuthentic, match=f"no {bank} bank"):
            replay(log, bank)
    with pytest.raises(NotAuthentic, match="no sha384 bank"):
        log.events[1].digest("sha384")


@pytest.mark.parametrize(
    "raw",
    [
        header([]),
        header([(0xB, 20)]),
        header([(0x12, 0)]),
        header([(0x12, 65)]),
        header([(0xB, 32), (0xB, 32)]),
        header([(0x100 + i, 32) for i in range(17)]),
        header(major=3),
        header(vendor=b"abc")[:-1],
        struct.pack("<II20sI", 0, NO_ACTION, bytes(20), 16) + b"Spec ID Event03\0",
        struct.pack("<II20sI", 0, NO_ACTION, bytes(20), 28) + header()[32:60],
        struct.pack("<II20sI", 1, NO_ACTION, bytes(20), 33) + header()[32:],
        struct.pack("<II20sI", 0, SEPARATOR, bytes(20), 33) + header()[32:],
        struct.pack("<II20sI", 0, NO_ACTION, b"x" * 20, 33) + header()[32:],
        struct.pack("<II20sI", 0, NO_ACTION, bytes(20), 34) + header()[32:] + b"x",
        struct.pack("<II20sI", 0, NO_ACTION, bytes(20), 16) + b"Spec ID Event04\0",
    ],
)
def test_a_header_that_is_not_exactly_one_is_refused(raw: bytes) -> None:
    """Sizes, version, list and vendor's bytes must all be what the header says they are."""
    refused(raw)


def test_a_vendors_bytes_in_the_header_are_no_reason_to_refuse() -> None:
    """They are allowed, and mean nothing to us."""
    assert parse(header(vendor=b"abc") + SEPARATOR_0).algorithms == ("sha256",)


def test_a_tpm_1_2_log_is_read_as_sha1_events() -> None:
    """Its header is a silent event like any other."""
    legacy = struct.pack("<II20sI", 0, NO_ACTION, bytes(20), 16) + b"Spec ID Event00\0"
    legacy += struct.pack("<II20sI", 4, SEPARATOR, b"d" * 20, 4) + bytes(4)
    assert parse(legacy).events[1].digest("sha1") == b"d" * 20


@pytest.mark.parametrize("locality", [0, 3, 4])
def test_pcr_0_starts_with_the_locality_that_the_log_tells(locality: int) -> None:
    """Only PCR 0 does; and the event itself never extends."""
    told = event(0, NO_ACTION, b"StartupLocality\0" + bytes([locality]))
    log = parse(header() + told + SEPARATOR_0 + event(1, SEPARATOR, bytes(4)))
    digest = sha256(bytes(4))
    values = replay(log)
    assert values.pcr(0) == chain(digest, start=bytes(31) + bytes([locality]))
    assert values.pcr(1) == chain(digest)
    assert [item.type for item in replay_to(log, {0: values.pcr(0)})[0]] == [SEPARATOR]


def test_pcr_0_starts_at_locality_4_after_an_hcrtm() -> None:
    """Firmware that does not say so still had its TPM measured before start-up."""
    log = parse(header() + event(0, HCRTM, b"HCRTM"))
    assert replay(log).pcr(0) == chain(sha256(b"HCRTM"), start=bytes(31) + b"\x04")


@pytest.mark.parametrize(
    "silent",
    [
        event(0, NO_ACTION, b"StartupLocality\0\x03") * 2,
        event(0, NO_ACTION, b"StartupLocality\0\x02"),
        event(0, NO_ACTION, b"StartupLocality\0"),
        event(0, NO_ACTION, b"StartupLocality\0\x03\x03"),
        event(1, NO_ACTION, b"StartupLocality\0\x03"),
    ],
)
def test_a_log_that_is_unclear_about_the_locality_is_refused(silent: bytes) -> None:
    """There is one answer, for PCR 0, of a value that a TPM can have."""
    refused(header() + silent)


def test_dynamic_pcrs_start_with_ones() -> None:
    """PCR 17 to 22 are not zero until a dynamic launch."""
    log = parse(header() + event(17, SEPARATOR, b"x"))
    assert replay(log).pcr(17) == chain(sha256(b"x"), start=b"\xff" * 32)
    assert replay(log).pcr(18) == b"\xff" * 32
    assert replay(log).pcr(23) == bytes(32)


def test_a_pcr_without_events_must_be_zero() -> None:
    """PCR 9 is quoted as something that nothing explains."""
    log = parse(header() + SEPARATOR_0)
    assert replay_to(log, {9: bytes(32)}) == {9: ()}
    with pytest.raises(NotAuthentic) as caught:
        replay_to(log, {0: replay(log).pcr(0), 9: b"x" * 32})
    assert caught.value.expected == f"PCR 9 quoted as {(b'x' * 32).hex()}"
    assert caught.value.found == "PCR 9 is zero after no logged events"


def test_a_pcr_that_is_zero_must_have_no_events() -> None:
    """Else the log tells of a boot that this TPM has not seen."""
    with pytest.raises(NotAuthentic, match=r"PCR 0\.") as caught:
        replay_to(parse(header() + SEPARATOR_0), {0: bytes(32)})
    assert caught.value.expected == "PCR 0 quoted as zero"


@pytest.mark.parametrize("quoted", [{24: bytes(32)}, {-1: bytes(32)}, {9: bytes(20)}, {9: b""}])
def test_a_quoted_pcr_that_no_tpm_has_never_fits(quoted: dict[int, bytes]) -> None:
    """Neither a wrong index nor a wrong length becomes zero by accident."""
    with pytest.raises(NotAuthentic):
        replay_to(parse(header() + SEPARATOR_0), quoted)


def test_no_quoted_pcr_proves_nothing() -> None:
    """Empty means no."""
    with pytest.raises(NotAuthentic, match="proves nothing"):
        replay_to(parse(header() + SEPARATOR_0), {})


def test_every_pcr_that_differs_is_named() -> None:
    """An operator sees all of them at once."""
    log = parse(header() + SEPARATOR_0 + event(4, SEPARATOR, b"a") + event(7, SEPARATOR, b"b"))
    with pytest.raises(NotAuthentic, match=r"PCR 4, 7, 11\."):
        replay_to(log, {11: b"z" * 32, 7: b"x" * 32, 4: b"y" * 32, 0: replay(log).pcr(0)})


def test_events_of_pcrs_that_were_not_quoted_are_left_out() -> None:
    """Nothing vouches for them, so nobody gets to see them as facts."""
    log = parse(header() + SEPARATOR_0 + event(4, SEPARATOR, b"a") + event(0, IPL, b"c"))
    events = replay_to(log, {0: chain(sha256(bytes(4)), sha256(b"c"))})
    assert [item.index for item in events[0]] == [1, 3]
    assert list(events) == [0]


def test_known_extends_by_userspace_follow_the_log_in_their_order() -> None:
    """The phases of systemd come after the stub's sections, and one after the other."""
    log = parse(header() + event(11, IPL, b"section"))
    first, second = (
        UserspaceExtend(11, sha256(name.encode()), name) for name in ("enter-initrd", "leave-initrd")
    )
    quoted = {11: chain(sha256(b"section"), first.digest, second.digest)}
    assert len(replay_to(log, quoted, userspace_extends=(first, second))[11]) == 1
    with pytest.raises(NotAuthentic) as caught:
        replay_to(log, quoted, userspace_extends=(second, first))
    assert "after 1 logged events and 2 known extends by userspace" in str(caught.value.found)


@pytest.mark.parametrize("extend", [(11, b"short", "x"), (24, bytes(32), "x"), (-1, bytes(32), "x")])
def test_an_extend_that_no_tpm_would_take_is_refused(extend: tuple[int, bytes, str]) -> None:
    """Nothing is padded or cut to fit."""
    with pytest.raises(NotAuthentic) as caught:
        replay(parse(header() + SEPARATOR_0), userspace_extends=[UserspaceExtend(*extend)])
    assert caught.value.code == "eventlog.userspace"
