"""Doors that software opens: agents of the host's, what it configures, consoles, and what systemd hears from it.

Sources: cloud-init's documentation (datasource_list, disabling), systemd-getty-generator(8), systemd-ssh-generator(8),
systemd-system-credentials(7), agetty(8), Debian's kdump-tools. Import budget: ``booted``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from kagimori_agent.booted import joined

if TYPE_CHECKING:
    from kagimori_agent.booted import System


class Seen(NamedTuple):
    """A door that is open, as a look finds it."""

    id: str
    found: str
    why: str
    todo: str


AGENTS: Final = {
    "qemu-guest-agent": ("qemu-guest-agent.service", "qemu-ga.service"),
    "google-guest-agent": (
        "google-guest-agent.service",
        "google-guest-agent-manager.service",
        "google-startup-scripts.service",
        "google-osconfig-agent.service",
    ),
    "waagent": ("walinuxagent.service", "waagent.service"),
    "amazon-ssm-agent": ("amazon-ssm-agent.service", "snap.amazon-ssm-agent.amazon-ssm-agent.service"),
    "vmtoolsd": ("open-vm-tools.service", "vmtoolsd.service"),
    "hyperv-daemons": (
        "hv-kvp-daemon.service",
        "hv-fcopy-daemon.service",
        "hypervkvpd.service",
        "hypervfcopyd.service",
    ),
    "oracle-cloud-agent": (
        "oracle-cloud-agent.service",
        "snap.oracle-cloud-agent.oracle-cloud-agent.service",
    ),
    "spice-vdagent": ("spice-vdagentd.service", "spice-vdagentd.socket"),
    "vboxservice": ("virtualbox-guest-utils.service", "vboxadd-service.service"),
}
"""Programs that do what a host or a cloud says, by the units of different distributions."""

CLOUD_INIT: Final = ("cloud-init.service", "cloud-init-local.service", "cloud-init-main.service")
CONSOLES: Final = re.compile(r"(?:tty(?:S|AMA|USB|O|SCLP|sclp)\d+|hvc\d+|xvc0|hvsi0|sclp_line0)")
SLEEP: Final = (
    "etc/systemd/sleep.conf",
    "etc/systemd/sleep.conf.d/*.conf",
    "usr/lib/systemd/sleep.conf.d/*.conf",
)
GETTYS: Final = (
    *("etc/systemd/system/*getty@*.service", "etc/systemd/system/*getty@*.service.d/*.conf"),
    *("run/systemd/system/*getty@*.service.d/*.conf", "usr/lib/systemd/system/*getty@*.service.d/*.conf"),
    *("etc/systemd/system/console-getty.service.d/*.conf", "etc/systemd/system/console-getty.service"),
)
_AUTOLOGIN: Final = re.compile(r"^ExecStart=.*(?:--autologin|--skip-login|\s-a\s|\s-n\s)", re.MULTILINE)
_DATASOURCES: Final = re.compile(r"^datasource_list:[ \t]*\[(.*)\]", re.MULTILINE)


def agents(system: System) -> Iterator[Seen]:
    """Look for agents that a host talks to."""
    for name, units in AGENTS.items():
        found = [unit for unit in units if system.unit(unit) is not None]
        if found:
            yield Seen(
                name,
                f"{joined(found)}, installed and not masked",
                "It does as root what the host or its cloud says: commands, files, users, keys.",
                f"Remove the package, or: systemctl mask --now {' '.join(found)}",
            )


def cloud_init(system: System) -> Iterator[Seen]:
    """Look whether cloud-init would take its configuration from the host."""
    units = [unit for unit in CLOUD_INIT if system.unit(unit) is not None]
    if (
        not units
        or (system.root / "etc/cloud/cloud-init.disabled").exists()
        or "cloud-init=disabled" in system.words
    ):
        return
    said = None
    files = [system.root / "etc/cloud/cloud.cfg", *system.files("etc/cloud/cloud.cfg.d/*.cfg")]
    for path in files:
        for match in _DATASOURCES.finditer(system.text(path) or ""):
            said = {word.strip(" \t\"'") for word in match[1].split(",") if word.strip()}
    if said == {"None"}:
        return
    told = "all datasources" if said is None else f"the datasources {joined(sorted(said))}"
    yield Seen(
        "cloud-init",
        f"{units[0]} asks {told}",
        "User data is the host's: it runs commands as root, and adds users and keys.",
        "touch /etc/cloud/cloud-init.disabled, or `datasource_list: [None]` in /etc/cloud/cloud.cfg.d",
    )


def consoles(system: System) -> Iterator[Seen]:
    """Look for logins on consoles, all of which are the host's, and for those without a password."""
    open_ones = [name for name in _gettys(system) if system.unit(name) is not None]
    if open_ones:
        yield Seen(
            "console-login",
            f"a login prompt by {joined(open_ones)}",
            "The host reads and types there: whatever password is typed on it is the host's.",
            "systemctl mask "
            + " ".join(sorted({re.sub(r"@.*\.service", "@.service", one) for one in open_ones})),
        )
    without = [
        str(path.relative_to(system.root)) for path in system.files(*GETTYS) if _logs_in(system.text(path))
    ]
    if without:
        yield Seen(
            "console-autologin",
            f"a login without a password in /{joined(without)}",
            "Whoever sees the console is in: that is the host.",
            "Remove the drop-in, and mask the getty.",
        )
    users = [
        line.split(":")[0]
        for line in (system.text("etc/shadow") or "").splitlines()
        if re.match(r"[^:]+::", line)
    ]
    if users:
        yield Seen(
            "empty-password",
            f"no password for {joined(users)}",
            "A console's prompt lets the host in as this user.",
            f"passwd --lock {users[0]}",
        )
    if _debug_shell(system):
        yield Seen(
            "debug-shell",
            "a root shell on tty9, by debug-shell.service or systemd.debug_shell",
            "The console is the host's, and so is that shell.",
            "systemctl mask debug-shell.service, and take the word off the kernel command line",
        )


def _gettys(system: System) -> Iterator[str]:
    """Name the units of gettys that would start: by systemd's generator, or because somebody enabled them."""
    wants = ("*.wants/*getty@*.service", "*.wants/console-getty.service")
    enabled = system.files(
        *(f"{place}/{name}" for place in ("etc/systemd/system", "usr/lib/systemd/system") for name in wants)
    )
    names = [path.name for path in enabled]
    if system.generator("systemd-getty-generator") is not None and not system.switched_off(
        "systemd.getty_auto"
    ):
        said = [
            word.removeprefix("console=").split(",")[0]
            for word in system.words
            if word.startswith("console=")
        ]
        active = (system.text("sys/class/tty/console/active") or "").split()
        hvc = ["hvc0"] if (system.root / "sys/class/tty/hvc0").exists() else []
        names += [
            f"serial-getty@{name}.service" for name in (*said, *active, *hvc) if CONSOLES.fullmatch(name)
        ]
    yield from dict.fromkeys(names)


def _logs_in(text: str | None) -> bool:
    return text is not None and _AUTOLOGIN.search(text) is not None


def _debug_shell(system: System) -> bool:
    if system.unit("debug-shell.service") is None:
        return False
    wanted = system.files("etc/systemd/system/*.wants/debug-shell.service")
    return bool(wanted) or any(re.match(r"(?:rd\.)?systemd\.debug[_-]shell\b", word) for word in system.words)


def crash_dumps(system: System) -> Iterator[Seen]:
    """Look for a kernel that dumps this one's memory when the host makes it crash."""
    units = [unit for unit in ("kdump-tools.service", "kdump.service") if system.unit(unit) is not None]
    words = [word for word in system.words if word.startswith("crashkernel=")]
    if units or words:
        yield Seen(
            "kdump",
            f"{joined([*units, *words])}",
            "A host can make a kernel crash; what starts then writes its memory, keys and all, to a disk or a network.",
            "Remove kdump, and crashkernel= from the kernel command line.",
        )


def sleeps(system: System) -> Iterator[Seen]:
    """Look whether the system can be sent to sleep, which writes its memory to swap, or stops its clock."""
    forbidden = all(system.says_no(name, *SLEEP) for name in ("AllowSuspend", "AllowHibernation"))
    if system.unit("sleep.target") is not None and not forbidden:
        yield Seen(
            "suspend",
            "sleep.target, not masked",
            "Hibernation writes memory to a disk and takes it back unattested; power buttons and lids are the host's.",
            "systemctl mask sleep.target suspend.target hibernate.target hybrid-sleep.target suspend-then-hibernate.target",
        )


def systemd_hears(system: System) -> Iterator[Seen]:
    """Look for what systemd takes from SMBIOS, fw_cfg, partition types and vsock."""
    if not system.switched_off("systemd.import_credentials"):
        there = sorted(path.name for path in system.root.glob("run/credentials/@system/*"))
        yield Seen(
            "credentials",
            f"no systemd.import_credentials=no; now there: {joined(there) or 'none'}",
            "SMBIOS and fw_cfg are the host's: credentials write files, add users and keys, and set root's password.",
            "Put systemd.import_credentials=no on the kernel command line.",
        )
    if system.generator("systemd-gpt-auto-generator") is not None and not system.switched_off(
        "systemd.gpt_auto"
    ):
        yield Seen(
            "gpt-auto",
            "systemd-gpt-auto-generator",
            "It mounts and swaps to partitions by their type, which a host can give to any disk.",
            "Put systemd.gpt_auto=0 on the kernel command line.",
        )
    sshd = any((system.root / name).exists() for name in ("usr/sbin/sshd", "usr/bin/sshd"))
    if (
        sshd
        and system.generator("systemd-ssh-generator") is not None
        and not system.switched_off("systemd.ssh_auto")
    ):
        yield Seen(
            "ssh-vsock",
            "systemd-ssh-generator, with sshd",
            "It offers sshd on a socket that only the host reaches, and no firewall sees.",
            "Put systemd.ssh_auto=no on the kernel command line.",
        )


Look = Callable[["System"], Iterator[Seen]]
LOOKS: Final[tuple[Look, ...]] = (agents, cloud_init, consoles, crash_dumps, sleeps, systemd_hears)
