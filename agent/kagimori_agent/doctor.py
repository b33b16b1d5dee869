"""Look for what would stop an unlock, and say what to do; change nothing, ask for no report.

Each look is one function that returns what it found or raises the same error that an unlock would meet there, so that
``doctor`` cannot know better than the agent. A report is not requested: the host throttles those, and a failed request can
cost the VM its report key.
"""

from __future__ import annotations

import gzip
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from kagimori_agent import cmdline, keyslots, luks
from kagimori_agent import config as configuration
from kagimori_agent.devices import device_class, doors
from kagimori_agent.devices.tpm_places import Place, by_driver, read_event_log
from kagimori_protocol import luks2_guard
from kagimori_protocol.errors import ImageError, KagimoriError, NetworkError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kagimori_agent.config import Config, Verifier, Volume

KERNEL_OPTIONS: Final = {
    "CONFIG_TSM_REPORTS": ("6.7", "the report door, configfs-tsm"),
    "CONFIG_SEV_GUEST": ("5.19", "the driver behind it"),
    "CONFIG_TCG_SVSM": ("6.16", "the driver of the SVSM's vTPM"),
    "CONFIG_DM_CRYPT": ("2.6", "the mapping of encrypted volumes"),
    "CONFIG_MEMFD_CREATE": ("3.17", "a volume's header in memory"),
}
"""Kernel options that an unlock needs: since which release, and what for. ``_is_needed`` tells when they are not."""

_RESOLVE_TODO: Final = "Give the verifier's address in agent.toml, or a resolver to the early boot."
_CONNECT_S: Final = 3
_HTTP_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Finding:
    """One look: what was looked at, and either what is fine or the error that an unlock would meet."""

    subject: str
    fine: str = ""
    error: KagimoriError | None = None

    @property
    def exit_code(self) -> int:
        """The exit code that an unlock would end with, or 0."""
        return 0 if self.error is None else self.error.exit_code

    def as_dict(self) -> dict[str, object]:
        """Give it for ``--json``."""
        if self.error is None:
            return {"subject": self.subject, "ok": True, "found": self.fine}
        return {"subject": self.subject, "ok": False, **self.error.as_dict()}

    def lines(self) -> Iterator[str]:
        """Give it as lines for a person."""
        if self.error is None:
            yield f"fine   {self.subject}: {self.fine}"
            return
        yield f"BAD    {self.subject}: {self.error.what}"
        for name, text in (
            ("expected", self.error.expected),
            ("found", self.error.found),
            ("to do", self.error.todo),
        ):
            if text:
                yield f"         {name}: {text}"


def examine(path: Path, root: Path = Path("/")) -> list[Finding]:
    """Look at everything that agent.toml at ``path`` leads to. ``root`` is where sys, proc, dev and boot are."""
    findings: list[Finding] = []

    def look(subject: str, at: Callable[..., str], *arguments: object) -> None:
        try:
            findings.append(Finding(subject, at(*arguments)))
        except KagimoriError as error:
            findings.append(Finding(subject, error=error))

    try:
        config = configuration.load(path)
    except KagimoriError as error:
        return [Finding(f"configuration {path}", error=error)]
    findings.append(Finding(f"configuration {path}", f"VM {config.vm_id}, {len(config.verifiers)} verifiers"))
    look("kernel command line", _command_line, root)
    for option, (since, purpose) in KERNEL_OPTIONS.items():
        if _is_needed(option, config):
            look(f"kernel option {option}", _kernel_option, root, option, since, purpose)
    look("report door", _report_door, config)
    if config.kind == "svsm-vtpm":
        look("SVSM services", _services, config)
        look("vTPM", _tpm_name, config, root)
        look("event log", _event_log, config, root)
    look("cryptsetup", lambda: str(luks.cryptsetup()))
    for volume in config.volumes:
        look(f"volume {volume.name}", _keyslots, volume, root)
    for verifier in config.verifiers:
        look(f"name of verifier {verifier.name}", _resolve, verifier)
        look(f"verifier {verifier.name}", _reach, verifier)
    return findings


def _is_needed(option: str, config: Config) -> bool:
    """Tell whether an unlock would need a kernel option; what is not known to be superfluous is."""
    if option == "CONFIG_TCG_SVSM":
        return config.kind == "svsm-vtpm" and config.tpm.tcti is None
    if option == "CONFIG_TSM_REPORTS":
        present = doors.existing(config.tsm.root, config.sev_guest.device)
        superfluous = config.report_door == "auto" and present == [doors.SEV_GUEST]
        return config.kind == "svsm-vtpm" or not (config.report_door == doors.SEV_GUEST or superfluous)
    return True


def _command_line(root: Path) -> str:
    line = cmdline.read(root / "proc/cmdline")
    words = [cmdline.DEBUG_WORD] if line.debug else []
    if line.network is not None:
        words.append(f"{cmdline.ADDRESS_WORD}{line.network.address}")
    return f"with {', '.join(words)}" if words else "nothing of ours, as it should be"


def _kernel_option(root: Path, option: str, since: str, purpose: str) -> str:
    """Read the running kernel's configuration, where it is kept."""
    setting = _kernel_config(root).get(option)
    if setting in {"y", "m"}:
        return "built in" if setting == "y" else "a module"
    if setting is None and not _kernel_config(root):
        return "unknown: this kernel keeps no configuration in /proc/config.gz, /boot or /usr/lib/modules"
    raise ImageError(
        f"This kernel lacks {purpose}.",
        code="doctor.kernel-option",
        expected=f"{option}=y or =m (Linux {since} or newer)",
        found=f"not set in Linux {os.uname().release}",
        todo=f"Boot a kernel that has it, Linux {since} or newer (docs/kernels.md says which do).",
    )


def _kernel_config(root: Path) -> dict[str, str]:
    release = os.uname().release
    kept = ("proc/config.gz", f"boot/config-{release}", f"usr/lib/modules/{release}/config")
    for path in (root / place for place in kept):
        try:
            raw = path.read_bytes()
        except OSError:
            continue
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode(errors="replace")
        return dict(re.findall(r"^(CONFIG_\w+)=(\w)$", text, re.MULTILINE))
    return {}


def _report_door(config: Config) -> str:
    """Name the door that an unlock would use, and which ones this kernel has."""
    tsm, device = config.tsm.root, config.sev_guest.device
    found = doors.existing(tsm, device)
    svsm = config.kind == "svsm-vtpm"  # an SVSM is asked through configfs-tsm only
    door = doors.CONFIGFS_TSM if svsm else doors.choose(config.report_door, tsm, device)
    if door in found:
        others = ", ".join(f"there is {name}, too" for name in found if name != door)
        return "; ".join(filter(None, (f"{door} is used", others)))
    if door == doors.SEV_GUEST:
        there = "nothing there"
    else:
        mounted = tsm.parent.is_dir() and any(tsm.parent.iterdir())
        there = "configfs without tsm" if mounted else f"nothing in {tsm.parent}"
    raise ImageError(
        f"There is no report door {door}.",
        code="doctor.report-door",
        expected=str(device) if door == doors.SEV_GUEST else f"the directory {tsm / 'report'}",
        found="; ".join([there, *(f"but {name} is there" for name in found)]),
        todo="modprobe sev-guest, where this is an SEV-SNP guest; else: mount -t configfs configfs /sys/kernel/config",
    )


def _services(config: Config) -> str:
    tsm = device_class(doors.CONFIGFS_TSM)(config.tsm.root)
    return f"provider {tsm.look_for_services()} attests them (Linux 6.11 or newer)"


def _tpm(config: Config, root: Path) -> Place:
    if config.tpm.tcti is not None:
        return Place(config.tpm.tcti, "", config.tpm.tcti, config.tpm.event_log or Path())
    place = by_driver(config.tpm.driver, root)
    place.require_tcti()
    return place


def _tpm_name(config: Config, root: Path) -> str:
    return _tpm(config, root).name


def _event_log(config: Config, root: Path) -> str:
    return f"{len(read_event_log(_tpm(config, root).event_log, root))} bytes"


def _keyslots(volume: Volume, root: Path) -> str:
    """Tell a volume's keyslots by whether they are sealed; which of them the verifier has the key of, no header tells."""
    device = luks.find_device(volume, root)
    with keyslots.opened(device, alone=False) as disk:
        header = disk.load().header
    sealed = sorted(luks2_guard.tied(header), key=int)
    if not sealed:
        raise luks2_guard.unguarded()
    others = sorted(set(header.json["keyslots"]) - set(sealed), key=int)
    told = f"on {device}, {_numbered(sealed)} sealed" + (f", {_numbered(others)} not" if others else "")
    if len(sealed) == 1:
        return told
    return (
        f"{told}. The verifier has the key of one; the others are of recovery codes or other verifiers, or left by an "
        f"enrolment that was cut off: `kagimori-agent enrol --undo --device {device} --slot N` removes such a one"
    )


def _numbered(slots: list[str]) -> str:
    return f"keyslot {slots[0]} is" if len(slots) == 1 else f"keyslots {', '.join(slots)} are"


def _resolve(verifier: Verifier) -> str:
    found = []
    for url in verifier.urls:
        host = urlsplit(url).hostname or ""
        try:
            addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
        except OSError as error:
            raise NetworkError(
                f"The name {host} does not resolve.",
                code="network.dns",
                expected="an address",
                found=str(error),
                todo=_RESOLVE_TODO,
            ) from error
        found.append(f"{host} is {', '.join(sorted(addresses))}")
    return "; ".join(found)


def _reach(verifier: Verifier) -> str:
    """Connect to each URL; whether its answers are signed shows in a dry-run."""
    reasons = []
    for url in verifier.urls:
        parts = urlsplit(url)
        address = (parts.hostname or "", parts.port or _HTTP_PORTS[parts.scheme])
        try:
            with socket.create_connection(address, timeout=_CONNECT_S):
                return f"{url} accepts connections"
        except OSError as error:
            reasons.append(f"{url}: {error.strerror or error}")
    raise NetworkError(
        f"The verifier {verifier.name} cannot be reached.",
        code="doctor.reach",
        expected="one of its URLs to accept a connection",
        found="; ".join(reasons),
        todo="Is the network up, and does the verifier run there? A dry-run tells more.",
    )
