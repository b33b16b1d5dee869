"""A command line without doors: which words close them, which open them, and whose text counts (THREATS T5)."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.boot.variants import INITRAMFS_TOOLS

from kagimori_protocol.messages import Check
from kagimori_simulator import measured_boot
from kagimori_simulator.event_log import MeasuredBoot
from kagimori_simulator.measured_boot import CMDLINE, Uki
from kagimori_verifier.appraise.command_line import (
    GIVEN_UP,
    REQUIRED,
    appraise_command_line,
    digests,
    doors,
)
from kagimori_verifier.appraise.policy import DOORS, Policy, TcbFloor, parse_policy
from kagimori_verifier.trail import Trail
from kagimori_verifier.verify import eventlog

FLOOR = TcbFloor(boot_loader=4, tee=0, snp=24, microcode=219)
CLOSED = "root=/dev/mapper/cryptroot ro " + " ".join(REQUIRED.values())


def opened(text: str) -> list[str]:
    """Name the doors that a command line leaves open."""
    return [flaw.door for flaw in doors(text)]


def judged(boot: MeasuredBoot, **policy: Any) -> Check:  # noqa: ANN401 - fields of a policy
    """Judge the command line of a boot."""
    log = eventlog.parse(boot.event_log())
    events = eventlog.replay_to(log, {index: boot.pcr(index) for index in range(16)})
    trail = Trail()
    rules = Policy(**({"boot_way": boot.way, "tcb_floors": {"Milan": FLOOR}} | policy))
    appraise_command_line(trail, "unlock", events, rules)
    (check,) = trail.checks
    return check


def test_the_words_of_kagimoris_own_configuration_close_every_door() -> None:
    """What the package puts on a command line is what the check asks for."""
    assert opened(CLOSED) == opened(CMDLINE) == []


@pytest.mark.parametrize("door", REQUIRED)
def test_without_its_word_a_door_is_open(door: Any) -> None:  # noqa: ANN401 - a Door
    """And the flaw names the word."""
    (flaw,) = doors(CLOSED.replace(REQUIRED[door], ""))
    assert (flaw.door, flaw.expected, flaw.found) == (door, REQUIRED[door], f"no {REQUIRED[door]}")


@pytest.mark.parametrize(
    ("word", "door"),
    [
        ("systemd.import_credentials=yes", "credentials"),
        ("systemd.import-credentials=1", "credentials"),
        ("rd.systemd.import_credentials=yes", "credentials"),
        ('systemd."run"=/x', "units"),
        ('sys"temd.unit=rescue.target"', "units"),
        ("systemd.confirm_spawn=1", "units"),
        ("rd.systemd.setenv=LD_PRELOAD=/x", "units"),
        ("systemd.import_credentials", "credentials"),
        ("systemd.gpt_auto=on", "gpt-auto"),
        ("rd.systemd.gpt_auto=1", "gpt-auto"),
        ("rd.shell=1", "rescue-shell"),
        ("rd.shell", "rescue-shell"),
        ("rd.emergency=shell", "emergency"),
        ("panic=", "panic"),
        ("panic=never", "panic"),
        ("break", "break"),
        ("break=premount", "break"),
        ("rd.break", "break"),
        ("rd.break=pre-mount", "break"),
        ("init=/bin/sh", "init"),
        ('"init=/bin/sh"', "init"),
        ("rdinit=/bin/sh", "init"),
        ("systemd.debug_shell", "debug-shell"),
        ("systemd.debug-shell=ttyS0", "debug-shell"),
        ("rd.systemd.debug_shell=1", "debug-shell"),
        ("systemd.unit=rescue.target", "units"),
        ("rd.systemd.unit=emergency.target", "units"),
        ("systemd.wants=debug-shell.service", "units"),
        ("rd.systemd.mask=kagimori-cap.service", "units"),
        ("systemd.mask=kagimori-confirm.service", "units"),
        ("systemd.run=/bin/sh", "units"),
        ("single", "units"),
        ("1", "units"),
        ("-b", "units"),
        ("emergency", "units"),
        ("crashkernel=256M", "crash-dump"),
        ("rd.cmdline=ask", "break"),
        ("systemd.mount-extra=/dev/vdb:/usr", "units"),
        ("rd.systemd.mount_extra=/dev/vdb:/usr", "units"),
        ("systemd.swap-extra=/dev/vdb", "units"),
        ("systemd.set_credential=passwd.hashed-password.root:", "units"),
        ("systemd.volatile=overlay", "units"),
        ("boot=live", "units"),
        ("netroot=nbd:10.0.2.2:1", "units"),
        ("nfsroot=10.0.2.2:/", "units"),
        ("root=/dev/nfs", "units"),
        ("root=live:http://10.0.2.2/", "units"),
        ("rd.overlay", "units"),
        ("kgdboc=ttyS0", "debugger"),
        ("kgdbwait", "debugger"),
        ("ekgdboc=kbd", "debugger"),
        ("sysrq_always_enabled", "debugger"),
        ("efivar_ssdt=Mallory", "acpi-tables"),
        ("acpi_rsdp=0x1000", "acpi-tables"),
        ("rdbreak=pre-mount", "break"),
        ("systemd.break=pre-mount", "break"),
        ("rd.systemd.break", "break"),
        ("initrdmem=0x1000000,0x800000", "init"),
        ("initrd=0x1000000,0x800000", "init"),
        ("systemd.crash_shell", "debug-shell"),
        ("rd.systemd.crash-shell=yes", "debug-shell"),
        ("-s", "units"),
        ("S", "units"),
        ("recovery", "units"),
        ("systemd.set_credential_binary=passwd.hashed-password.root:AA==", "units"),
        ("rd.systemd.set-credential-binary=a:AA==", "units"),
        ("systemd.condition-first-boot=yes", "units"),
        ("--unit=rescue.target", "units"),
        ("--confirm-spawn", "units"),
        ("SYSTEMD_PROC_CMDLINE=x", "units"),
        ("LD_PRELOAD=/x", "units"),
        ("cloud-config-url=http://10.0.2.2/", "units"),
        ("url=http://10.0.2.2/", "units"),
        ("ds=nocloud;s=http://10.0.2.2/", "units"),
        ("root=dhcp", "units"),
        ("root=cifs://10.0.2.2/", "units"),
        ("root=/dev/nbd0", "units"),
        ("root=", "units"),
        ("nbdroot=10.0.2.2,1", "units"),
        ("overlayroot=tmpfs", "units"),
        ("kgdboc_earlycon=ttyS0", "debugger"),
        ("kgdboc.kgdboc=ttyS0", "debugger"),
        ("sysctl.kernel.sysrq=1", "debugger"),
        ("sysctl/kernel/sysrq=438", "debugger"),
        ("bootconfig", "command-line"),
    ],
)
def test_a_word_that_opens_a_door_is_named(word: str, door: str) -> None:
    """Before the words that close them and after: whichever counts for whom, both must be good."""
    for text in (f"{word} {CLOSED}", f"{CLOSED} {word}", f"{CLOSED} -- {word}"):
        assert opened(text) == [door]


@pytest.mark.parametrize(
    "word",
    [
        *("init=/sbin/init", "init=/usr/lib/systemd/systemd", "systemd.unit=multi-user.target"),
        *("rd.systemd.unit=initrd.target", "panic=30", "rd.emergency=reboot", "systemd.gpt_auto=no", "quiet"),
        *("root=/dev/mapper/cryptroot", "root=UUID=5c9e7a10-3d0f-4b7a-9a51-0c6b7d1e2f30", "root=LABEL=live"),
        *("boot=local", "rootflags=subvol=@", "rootfstype=ext4", "root=block:/dev/mapper/cryptroot"),
        *("root=PARTUUID=8270f3c9-b4e4-4345-80ee-5a62db7ebf3f", "initrd=\\EFI\\debian\\initrd.img", "_b"),
        *("sysctl.kernel.sysrq=0", "systemd.crash_shell=no", "systemd.condition-first-boot=no", "ds=none"),
        *("2", "3", "5", "overlayroot=disabled", "BOOT_IMAGE=/vmlinuz", "nomodeset", "bootdev=recovery"),
        *("console=ttyS0,115200", "breakfast=yes", "rd.luks.name=uuid=cryptroot", "kagimori.debug"),
    ],
)
def test_a_harmless_word_opens_nothing(word: str) -> None:
    """Other names that begin alike, and values that are the ordinary ones."""
    assert opened(f"{CLOSED} {word}") == []


@pytest.mark.parametrize(
    "text",
    [
        CLOSED.replace("noresume", 'x="a noresume b"'),
        CLOSED.replace("noresume", "x='a noresume b'"),
        CLOSED.replace("noresume", '"noresume"'),
        CLOSED.replace("noresume", "") + " -- noresume",
        CLOSED.replace("noresume", "") + " noresume\\",
        CLOSED.replace("noresume", "noresume=1"),
        CLOSED.replace("noresume", "resume"),
        CLOSED.replace("noresume", "rd.noresume"),
        # The kernel knows only one kind of quotes, and may be inside of them where systemd is outside.
        CLOSED.replace("noresume", """x='"' noresume y='"'"""),
        CLOSED.replace("noresume", "x\\ noresume"),
        CLOSED.replace("noresume", "") + """ x=\\" noresume y=\\" """,
    ],
)
def test_a_word_that_may_be_read_another_way_closes_nothing(text: str) -> None:
    """In quotes, behind a --, beside a backslash, or with rd. before it: who reads a line takes these apart differently."""
    assert opened(text) == ["resume"]


@pytest.mark.parametrize("word", ['panic="-1"', "panic='-1'", 'x="a panic=-1"', '"panic=-1"', "panic=\\-1"])
def test_a_word_that_closes_and_may_be_read_another_way_beside_a_good_one_is_refused(word: str) -> None:
    """The shell of initramfs-tools leaves the quotes in the value, which is no number then, and the last one counts."""
    for text in (f"{word} {CLOSED}", f"{CLOSED} {word}"):
        assert opened(text) == ["panic"]


@pytest.mark.parametrize(
    "odd", ["\t", "\v", "\f", "\r", "\n", "\x00", "\x1c", "\x7f", "\x85", "\xa0", "é", "\u2028", "\ufffd"]
)
def test_a_text_that_is_not_printable_ascii_is_refused(odd: str) -> None:
    """At some of these the kernel ends a word, or the line, and systemd does not, or we do not."""
    for text in (
        f"{CLOSED}{odd}quiet",
        f"x={odd}{CLOSED}",
        f"{odd}{CLOSED}",
        f"quiet{odd}init=/bin/sh {CLOSED}",
    ):
        flaw = doors(text)[0]
        assert (flaw.door, flaw.found) == ("reading", f"{odd!a} at {text.index(odd)}")


def test_the_newline_at_the_end_of_a_file_is_no_part_of_a_text() -> None:
    """A file that became a command line ends with one, and there all who read it agree."""
    assert opened(f"{CLOSED}\n") == []


def test_a_text_longer_than_the_kernel_takes_is_refused() -> None:
    """What is cut off closes nothing."""
    longest = f"x={'y' * (2047 - len(CLOSED) - 3)} {CLOSED}"
    assert opened(longest) == []
    (flaw,) = doors(f"x{longest}")
    assert (flaw.door, flaw.found) == ("reading", "2048 characters")


@given(st.text(max_size=80), st.sampled_from(sorted(REQUIRED)))
def test_whatever_else_is_there_a_missing_word_is_found(noise: str, door: Any) -> None:  # noqa: ANN401 - a Door
    """No text beside it takes the place of a word that is not there, unless it is that word."""
    key = REQUIRED[door].partition("=")[0].rpartition(".")[2].replace("_", "")
    if key in noise.replace("_", "").replace("-", ""):
        return
    assert door in opened(f"{noise} {CLOSED.replace(REQUIRED[door], '')}")


BOOTS = {
    "grub": measured_boot.grub(),
    "uki": measured_boot.uki(),
    "direct": measured_boot.direct(),
}


@pytest.mark.parametrize("way", BOOTS)
def test_a_boot_without_doors_holds_where_its_text_is_known(way: str) -> None:
    """Of GRUB's log, or out of the profile, by the digest that the kernel's stub measured."""
    assert judged(BOOTS[way], command_lines=["another", CMDLINE]).ok
    assert judged(BOOTS[way]).ok == (way == "grub")


@pytest.mark.parametrize("way", ["uki", "direct"])
def test_a_text_that_nobody_has_stated_is_a_door_of_its_own(way: str) -> None:
    """Unknown means no, unless the owner accepts that nobody has looked."""
    for lines in ([], ["root=/dev/vda ro"]):
        check = judged(BOOTS[way], command_lines=lines)
        assert not check.ok
        assert check.expected == "command-line: a command line whose text is known (command_lines)"
    assert judged(BOOTS[way], accepted_doors=["command-line"]).ok


def test_a_stated_text_is_judged_like_any_other() -> None:
    """Nor does it help to state a good one beside the one that was booted."""
    text = "root=/dev/mapper/cryptroot ro rd.break"
    boot = measured_boot.direct(cmdline=text)
    check = judged(boot, command_lines=[CMDLINE, text])
    assert not check.ok
    assert "break: rd.break" in check.found
    assert "credentials: no systemd.import_credentials=no" in check.found
    assert not judged(boot, command_lines=[CMDLINE]).ok


def test_every_command_line_of_grubs_log_counts() -> None:
    """The text is taken from what was hashed; a label is not."""
    bad = measured_boot.grub(cmdline=f"{CMDLINE} init=/bin/sh")
    check = judged(bad)
    assert (check.ok, check.found) == (False, "init: init=/bin/sh")
    none = judged(measured_boot.grub(), boot_way="grub", accepted_doors=[])
    assert none.ok
    trail = Trail()
    appraise_command_line(trail, "unlock", {}, Policy(boot_way="grub", tcb_floors={"Milan": FLOOR}))
    assert [check.ok for check in trail.checks] == [False]


def test_doors_are_accepted_by_name() -> None:
    """And all others must be closed still."""
    boot = measured_boot.grub(cmdline=CMDLINE.replace("noresume", "").replace("panic=-1", ""))
    assert judged(boot).found == "resume: no noresume; panic: no panic=-1"
    assert judged(boot, accepted_doors=["resume"]).found == "panic: no panic=-1"
    check = judged(boot, accepted_doors=["resume", "panic"])
    assert (check.ok, check.expected) == (True, "no door, but for resume, panic")


def test_a_digest_is_that_of_the_kernels_stub() -> None:
    """UTF-16, as a UEFI program gets it, with its final NUL or without; QEMU adds a word of its own."""
    assert hashlib.sha256("ro initrd=initrd\0".encode("utf-16-le")).digest() in digests("ro")
    assert hashlib.sha256("ro".encode("utf-16-le")).digest() in digests("ro")
    assert judged(measured_boot.uki(image=Uki(cmdline=CLOSED)), command_lines=[CLOSED]).ok


def test_every_door_says_what_is_given_up() -> None:
    """Whoever accepts one reads it; nothing else can be accepted."""
    assert set(GIVEN_UP) == set(DOORS)
    with pytest.raises(Exception, match="accepted_doors") as caught:
        parse_policy(
            msgspec.json.encode(
                {
                    "boot_way": "uki",
                    "tcb_floors": {"Milan": msgspec.to_builtins(FLOOR)},
                    "accepted_doors": ["all"],
                }
            )
        )
    assert getattr(caught.value, "code", "") == "policy.invalid"


def test_what_the_package_sets_is_what_is_demanded() -> None:
    """For GRUB, for whoever makes a command line another way, and in the images of the boot tests."""
    room = Path(__file__).parent.parent.parent / "initramfs-tools-hook/command-line"
    words = (room / "words").read_text().strip()
    assert sorted(words.split()) == sorted(REQUIRED.values())
    script = f'GRUB_CMDLINE_LINUX=quiet\n. {room / "kagimori.cfg"}\nprintf %s "$GRUB_CMDLINE_LINUX"'
    done = subprocess.run(["sh", "-ec", script], check=True, capture_output=True, text=True)
    assert done.stdout == f"quiet {words}"
    assert opened(done.stdout) == opened(INITRAMFS_TOOLS.cmdline) == []
