"""What crypttab says of how a volume is mapped: its device options, as far as they are for a LUKS2 volume and our key.

An initramfs carries the lines of its own volumes beside agent.toml, measured like that; the agent looks at no other.
What says where a key comes from, or when to ask whom, has no meaning here and is passed over; what would make of the
volume something else than the agent opens stops the building of the initramfs.

Source: crypttab(5) of Debian and of systemd, cryptsetup-open(8). Import budget: the error tree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from kagimori_protocol.errors import ImageError

SYSTEM: Final = Path("/etc/crypttab")
CARRIED: Final = Path("/etc/kagimori/crypttab")
"""Where an initramfs has the lines of the volumes in agent.toml."""

FLAGS: Final = {
    "discard": "--allow-discards",
    "readonly": "--readonly",
    "read-only": "--readonly",
    "same-cpu-crypt": "--perf-same_cpu_crypt",
    "submit-from-crypt-cpus": "--perf-submit_from_crypt_cpus",
    "no-read-workqueue": "--perf-no_read_workqueue",
    "no-write-workqueue": "--perf-no_write_workqueue",
}
"""Options that change the mapping, by what cryptsetup calls them."""

DISKS: Final = Path("/dev/disk")
"""Where udev names devices by what they carry."""
_TAGS: Final = {
    "UUID": "by-uuid",
    "PARTUUID": "by-partuuid",
    "LABEL": "by-label",
    "PARTLABEL": "by-partlabel",
    "ID": "by-id",
}

_REFUSED: Final = frozenset(
    {
        *("plain", "swap", "tmp", "header", "bitlk", "fvault2", "loop", "offset", "skip"),
        *("tcrypt", "tcrypt-hidden", "tcrypt-keyfile", "tcrypt-system", "tcrypt-veracrypt", "tcrypthidden"),
        *("veracrypt", "veracrypt-pim", "veracrypt-query-pim", "link-volume-key"),
    }
)
"""Options of volumes that are no LUKS2 of one device, or that demand what the agent does not do."""

_PASSED_OVER: Final = frozenset(
    {
        # What kind of volume, as if that were open, and when it is opened.
        *(
            "luks",
            "luks2",
            "force",
            "initramfs",
            "noauto",
            "auto",
            "nofail",
            "noearly",
            "_netdev",
            "quiet",
            "loud",
        ),
        *(
            "x-initrd.attach",
            "device-timeout",
            "timeout",
            "tries",
            "check",
            "checkargs",
            "precheck",
            "headless",
        ),
        # Where a key comes from. Ours comes from the verifier, and has a keyslot of its own.
        *(
            "keyscript",
            "keyslot",
            "key-slot",
            "keyfile-size",
            "keyfile-offset",
            "keyfile-timeout",
            "keyfile-erase",
        ),
        *("password-echo", "password-cache", "token-timeout", "try-empty-password", "verify"),
        # For plain volumes; of a LUKS volume its header says it, and `luks_allowed` looks at that.
        *("cipher", "size", "hash", "sector-size"),
        # Of systemd, extended after each boot: PCRs are the verifier's to judge.
        *("tpm2-measure-pcr", "tpm2-measure-bank", "tpm2-measure-keyslot-nvpcr"),
    }
)
_PASSED_OVER_PREFIXES: Final = ("tpm2-", "fido2-", "pkcs11-", "x-", "comment")


def lines_for(path: Path, volumes: dict[str, str], disks: Path = DISKS) -> str:
    """Give the lines of a crypttab for these volumes, names by UUID, checked, reduced to name, blanks and device options.

    A file that is not there has none. Raises ImageError for an option that the agent cannot honour or does not know, and
    for a line that gives one of the volumes another name.
    """
    found = _read(path, list(volumes.values()))
    _check_names(path, volumes, disks)
    return "".join(f"{name} - - {','.join(options) or '-'}\n" for name, options in found.items())


def flags(name: str, path: Path = CARRIED) -> list[str]:
    """Give cryptsetup's arguments for a mapping. Raises ImageError as ``lines_for``."""
    return [FLAGS[option] for option in _read(path, [name]).get(name, [])]


def _check_names(path: Path, volumes: dict[str, str], disks: Path) -> None:
    """Refuse a second name: whoever reads it would not find the volume open, and would ask the console for its passphrase."""
    for fields in _lines(path):
        if fields[0] in volumes.values() or len(fields) == 1:
            continue
        for uuid, name in volumes.items():
            if _is_device(fields[1], uuid, disks):
                raise _wrong(
                    path, name, f"no other line for UUID={uuid}", ascii(f"{fields[0]} {fields[1]}"[:80])
                )


def _is_device(source: str, uuid: str, disks: Path) -> bool:
    """Tell whether a crypttab's second field means the volume of this UUID, as far as this machine has it."""
    tag, is_tag, value = source.replace('"', "").replace("'", "").partition("=")
    place = disks / _TAGS[tag.upper()] / value if is_tag and tag.upper() in _TAGS else Path(source)
    ours = disks / _TAGS["UUID"] / uuid
    if place.parent.name == ours.parent.name and place.name.casefold() == uuid:
        return True
    return ours.exists() and place.resolve() == ours.resolve()


def _lines(path: Path) -> list[list[str]]:
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ImageError(
            "crypttab cannot be read.",
            code="crypttab.read",
            expected=f"a file {path} that can be read, or none",
            found=str(error.strerror),
        ) from error
    lines = [line.split() for line in text.splitlines()]
    return [fields for fields in lines if fields and not fields[0].startswith("#")]


def _read(path: Path, names: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for fields in _lines(path):
        if fields[0] not in names:
            continue
        if fields[0] in found:
            raise _wrong(path, fields[0], "one line of this name", "two")
        options = fields[3].split(",") if len(fields) > 3 else []  # noqa: PLR2004 - the fourth field
        found[fields[0]] = _honoured(path, fields[0], options)
    return found


def _honoured(path: Path, name: str, options: list[str]) -> list[str]:
    kept: dict[str, str] = {}
    for option in options:
        word = option.partition("=")[0]
        if option in FLAGS:
            kept.setdefault(FLAGS[option], option)
        elif word in _REFUSED or not (
            word in _PASSED_OVER or word.startswith(_PASSED_OVER_PREFIXES) or word in {"", "-"}
        ):
            raise _wrong(
                path, name, f"options of a LUKS2 volume, such as {', '.join(FLAGS)}", ascii(option[:80])
            )
    return list(kept.values())


def _wrong(path: Path, name: str, expected: str, found: str) -> ImageError:
    return ImageError(
        f"The agent cannot open {name} as crypttab wants it.",
        code="crypttab.option",
        expected=f"{path}: {expected}",
        found=found,
        todo="Change the line, or take the volume out of agent.toml.",
    )
