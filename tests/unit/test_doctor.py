"""What ``kagimori-agent doctor`` finds, on made-up machines."""

from __future__ import annotations

import contextlib
import gzip
import os
import socket
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kagimori_agent import keyslots
from kagimori_agent.doctor import Finding, examine
from kagimori_simulator import disk
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.configfs import ConfigfsTsm
from kagimori_simulator.machine import SnpMachine
from kagimori_simulator.svsm import Svsm
from kagimori_simulator.vtpm import Vtpm

ALL_OPTIONS = (
    "CONFIG_TSM_REPORTS=m\nCONFIG_SEV_GUEST=m\nCONFIG_TCG_SVSM=y\nCONFIG_DM_CRYPT=m\nCONFIG_MEMFD_CREATE=y\n"
)


@pytest.fixture
def listener() -> Iterator[int]:
    """Give the port of something that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def agent_toml(directory: Path, url: str) -> Path:
    """Write a configuration with one verifier."""
    key = b64encode(Ed25519PrivateKey.generate().public_key().public_bytes_raw()).decode()
    path = directory / "agent.toml"
    path.write_text(
        f'vm_id = "web1"\n[[verifiers]]\nname = "home"\nurls = ["{url}"]\nkeys = ["{key}"]\n'
        f'[tsm]\nroot = "{directory / "tsm"}"\n',
        encoding="utf-8",
    )
    return path


class Machine(Protocol):
    """Makes a machine."""

    def __call__(self, *, options: str = ..., cmdline: str = ..., svsm: bool = ...) -> Path:
        """Give its root directory."""
        ...


@pytest.fixture
def machine(cache: Path, tmp_path: Path) -> Iterator[Machine]:
    """Give a maker of a machine with everything that an unlock needs; ``svsm`` says whether its guest has one."""
    with contextlib.ExitStack() as mounts:

        def make(
            *, options: str = ALL_OPTIONS, cmdline: str = "root=/dev/mapper/cryptroot ro", svsm: bool = True
        ) -> Path:
            root = tmp_path / "root"
            (root / "proc").mkdir(parents=True)
            (root / "proc/cmdline").write_text(cmdline, encoding="ascii")
            (root / "proc/config.gz").write_bytes(gzip.compress(options.encode()))
            chip = root / "sys/class/tpm/tpm0/device"
            chip.mkdir(parents=True)
            (root / "sys/drivers/tpm-svsm").mkdir(parents=True)
            (chip / "driver").symlink_to(root / "sys/drivers/tpm-svsm")
            log = root / "sys/kernel/security/tpm0"
            log.mkdir(parents=True)
            (log / "binary_bios_measurements").write_bytes(b"a log")
            (root / "dev").mkdir()
            (root / "dev/tpmrm0").touch()
            hardware = SnpMachine(AmdRoot.cached(cache / "amd"), svsm=svsm)
            below = Svsm(hardware, mounts.enter_context(Vtpm.start(tmp_path / "tpm"))) if svsm else None
            mounts.enter_context(ConfigfsTsm(hardware, below).mounted(root / "tsm"))
            return root

        yield make


def bad(findings: list[Finding]) -> dict[str, str]:
    """Give the subjects that are not fine, with their errors' codes."""
    return {finding.subject: finding.error.code for finding in findings if finding.error is not None}


def test_a_machine_with_everything_has_nothing_to_complain_of(machine: Machine, listener: int) -> None:
    """Every look is fine, and the exit code is 0."""
    root = machine()
    findings = examine(agent_toml(root, f"http://127.0.0.1:{listener}"), root)
    assert bad(findings) == {}
    assert all(finding.exit_code == 0 for finding in findings)


@pytest.mark.slow  # cryptsetup
def test_the_keyslots_of_a_volume_are_told_with_those_that_may_be_nobodys(
    machine: Machine, listener: int, tmp_path: Path
) -> None:
    """An enrolment that was cut off leaves a keyslot behind, which opens by a key that nobody asks for any more."""
    root, image, key = machine(), tmp_path / "volume.img", bytes(range(32))
    uuid = disk.make_volume(image, b"a passphrase")
    path = agent_toml(root, f"http://127.0.0.1:{listener}")
    with path.open("a", encoding="utf-8") as file:
        file.write(f'[[volumes]]\nuuid = "{uuid}"\nname = "cryptroot"\ndevice = "{image}"\n')
    assert bad(examine(path, root)) == {"volume cryptroot": "luks.unguarded"}
    for number, told in enumerate(("keyslot 1 is sealed", "keyslots 1, 2 are sealed")):
        with keyslots.opened(image) as one:
            change = keyslots.add(one.load(), b"a passphrase", key[number:] + key[:number], 1)
            one.write(change, tmp_path / f"kept-{number}")
        findings = examine(path, root)
        assert bad(findings) == {}
        (found,) = [finding.fine for finding in findings if finding.subject == "volume cryptroot"]
        assert told in found
        assert "keyslot 0 is not" in found
        assert ("enrol --undo" in found) == (number == 1)
    image.write_bytes(bytes(1 << 20))
    assert bad(examine(path, root)) == {"volume cryptroot": "luks.other-volume"}


def test_a_configuration_that_cannot_be_read_is_the_only_finding(tmp_path: Path) -> None:
    """Without agent.toml there is nothing to look for."""
    findings = examine(tmp_path / "agent.toml", tmp_path)
    assert [finding.exit_code for finding in findings] == [4]


@pytest.mark.parametrize(
    ("missing", "since"),
    [
        ("CONFIG_TCG_SVSM", "6.16"),
        ("CONFIG_TSM_REPORTS", "6.7"),
        ("CONFIG_DM_CRYPT", "2.6"),
        ("CONFIG_MEMFD_CREATE", "3.17"),
    ],
)
def test_a_kernel_without_an_option_is_named_with_the_release_that_has_it(
    machine: Machine, listener: int, missing: str, since: str
) -> None:
    """The operator learns which option, and since when Linux has it."""
    options = "\n".join(line for line in ALL_OPTIONS.splitlines() if not line.startswith(missing))
    root = machine(options=options)
    findings = examine(agent_toml(root, f"http://127.0.0.1:{listener}"), root)
    assert bad(findings) == {f"kernel option {missing}": "doctor.kernel-option"}
    text = "\n".join(line for finding in findings for line in finding.lines())
    assert f"{missing}=y or =m (Linux {since} or newer)" in text


def test_a_kernel_that_keeps_no_configuration_is_not_called_bad(machine: Machine, listener: int) -> None:
    """Unknown is said as unknown: the devices themselves are looked at, too."""
    root = machine()
    (root / "proc/config.gz").unlink()
    findings = examine(agent_toml(root, f"http://127.0.0.1:{listener}"), root)
    assert bad(findings) == {}
    assert any("unknown" in finding.fine for finding in findings)


@pytest.mark.parametrize("place", ["boot/config-{}", "usr/lib/modules/{}/config"])
def test_a_configuration_kept_elsewhere_is_read_where_proc_has_none(
    machine: Machine, listener: int, place: str
) -> None:
    """Debian keeps it in /boot, and from Linux 7.2 on beside its modules."""
    root = machine()
    (root / "proc/config.gz").unlink()
    kept = root / place.format(os.uname().release)
    kept.parent.mkdir(parents=True)
    kept.write_text("# CONFIG_TCG_SVSM is not set\nCONFIG_DM_CRYPT=m\n")
    findings = examine(agent_toml(root, f"http://127.0.0.1:{listener}"), root)
    assert "kernel option CONFIG_TCG_SVSM" in bad(findings)
    assert "kernel option CONFIG_DM_CRYPT" not in bad(findings)


def test_a_guest_that_no_svsm_stands_below_is_told_so(machine: Machine, listener: int) -> None:
    """The same kernel shows no service attributes then: that is seen without asking for a report."""
    root = machine(svsm=False)
    findings = examine(agent_toml(root, f"http://127.0.0.1:{listener}"), root)
    assert bad(findings) == {"SVSM services": "tsm.no-service-attributes"}
    assert list((root / "tsm/report").iterdir()) == []


def test_a_command_line_that_sets_more_than_it_may_is_found(machine: Machine, listener: int) -> None:
    """The host writes the command line; a stray kagimori. word refuses the boot."""
    root = machine(cmdline="ro kagimori.verifier=http://evil")
    findings = examine(agent_toml(root, f"http://127.0.0.1:{listener}"), root)
    assert bad(findings) == {"kernel command line": "cmdline.word"}


def test_no_report_door_no_tpm_and_nobody_listening_are_all_found(machine: Machine, tmp_path: Path) -> None:
    """All is looked at, even after something was found."""
    root = machine()
    configuration = agent_toml(root, "http://127.0.0.1:PORT")
    text = configuration.read_text(encoding="utf-8").replace(f"{root}/tsm", f"{tmp_path}/nothing/tsm")
    (root / "sys/class/tpm/tpm0/device/driver").unlink()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    configuration.write_text(text.replace("PORT", str(port)), encoding="utf-8")
    found = bad(examine(configuration, root))
    assert found == {
        "report door": "doctor.report-door",
        "SVSM services": "tsm.no-configfs",
        "vTPM": "tpm.no-driver",
        "event log": "tpm.no-driver",
        "verifier home": "doctor.reach",
    }


def test_a_name_that_does_not_resolve_is_told_apart_from_a_closed_port(machine: Machine) -> None:
    """The resolver is a part of the early boot that is often missing."""
    root = machine()
    found = bad(examine(agent_toml(root, "http://nowhere.invalid:1"), root))
    assert found["name of verifier home"] == "network.dns"
