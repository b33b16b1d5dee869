"""Which door is used, what agent.toml may say about it, and what certificates may cost a boot."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kagimori_agent import doctor
from kagimori_agent.attempt import PROMPT_S, Answered, attest
from kagimori_agent.budget import Budget
from kagimori_agent.collect import SnpDirect, SvsmVtpm
from kagimori_agent.config import Config, load
from kagimori_agent.devices import doors, sev_guest
from kagimori_agent.devices.configfs_tsm import ServiceReport
from kagimori_agent.devices.doors import HINT_S, HostCertificates, choose, existing
from kagimori_agent.devices.report import KeyWiped, PlainReport
from kagimori_protocol.errors import HardwareError, ImageError, KagimoriError, NetworkError
from kagimori_protocol.tpm import pcr_selection

KEY = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
TABLE = b"a table"
EK = bytes(314)


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """Give the places of both doors; there is nothing yet."""
    return tmp_path / "tsm", tmp_path / "sev-guest"


def make(name: str, places: tuple[Path, Path]) -> None:
    """Let the kernel have a door."""
    tsm, device = places
    if name == "configfs-tsm":
        (tsm / "report").mkdir(parents=True)
    else:
        device.touch()


def test_auto_prefers_configfs_tsm_and_takes_what_there_is(places: tuple[Path, Path]) -> None:
    """By what exists, and by nothing else: both doors have one key behind them."""
    with pytest.raises(ImageError) as caught:
        choose("auto", *places)
    assert caught.value.code == "report.no-door"
    assert all(str(place) in str(caught.value.expected) for place in places)
    make("sev-guest", places)
    assert choose("auto", *places) == "sev-guest"
    make("configfs-tsm", places)
    assert choose("auto", *places) == "configfs-tsm"
    assert existing(*places) == ["configfs-tsm", "sev-guest"]


@pytest.mark.parametrize("door", ["configfs-tsm", "sev-guest"])
def test_a_door_that_is_named_is_used_whether_it_is_there_or_not(
    places: tuple[Path, Path], door: str
) -> None:
    """Its absence is then an error, not a reason to use the other one."""
    make("sev-guest" if door == "configfs-tsm" else "configfs-tsm", places)
    assert choose(door, *places) == door
    with pytest.raises(ImageError):
        doors.open_plain(door, *places).plain_report(bytes(64))


def agent_toml(directory: Path, text: str) -> Path:
    """Write an agent.toml with one verifier."""
    path = directory / "agent.toml"
    verifier = f'[[verifiers]]\nname = "home"\nurls = ["http://127.0.0.1:9"]\nkeys = ["{KEY}"]\n'
    tables = f'[tsm]\nroot = "{directory / "tsm"}"\n[sev_guest]\ndevice = "{directory / "sev-guest"}"\n'
    path.write_text(f'vm_id = "web1"\n{text}\n{verifier}{tables}', encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('report_door = "tdx-guest"', "config.key"),
        ('report_door = ""', "config.key"),
        ("report_door = 1", "config.key"),
        ('report_doors = "auto"', "config.unknown-key"),
        ('report_door = "sev-guest"', "config.report-door"),
        ('kind = "svsm-vtpm"\nreport_door = "sev-guest"', "config.report-door"),
    ],
)
def test_a_door_that_is_none_or_serves_no_such_evidence_is_refused(
    tmp_path: Path, text: str, code: str
) -> None:
    """An SVSM can be asked through configfs-tsm only."""
    with pytest.raises(ImageError) as caught:
        load(agent_toml(tmp_path, text))
    assert caught.value.code == code


@pytest.mark.parametrize("device", ["sev-guest", "./dev/sev-guest", ""])
def test_a_device_is_an_absolute_path(tmp_path: Path, device: str) -> None:
    """The agent has no working directory to speak of."""
    path = agent_toml(tmp_path, 'kind = "snp-direct"')
    path.write_text(path.read_text().replace(str(tmp_path / "sev-guest"), device))
    with pytest.raises(ImageError):
        load(path)


def test_without_a_word_linuxs_own_places_are_used(tmp_path: Path) -> None:
    """An ordinary agent.toml says nothing about doors."""
    path = agent_toml(tmp_path, 'kind = "snp-direct"')
    path.write_text(path.read_text().partition("[tsm]")[0])
    config = load(path)
    assert config.report_door == "auto"
    assert config.sev_guest.device == sev_guest.DEVICE == Path("/dev/sev-guest")


@pytest.mark.parametrize(
    ("text", "there", "fine", "code"),
    [
        ('kind = "snp-direct"', ["sev-guest"], "sev-guest is used", None),
        (
            'kind = "snp-direct"',
            ["configfs-tsm", "sev-guest"],
            "configfs-tsm is used; there is sev-guest, too",
            None,
        ),
        ('kind = "snp-direct"', [], "", "report.no-door"),
        ('kind = "snp-direct"\nreport_door = "sev-guest"', ["configfs-tsm"], "", "doctor.report-door"),
        ('kind = "snp-direct"\nreport_door = "configfs-tsm"', ["sev-guest"], "", "doctor.report-door"),
        ("", ["configfs-tsm", "sev-guest"], "configfs-tsm is used; there is sev-guest, too", None),
        ("", ["sev-guest"], "", "doctor.report-door"),
    ],
)
def test_doctor_tells_which_door_an_unlock_would_use_and_which_there_are(
    tmp_path: Path, places: tuple[Path, Path], text: str, there: list[str], fine: str, code: str | None
) -> None:
    """Without asking for a report, which could cost the key."""
    for name in there:
        make(name, places)
    findings = {one.subject: one for one in doctor.examine(agent_toml(tmp_path, text), tmp_path)}
    finding = findings["report door"]
    assert finding.fine == fine
    assert (finding.error.code if finding.error else None) == code
    if code == "doctor.report-door":
        assert finding.error is not None
        assert f"but {there[0]} is there" in str(finding.error.found)


@pytest.mark.parametrize(
    ("text", "there", "needed"),
    [
        ('kind = "snp-direct"\nreport_door = "sev-guest"', [], False),
        ('kind = "snp-direct"', ["sev-guest"], False),
        ('kind = "snp-direct"', [], True),
        ('kind = "snp-direct"', ["configfs-tsm", "sev-guest"], True),
        ("", ["sev-guest"], True),
    ],
)
def test_configfs_tsm_is_missed_only_where_it_is_needed(
    tmp_path: Path, places: tuple[Path, Path], text: str, there: list[str], needed: bool
) -> None:
    """A kernel of before 6.7 can be whole for a VM without an SVSM."""
    for name in there:
        make(name, places)
    subjects = [one.subject for one in doctor.examine(agent_toml(tmp_path, text), tmp_path)]
    assert ("kernel option CONFIG_TSM_REPORTS" in subjects) is needed


class Device:
    """Stands in the table of doors for /dev/sev-guest: answers, fails or hangs, and counts."""

    asked: list[int]
    answer: Callable[[], PlainReport]

    def __init__(self, _device: Path, *, vmpl: int) -> None:
        self.asked.append(vmpl)

    def plain_report(self, _report_data: bytes) -> PlainReport:
        return type(self).answer()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> type[Device]:
    """Give the device that the agent's code finds by its name."""
    monkeypatch.setattr(Device, "asked", [], raising=False)
    monkeypatch.setattr(
        Device, "answer", staticmethod(lambda: PlainReport(b"", TABLE, "sev_guest")), raising=False
    )
    monkeypatch.setattr(doors, "device_class", lambda _: Device)
    return Device


def hints(tmp_path: Path, said: list[str]) -> HostCertificates:
    """Make the source of certificates of a guest at VMPL 2 whose kernel has the device."""
    (tmp_path / "sev-guest").touch()
    return HostCertificates(tmp_path / "sev-guest", lambda: 2, said.append)


def test_the_host_is_asked_for_certificates_once_in_a_boot(tmp_path: Path, device: type[Device]) -> None:
    """At the guest's own VMPL; further attempts of the same boot use what was given."""
    said: list[str] = []
    source = hints(tmp_path, said)
    assert [source.get(10) for _ in range(3)] == [TABLE] * 3
    assert device.asked == [2]
    assert said == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyWiped("gone", code="sev-guest.key-wiped"), "sev-guest.key-wiped"),
        (HardwareError("no", code="sev-guest.status"), "sev-guest.status"),
        (ImageError("no", code="sev-guest.absent"), "sev-guest.absent"),
    ],
)
def test_a_failure_to_get_certificates_is_told_and_costs_nothing_else(
    tmp_path: Path, device: type[Device], monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
) -> None:
    """They are hints. It is not tried again, as every try is another request to the host."""

    def fail() -> PlainReport:
        raise error

    monkeypatch.setattr(device, "answer", staticmethod(fail))
    said: list[str] = []
    source = hints(tmp_path, said)
    assert [source.get(10) for _ in range(3)] == [b""] * 3
    assert len(device.asked) == 1
    assert code in said[0]
    assert len(said) == 1


def test_a_host_without_certificates_is_not_asked_again(
    tmp_path: Path, device: type[Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It will not have any in a second."""
    monkeypatch.setattr(device, "answer", staticmethod(lambda: PlainReport(b"", b"", "sev_guest")))
    said: list[str] = []
    source = hints(tmp_path, said)
    assert [source.get(10) for _ in range(2)] == [b"", b""]
    assert len(device.asked) == 1
    assert "supplies no certificates" in said[0]


def test_a_kernel_without_the_device_is_no_error(tmp_path: Path, device: type[Device]) -> None:
    """Then the verifier has to know the certificates, and nothing is said about it."""
    said: list[str] = []
    assert HostCertificates(tmp_path / "none", lambda: 2, said.append).get(10) == b""
    assert (device.asked, said) == ([], [])


def test_certificates_that_do_not_come_cost_a_part_of_the_time_and_no_more(
    tmp_path: Path, device: type[Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of what is left, and 5 s at most."""
    assert HINT_S == 5
    forever = threading.Event()
    monkeypatch.setattr(device, "answer", staticmethod(forever.wait))
    said: list[str] = []
    started = time.monotonic()
    assert hints(tmp_path, said).get(1.2) == b""
    assert 0.3 <= time.monotonic() - started < 1.1
    assert "report.stalled" in said[0]
    forever.set()


class Vtpm:
    """A TPM with one EK, which answers everything."""

    def make_keys(self) -> tuple[bytes, bytes]:
        return EK, b""

    def random(self, count: int) -> bytes:
        return bytes(count)

    def quote(self, _qualifying: bytes, _selection: bytes) -> Any:  # noqa: ANN401 - a quote's shape is not the point
        return type("Quote", (), {"attest": b"", "signature": b"", "pcrs": []})

    def event_log(self) -> bytes:
        return b""


@pytest.mark.parametrize(
    ("passed_on", "shown", "asked"),
    [(b"svsm's own", b"svsm's own", 0), (b"", TABLE, 1), (bytes(16384), TABLE, 1)],
    ids=["the SVSM passes them on", "it passes none on", "it passes zeros on"],
)
def test_the_device_is_asked_only_where_the_svsm_passes_no_certificates_on(
    tmp_path: Path, device: type[Device], passed_on: bytes, shown: bytes, asked: int
) -> None:
    """Every request spared is one that the host cannot fail."""

    class Tsm:
        def service_report(self, *_: object) -> ServiceReport:
            return ServiceReport(b"", EK, passed_on)

    tsm: Any = Tsm()
    vtpm: Any = Vtpm()
    attester = SvsmVtpm(tsm, vtpm, 15, hints(tmp_path, []))
    attester.prepare()
    for _ in range(2):
        assert attester.collect(bytes(64), pcr_selection([0, 15]), 10)["certificates"] == shown
    assert len(device.asked) == asked


@pytest.mark.parametrize(
    "error", [KeyWiped("gone"), HardwareError("stalled", code="report.stalled")], ids=["wiped", "stalled"]
)
def test_an_unlock_does_not_try_again_what_the_report_door_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: HardwareError
) -> None:
    """Unlike a verifier that is away: a second request can only fail, or cost what is left."""
    config: Config = load(agent_toml(tmp_path, 'kind = "snp-direct"'))
    asked = []

    class Door:
        def plain_report(self, report_data: bytes) -> PlainReport:
            asked.append(report_data)
            raise error

    challenge: Any = type("Challenge", (), {"pcr_selection": b""})
    challenged: Any = type("Challenged", (), {"key": bytes(32), "body": b"{}", "challenge": challenge})
    monkeypatch.setattr("kagimori_agent.attempt._challenges", lambda *_: [challenged])
    with pytest.raises(HardwareError) as caught:
        attest(config, SnpDirect(Door()), "dry-run", Budget(30), lambda _: None)
    assert caught.value is error
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("left_s", "code"),
    [(5, "budget.spent"), (PROMPT_S + 20, "report.stalled")],
    ids=["seconds", "time enough"],
)
def test_a_door_that_answered_before_is_not_blamed_for_the_last_seconds_of_a_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_s: float, code: str
) -> None:
    """The verifier was away until then: that is what ended the boot, and what its owner should look at."""
    config: Config = load(
        agent_toml(tmp_path, 'kind = "snp-direct"\n[limits]\nbackoff_min_s = 0.01\nbackoff_max_s = 0.01')
    )
    away = NetworkError("home: no answer in time.", code="network.timeout")
    tries = iter([away, HardwareError("stalled", code="report.stalled")])

    def fail(*_: object) -> Answered:
        raise next(tries)

    monkeypatch.setattr("kagimori_agent.attempt._attempt", fail)
    attester: Any = None
    with pytest.raises(KagimoriError) as caught:
        attest(config, attester, "unlock", Budget(left_s), lambda _: None)
    assert caught.value.code == code
    if code == "budget.spent":
        assert "home: no answer in time." in str(caught.value)
