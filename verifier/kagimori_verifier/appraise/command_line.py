"""A command line without doors: what it must say, and must not, so that an attested boot takes nothing from the host.

A command line is measured, so no host changes it; but one that its owner has accepted may still leave doors open that no
PCR shows: credentials from SMBIOS, an image to resume, a shell on a console. Each door has a name, and a policy accepts by
name those that its owner leaves open.

The text itself is in the log only where GRUB boots (PCR 8). The kernel's own event (PCR 9) has a digest of it, so for the
other boot ways the owner states the text in the policy, and the digest tells which one was booted (THREATS T5).

Sources: Linux, Documentation/admin-guide/kernel-parameters; kernel-command-line(7), systemd-system-credentials(7),
systemd-debug-generator(8), systemd(1); dracut.cmdline(7); initramfs-tools(7); cloud-init's documentation of the command
line; FORMATS section 8 for how the kernel's EFI stub measures its load options.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from kagimori_verifier.verify import eventlog_measured

if TYPE_CHECKING:
    from kagimori_verifier.appraise.policy import Door, Policy
    from kagimori_verifier.trail import Trail
    from kagimori_verifier.verify.eventlog import Event

LOAD_OPTIONS_PCR: Final = 9
QEMUS_OWN: Final = " initrd=initrd"
"""What QEMU adds to a command line that it hands over itself (boot way ``direct``)."""
LONGEST: Final = 2047
"""Bytes that Linux takes on x86 (COMMAND_LINE_SIZE, with the final NUL); the rest is cut off, and its words with it."""

REQUIRED: Final[dict[Door, str]] = {
    "credentials": "systemd.import_credentials=no",
    "resume": "noresume",
    "gpt-auto": "systemd.gpt_auto=0",
    "rescue-shell": "rd.shell=0",
    "emergency": "rd.emergency=poweroff",
    "panic": "panic=-1",
}
"""The word that closes each of these doors, as Kagimori's own configuration sets it."""

GIVEN_UP: Final[dict[Door, str]] = {
    "credentials": "the host's SMBIOS and fw_cfg write files, add users and set passwords in the guest",
    "resume": "a disk of the host's may hold a hibernated system that takes the place of the attested one",
    "gpt-auto": "partitions of any disk are mounted and swapped to by their type",
    "rescue-shell": "a dracut that fails gives a root shell on the host's console",
    "emergency": "a dracut that fails waits there for whoever has the console",
    "panic": "an initramfs-tools that fails gives a root shell on the host's console",
    "break": "the boot stops in a root shell on the host's console",
    "init": "something else than systemd becomes the system",
    "debug-shell": "a root shell waits on the host's console",
    "units": "the booted system is not the one that its root configures",
    "crash-dump": "a host that makes the kernel crash has its memory written down by another",
    "debugger": "the kernel's debugger, or its emergency keys, obey the host's console",
    "acpi-tables": "the kernel runs ACPI code that no PCR covers",
    "reading": "who boots may read other words in the text than were judged",
    "command-line": "what is booted may leave any door open: nobody has looked",
}
"""What an owner gives up who accepts a door."""

_NO: Final = r"(?i:0|no|n|false|f|off)"
_CLOSES: Final[dict[Door, tuple[str, str]]] = {
    "credentials": ("systemd.import_credentials", _NO),
    "resume": ("noresume", ""),
    "gpt-auto": ("systemd.gpt_auto", _NO),
    "rescue-shell": ("rd.shell", r"0|no|off"),
    "emergency": ("rd.emergency", r"poweroff|reboot|halt"),
    # With a number, initramfs-tools gives no shell.
    "panic": ("panic", r"-1|\d+"),
}
"""The key of each word, and which of its values close the door; every one that is there must."""

_UNIT_WORDS: Final = (
    *("wants", "mask", "run", "mount_extra", "swap_extra", "volatile"),
    *("set_credential", "set_credential_binary"),
    # What it asks on the console, fetches, gives to every program, listens at.
    *("confirm_spawn", "pull", "setenv", "ssh_listen"),
)
_PREFIXES: Final = ("", "rd.")
_OPENS: Final[dict[Door, tuple[tuple[str, str], ...]]] = {
    "break": tuple(
        (word, "")
        for word in ("break", "rd.break", "rdbreak", "rd.cmdline", "systemd.break", "rd.systemd.break")
    ),
    "init": (
        *(("init", r"/sbin/init|(?:/usr)?/lib/systemd/systemd"), ("rdinit", "")),
        # An initramfs that lies in memory already, measured by nobody. Of a file, the kernel's EFI stub measures what it reads.
        *(("initrdmem", ""), ("initrd", "[^,]*")),
    ),
    "debug-shell": tuple(
        (f"{prefix}systemd.{word}", harmless)
        for prefix in _PREFIXES
        for word, harmless in (("debug_shell", ""), ("crash_shell", _NO))
    ),
    "units": (
        *(
            ("systemd.unit", r"(?:multi-user|graphical|default)\.target"),
            ("rd.systemd.unit", r"initrd\.target"),
        ),
        *((f"{prefix}systemd.{word}", "") for prefix in _PREFIXES for word in _UNIT_WORDS),
        # With it, programs of a first boot ask on the console for what is not set.
        *((f"{prefix}systemd.condition_first_boot", _NO) for prefix in _PREFIXES),
        # Where another root comes from than a disk that the root check can follow.
        *(("boot", "local"), ("netroot", ""), ("nfsroot", ""), ("nbdroot", "")),
        *(("rd.overlay", "0|no|off"), ("overlayroot", "disabled")),
        ("root", r"(?:block:)?/dev/(?!nfs|cifs|nbd|ram).+|(?:UUID|LABEL|PARTUUID|PARTLABEL)=.+"),
        *((word, "") for word in ("emergency", "rescue", "single", "s", "S", "1", "-b", "-s", "rd.rescue")),
        # The menu of Ubuntu's friendly-recovery, on the console.
        ("recovery", ""),
        # From where cloud-init fetches what it does.
        *(("cloud_config_url", ""), ("url", ""), ("ds", r"(?!.*://).*")),
    ),
    "crash-dump": (("crashkernel", ""),),
    "debugger": (
        *((word, "") for word in ("kgdboc", "kgdboc.kgdboc", "kgdboc_earlycon", "ekgdboc")),
        *((word, "") for word in ("kgdbdbgp", "kgdbwait", "sysrq_always_enabled")),
        ("sysctl.kernel.sysrq", "0"),
    ),
    "acpi-tables": (("efivar_ssdt", ""), ("acpi_rsdp", "")),
    # More words, which the kernel takes out of the initramfs.
    "command-line": (("bootconfig", ""),),
}
"""Keys that open a door, and the values with which they do not."""
_OPENS_UNITS: Final = ("--", "SYSTEMD_", "LD_")
"""How keys begin that do so, too: arguments of init, and what the kernel puts into its environment."""


class Flaw(NamedTuple):
    """A door that is open: its name, what would close it, and what was found."""

    door: Door
    expected: str
    found: str


def appraise_command_line(
    trail: Trail, purpose: str, events: Mapping[int, Sequence[Event]], policy: Policy
) -> bool:
    """Note, and tell, whether every command line that was booted is known, and without doors but accepted ones.

    ``enrol`` comes from a boot before that was seen to: doors are told, and its volumes wait for their owner (ADR 9).
    """
    texts = list(dict.fromkeys(_booted(events, policy)))
    flaws = [flaw for text in texts for flaw in doors(text)]
    if not texts:
        told = "no text of the profile's has the digest that was measured" if policy.command_lines else "none"
        flaws = [Flaw("command-line", "a command line whose text is known (command_lines)", told)]
    counted = [flaw for flaw in flaws if flaw.door not in policy.accepted_doors]
    accepted = f", but for {', '.join(policy.accepted_doors)}" if policy.accepted_doors else ""
    trail.note(
        "cmdline.doors",
        not counted or purpose == "enrol",
        expected="; ".join(f"{flaw.door}: {flaw.expected}" for flaw in counted) or f"no door{accepted}",
        found="; ".join(f"{flaw.door}: {flaw.found}" for flaw in counted) or "none that is open",
    )
    return not counted


class _Word(NamedTuple):
    """One word of a command line, and how sure it is that all who read the line see this word."""

    text: str
    key: str
    value: str
    clear: bool
    """No quote is in it, and it is in none: whoever splits the line at blanks or by quotes reads the same key and value."""
    heeded: bool
    """It is clear, and a parameter of the kernel's, not an argument that the kernel leaves to init."""


def doors(text: str) -> list[Flaw]:
    """List the doors that a command line leaves open."""
    words = list(_words(text))
    found = _misreadings(text)
    for door, (key, closing) in _CLOSES.items():
        # With rd. before it, a word may open the door, and closes it at most in the initramfs.
        said = [word for word in words if word.key in {key, f"rd.{key}"}]
        wrong = [word.text for word in said if not (word.clear and re.fullmatch(closing, word.value))]
        if wrong or not any(word.heeded and word.key == key for word in said):
            found.append(Flaw(door, REQUIRED[door], wrong[0] if wrong else f"no {REQUIRED[door]}"))
    for door, keys in _OPENS.items():
        for key, harmless in keys:
            for word in words:
                if word.key == key and not (harmless and re.fullmatch(harmless, word.value)):
                    found.append(Flaw(door, f"no {key}", word.text))
    for start in _OPENS_UNITS:
        found += [
            Flaw("units", f"no {start}*", word.text)
            for word in words
            if word.key.startswith(start) and word.key != start
        ]
    return found


def _misreadings(text: str) -> list[Flaw]:
    """Tell why not all who read a text find the same words in it, and all of them.

    The kernel ends a word at any byte that its isspace calls so, a no-break space among them; its EFI stub ends the line at a
    newline; systemd and the shells of an initramfs do neither. The newline at the end of a file is where all of them end.
    """
    found = []
    line = text.rstrip("\n")
    odd = re.search(r"[^ -~]", line)
    if odd:
        found.append(Flaw("reading", "printable ASCII", f"{odd[0]!a} at {odd.start()}"))
    if len(line) > LONGEST:
        found.append(Flaw("reading", f"at most {LONGEST} characters", f"{len(line)} characters"))
    return found


def digests(text: str) -> frozenset[bytes]:
    """Give every SHA-256 digest by which a kernel's event may tell of this command line."""
    encoded = [whole.encode("utf-16-le") for whole in (text, text + QEMUS_OWN)]
    return frozenset(hashlib.sha256(raw + end).digest() for raw in encoded for end in (b"", b"\0\0"))


def _booted(events: Mapping[int, Sequence[Event]], policy: Policy) -> Iterator[str]:
    """Give the texts of what was booted, as far as their digests prove them."""
    if policy.boot_way == "grub":
        for event in events.get(eventlog_measured.GRUB_TEXT_PCR, ()):
            measured = eventlog_measured.measured_part(event)
            # Commands are measured the same way and could pass as command lines, but not one as another that is there:
            # the value of the PCR is the owner's.
            if measured is not None and event.data.startswith((b"kernel_cmdline: ", b"grub_kernel_cmdline ")):
                yield measured.part.rstrip(b"\0").decode("utf-8", errors="replace")
        return
    measured_digests = {event.digest() for event in events.get(LOAD_OPTIONS_PCR, ())}
    yield from (text for text in policy.command_lines if digests(text) & measured_digests)


def _words(text: str) -> Iterator[_Word]:
    """Give each word, as far as blanks part them.

    Who reads a command line takes quotes its own way, and the kernel leaves to init what follows a ``--``: a word in
    either may open a door and closes none. A dash in a key is an underscore (parse_args of the kernel, systemd), but not
    one before it; a slash in the name of a sysctl is a dot.
    """
    quote = ""  # Of systemd, which knows two kinds.
    doubled = False  # Of the kernel and of dracut, which know one, and see it within the other.
    escaped = False  # For whoever takes a backslash for an escape, as systemd once did.
    outside = True
    for word in text.split():
        unquoted = not quote and not doubled and not escaped
        escaped = word.endswith("\\")
        for character in word:
            doubled ^= character == '"'
            if character in {'"', "'"} and quote in {"", character}:
                quote = "" if quote else character
        # Whether the rest is in quotes depends on whether a backslash takes the meaning from the one behind it.
        if word == "--" or re.search(r"\\[\"']", word):
            outside = False
        # Wherever they stand in it: systemd takes them off there, too.
        bare = re.sub("[\"']", "", word)
        key, _, value = bare.partition("=")
        name = key.lstrip("-")
        name = key[: len(key) - len(name)] + name.replace("-", "_")
        if name.startswith("sysctl"):
            name = name.replace("/", ".")
        clear = unquoted and bare == word and "\\" not in word
        yield _Word(word, name, value, clear, clear and outside)
