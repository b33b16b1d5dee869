"""``doctor --host-doors`` names what lets a host into a booted system: each door alone, and none where all are closed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.root.sysfs import AGENT_TOML, UUID, Kernel

from kagimori_agent import cli, host_doors
from kagimori_agent.host_doors_software import AGENTS
from kagimori_protocol.errors import OperatorError

WORDS = "root=/dev/mapper/cryptroot ro systemd.import_credentials=no noresume systemd.gpt_auto=0 systemd.ssh_auto=no"
UNITS = "usr/lib/systemd/system"


class Booted:
    """A booted system with all doors closed, on a volume of agent.toml."""

    def __init__(self, root: Path) -> None:
        """Make it."""
        self.kernel = Kernel(root)
        self.root = root
        self.kernel.disk("vda")
        self.kernel.partition("vda1", "vda")
        self.kernel.partition("vda2", "vda")
        self.kernel.opened("dm-0", "vda2")
        self.kernel.mount("/", "/dev/mapper/cryptroot", number=self.kernel.number("dm-0"))
        self.write("etc/kagimori/agent.toml", AGENT_TOML)
        self.write("proc/cmdline", WORDS)
        for name in ("getty@.service", "serial-getty@.service", "sleep.target", "debug-shell.service"):
            self.write(f"{UNITS}/{name}", "[Unit]\n")
        for name in ("gpt-auto", "ssh", "getty"):
            self.write(f"usr/lib/systemd/system-generators/systemd-{name}-generator", "a program")
        self.write("usr/sbin/sshd", "a program")
        self.write("etc/ssh/ssh_host_ed25519_key", "a key")
        self.write("etc/shadow", "root:*:20000:0:99999:7:::\n")
        self.link("etc/systemd/system/sleep.target", "/dev/null")
        self.write("etc/fstab", "/dev/mapper/cryptroot / ext4 rw 0 1\ntmpfs /tmp tmpfs rw 0 0\n")
        self.write("etc/crypttab", f"cryptroot UUID={UUID} none luks\n")

    def write(self, name: str, text: str) -> None:
        """Write a file."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def add(self, name: str, line: str) -> None:
        """Add a line to a file."""
        path = self.root / name
        path.write_text(f"{path.read_text()}{line}\n")

    def link(self, name: str, target: str) -> None:
        """Make a link."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)

    def cmdline(self, without: str = "", more: str = "") -> None:
        """Boot with another command line."""
        self.write("proc/cmdline", f"{WORDS.replace(without, '')} {more}")

    def by_uuid(self, uuid: str, device: str) -> None:
        """Let udev have found a file system there."""
        self.link(f"dev/disk/by-uuid/{uuid}", f"../../{device}")

    def open(self) -> list[str]:
        """Name the doors that are open."""
        return [door.id for door in host_doors.open_doors(self.root)]


@pytest.fixture
def booted(tmp_path: Path) -> Booted:
    """Give one."""
    (tmp_path / "root").mkdir()
    return Booted(tmp_path / "root")


def test_a_system_with_all_doors_closed_has_none(booted: Booted) -> None:
    """So that whoever has closed them gets through; an enrolment asks for exactly this."""
    assert booted.open() == []


def cloud_init(booted: Booted) -> str:
    """User data runs commands as root."""
    booted.write(f"{UNITS}/cloud-init.service", "[Unit]\n")
    booted.write("etc/cloud/cloud.cfg", "datasource_list: [ NoCloud, None ]\n")
    return "cloud-init"


def cloud_init_of_every_source(booted: Booted) -> str:
    """Without a list it asks all that there are."""
    booted.write("usr/lib/systemd/system/cloud-init-local.service", "[Unit]\n")
    return "cloud-init"


def serial_console(booted: Booted) -> str:
    """The generator starts a login on a serial console of the command line."""
    booted.cmdline(more="console=ttyS0,115200")
    return "console-login"


def virtual_terminal(booted: Booted) -> str:
    """Its picture and its keyboard are the host's, too."""
    booted.link("etc/systemd/system/getty.target.wants/getty@tty1.service", f"/{UNITS}/getty@.service")
    return "console-login"


def hypervisor_console(booted: Booted) -> str:
    """The generator takes one that is there, whatever the command line says."""
    booted.write("sys/class/tty/hvc0/dev", "229:0")
    return "console-login"


def autologin(booted: Booted) -> str:
    """A drop-in that logs root in."""
    booted.write(
        "etc/systemd/system/serial-getty@ttyS0.service.d/auto.conf",
        "[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root %I\n",
    )
    return "console-autologin"


def no_password(booted: Booted) -> str:
    """Root logs in with the return key."""
    booted.write("etc/shadow", "daemon:*:1::::::\nroot::20000:0:99999:7:::\n")
    return "empty-password"


def shell_for_debugging(booted: Booted) -> str:
    """A root shell on tty9."""
    booted.cmdline(more="systemd.debug_shell=1")
    return "debug-shell"


def shell_for_debugging_enabled(booted: Booted) -> str:
    """The same, enabled as a unit."""
    booted.link(
        "etc/systemd/system/sysinit.target.wants/debug-shell.service", f"/{UNITS}/debug-shell.service"
    )
    return "debug-shell"


def kdump(booted: Booted) -> str:
    """Memory is kept for a kernel that dumps this one."""
    booted.cmdline(more="crashkernel=256M")
    return "kdump"


def sleep(booted: Booted) -> str:
    """Nobody has masked sleep.target."""
    (booted.root / "etc/systemd/system/sleep.target").unlink()
    return "suspend"


def credentials(booted: Booted) -> str:
    """The word is missing, or says yes at last."""
    booted.cmdline(more="systemd.import_credentials=yes")
    return "credentials"


def partition_types(booted: Booted) -> str:
    """The generator is there, and the word is missing."""
    booted.cmdline(without="systemd.gpt_auto=0")
    return "gpt-auto"


def ssh_by_vsock(booted: Booted) -> str:
    """Systemd offers sshd to the host alone."""
    booted.cmdline(without="systemd.ssh_auto=no")
    return "ssh-vsock"


def plain_boot(booted: Booted) -> str:
    """A partition by its UUID, which any disk can carry."""
    booted.by_uuid("ABCD-1234", "vda1")
    booted.add("etc/fstab", "UUID=ABCD-1234 /boot/efi vfat umask=0077 0 1")
    return "fstab:/boot/efi"


def absent_disk(booted: Booted) -> str:
    """A disk that is not there yet comes when the host likes."""
    booted.add("etc/fstab", "LABEL=data /srv/my\\040data ext4 nofail 0 2")
    return "fstab:/srv/my data"


def hosts_directory(booted: Booted) -> str:
    """A directory of the host's."""
    booted.add("etc/fstab", "share /mnt virtiofs rw 0 0")
    return "fstab:/mnt"


def swap_in_fstab(booted: Booted) -> str:
    """A swap on a plain partition."""
    booted.by_uuid("1-2-3", "vda1")
    booted.add("etc/fstab", "UUID=1-2-3 none swap sw 0 0")
    return "swap:UUID=1-2-3"


def swap_in_use(booted: Booted) -> str:
    """Whoever has switched it on."""
    booted.kernel.swap("/dev/vda1")
    return "swap:/dev/vda1"


def another_volume(booted: Booted) -> str:
    """A volume by UUID, with a key of its own."""
    booted.by_uuid("9-9-9", "vda1")
    booted.add("etc/crypttab", "data UUID=9-9-9 /etc/data.key luks")
    return "crypttab:data"


def resume_device(booted: Booted) -> str:
    """A swap to resume from."""
    booted.cmdline(more="resume=/dev/mapper/vg-swap")
    return "resume"


def no_noresume(booted: Booted) -> str:
    """The word is missing, so an initramfs may look for an image."""
    booted.cmdline(without="noresume")
    return "resume"


def resume_of_initramfs_tools(booted: Booted) -> str:
    """The installer has written it there."""
    booted.write("etc/initramfs-tools/conf.d/resume", "RESUME=UUID=1-2-3\n")
    return "resume"


def firmware_variable(booted: Booted) -> str:
    """Systemd left it, or the host has put it there."""
    booted.write("sys/firmware/efi/efivars/HibernateLocation-8cf2644b-4b0b-428f-9387-6d876050dc67", "{}")
    return "hibernate-location"


def second_command_line(booted: Booted) -> str:
    """Somebody has used `bootctl systemd-efi-options`, or the host has put it there."""
    booted.write("sys/firmware/efi/efivars/SystemdOptions-8cf2644b-4b0b-428f-9387-6d876050dc67", "debug")
    return "efi-options"


def keys_of_sshd(booted: Booted) -> str:
    """/etc lies on a plain disk."""
    booted.kernel.mount("/etc", "/dev/vda1")
    return "ssh-host-keys"


@pytest.mark.parametrize(
    "opened",
    [
        *(cloud_init, cloud_init_of_every_source, serial_console, virtual_terminal, hypervisor_console),
        *(
            autologin,
            no_password,
            shell_for_debugging,
            shell_for_debugging_enabled,
            kdump,
            sleep,
            credentials,
        ),
        *(
            partition_types,
            ssh_by_vsock,
            plain_boot,
            absent_disk,
            hosts_directory,
            swap_in_fstab,
            swap_in_use,
        ),
        *(
            another_volume,
            resume_device,
            no_noresume,
            resume_of_initramfs_tools,
            firmware_variable,
            second_command_line,
            keys_of_sshd,
        ),
    ],
    ids=lambda opened: opened.__name__,
)
def test_each_door_is_named_alone(opened: Callable[[Booted], str], booted: Booted) -> None:
    """The function's own words say what is open, and it returns the door's name."""
    name = opened(booted)
    assert booted.open() == [name]
    (door,) = host_doors.open_doors(booted.root)
    assert door.found
    assert door.why
    assert door.todo


@pytest.mark.parametrize(("name", "unit"), [(name, unit) for name, units in AGENTS.items() for unit in units])
def test_each_agent_of_a_host_is_found_by_each_of_its_units(name: str, unit: str, booted: Booted) -> None:
    """Enabled or not: udev starts some of them. Masked, it is closed."""
    booted.write(f"{UNITS}/{unit}", "[Unit]\n")
    assert booted.open() == [name]
    booted.link(f"etc/systemd/system/{unit}", "/dev/null")
    assert booted.open() == []


def cloud_init_disabled(booted: Booted) -> None:
    """By its own file."""
    cloud_init(booted)
    booted.write("etc/cloud/cloud-init.disabled", "")


def cloud_init_without_sources(booted: Booted) -> None:
    """By a later file that names none."""
    cloud_init(booted)
    booted.write("etc/cloud/cloud.cfg.d/99-none.cfg", "datasource_list: [None]\n")


def getty_masked(booted: Booted) -> None:
    """The template, and with it every instance."""
    serial_console(booted)
    booted.link("etc/systemd/system/serial-getty@.service", "/dev/null")


def one_getty_masked(booted: Booted) -> None:
    """This instance alone, by an empty file."""
    serial_console(booted)
    booted.write("etc/systemd/system/serial-getty@ttyS0.service", "")


def getty_generator_masked(booted: Booted) -> None:
    """Nobody starts one."""
    serial_console(booted)
    booted.link("etc/systemd/system-generators/systemd-getty-generator", "/dev/null")


def sleep_forbidden(booted: Booted) -> None:
    """By systemd's own configuration, in two files."""
    sleep(booted)
    booted.write("etc/systemd/sleep.conf", "[Sleep]\nAllowSuspend=no\nAllowHibernation=yes\n")
    booted.write("etc/systemd/sleep.conf.d/50.conf", "[Sleep]\n")
    booted.write("etc/systemd/sleep.conf.d/zz.conf", "[Sleep]\nAllowHibernation=no\n")


def generator_masked(booted: Booted) -> None:
    """In place of the word."""
    partition_types(booted)
    booted.link("etc/systemd/system-generators/systemd-gpt-auto-generator", "/dev/null")


def mounted_by_hand(booted: Booted) -> None:
    """Nobody mounts it by itself."""
    booted.add("etc/fstab", "UUID=ABCD-1234 /boot/efi vfat noauto 0 1")


def data_on_the_volume(booted: Booted) -> None:
    """A file system by UUID, on a logical volume of the owner's, a swap file, and a volume that lies on it."""
    booted.kernel.upon("dm-1", ["dm-0"], "vg-data")
    booted.by_uuid("7-7-7", "dm-1")
    booted.add("etc/fstab", "UUID=7-7-7 /srv ext4 rw 0 2")
    booted.add("etc/fstab", "/swapfile none swap sw 0 0")
    booted.add("etc/crypttab", "inner /dev/mapper/vg-data none luks")
    booted.kernel.swap("/swapfile", "file")


@pytest.mark.parametrize(
    "closed",
    [
        *(
            cloud_init_disabled,
            cloud_init_without_sources,
            getty_masked,
            one_getty_masked,
            getty_generator_masked,
        ),
        *(sleep_forbidden, generator_masked, mounted_by_hand, data_on_the_volume),
    ],
    ids=lambda closed: closed.__name__,
)
def test_a_door_that_is_closed_is_not_named(closed: Callable[[Booted], None], booted: Booted) -> None:
    """The function's own words say how it is closed."""
    closed(booted)
    assert booted.open() == []


def test_without_agent_toml_no_mapping_is_the_owners(booted: Booted) -> None:
    """Unless whoever asks names the volumes, as an enrolment does that has yet to write it."""
    (booted.root / "etc/kagimori/agent.toml").unlink()
    assert {"fstab:/", "crypttab:cryptroot", "ssh-host-keys"} <= set(booted.open())
    assert host_doors.open_doors(booted.root, [UUID]) == []


def test_a_door_is_accepted_by_name_and_with_a_reason(booted: Booted) -> None:
    """It is still told, last, and with the reason; others stay open."""
    booted.write(host_doors.ACCEPTED, "# ours\n\nkdump   dumps go to a volume of ours, and no further\n")
    assert booted.open() == []
    booted.cmdline(more="crashkernel=1G")
    assert booted.open() == []
    booted.cmdline(without="noresume", more="crashkernel=1G")
    told = host_doors.examine(booted.root)
    assert [(door.id, door.accepted) for door in told] == [
        ("resume", None),
        ("kdump", "dumps go to a volume of ours, and no further"),
    ]
    assert next(told[1].lines()).startswith("accepted  kdump: crashkernel=1G")
    assert [line.split(":")[0].strip() for line in told[0].lines()] == ["OPEN      resume", "why", "to do"]


@pytest.mark.parametrize("text", ["kdump\n", "kdump  \n", "Kdump because\n", "kdump a\nkdump b\n", "\xff"])
def test_a_list_of_accepted_doors_that_says_too_little_accepts_nothing(text: str, booted: Booted) -> None:
    """A reason is what its owner reads in a year."""
    (booted.root / host_doors.ACCEPTED).write_bytes(text.encode("latin-1"))
    with pytest.raises(OperatorError) as caught:
        booted.open()
    assert caught.value.code == "doors.accepted"


def test_the_command_ends_with_1_while_a_door_is_open(
    booted: Booted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And tells of it, for people and for programs."""
    original = host_doors.examine
    monkeypatch.setattr(host_doors, "examine", lambda: original(booted.root))
    assert cli.main(["doctor", "--host-doors"]) == 0
    assert "no door is open" in capsys.readouterr().out
    kdump(booted)
    assert cli.main(["doctor", "--host-doors"]) == 1
    assert "OPEN      kdump: crashkernel=256M" in capsys.readouterr().out
    assert cli.main(["doctor", "--host-doors", "--json"]) == 1
    (door,) = json.loads(capsys.readouterr().out)["doors"]
    assert (door["id"], door["accepted"]) == ("kdump", None)
