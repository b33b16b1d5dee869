"""What the kernel command line may say to us: ``kagimori.debug``, and one static address. Anything else refuses the boot.

Everything else about a boot is in agent.toml. Both words are measured like the rest of the line, so their owner has
accepted them. Source: PROTOCOL.md section 1.

Import budget: that of ``config``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from kagimori_agent.config import Network, check_network
from kagimori_protocol.errors import ImageError

PATH: Final = Path("/proc/cmdline")
DEBUG_WORD: Final = "kagimori.debug"
ADDRESS_WORD: Final = "kagimori.ip="
SECOND: Final = "SystemdOptions-8cf2644b-4b0b-428f-9387-6d876050dc67"
"""A variable of the firmware's, whose words systemd takes for words of the kernel command line, unless Secure Boot is on."""
EFI: Final = Path("sys/firmware/efi")
SYSTEMDS_COPY: Final = Path("run/systemd/efivars")
"""Where systemd before 256 keeps what it has read of that variable."""
FORM: Final = f"{ADDRESS_WORD}ADDRESS/LENGTH[,gateway=ADDRESS][,dns=ADDRESS]...[,interface=NAME]"


@dataclass(frozen=True, slots=True)
class CommandLine:
    """What was said: whether to tell more, and the network that takes the place of agent.toml's.

    ``luks_names`` is what it calls volumes, as pairs of UUID and name: said to systemd-cryptsetup or dracut, not to us.
    """

    debug: bool = False
    network: Network | None = None
    luks_names: tuple[tuple[str, str], ...] = ()


def read(path: Path = PATH) -> CommandLine:
    """Read the running kernel's. Raises ImageError."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ImageError(
            "The kernel command line cannot be read.",
            code="cmdline.read",
            expected=str(path),
            found=str(error.strerror),
            todo="mount -t proc proc /proc",
        ) from error
    return parse(text)


def parse(text: str) -> CommandLine:
    """Take a command line apart. Raises ImageError for what it may not set."""
    debug = False
    network: Network | None = None
    names: list[tuple[str, str]] = []
    for word in text.split():
        if (pair := _luks_name(word)) is not None:
            names.append(pair)
        bare = word.lstrip('"').casefold()  # the kernel takes quotes around a word off
        if not bare.startswith("kagimori."):
            continue
        if word == DEBUG_WORD:
            debug = True
        elif word.startswith(ADDRESS_WORD) and network is None:
            network = _network(word)
        else:
            raise _refused("cmdline.word", f"no word of ours but {DEBUG_WORD} and, once, {FORM}", word)
    return CommandLine(debug, network, tuple(names))


def check_alone(root: Path = Path("/")) -> None:
    """Hold that this boot has no second command line, which nothing measures: the host may write the firmware's variables.

    Raises ImageError if there is one, or if nobody can tell. Where the kernel has the variables' file system and it is not
    mounted, it would not be: there are no variables then, for systemd neither. Source: systemd, BOOT_LOADER_INTERFACE and
    proc-cmdline.c; kernel-command-line(7).
    """
    variables = root / EFI / "efivars"
    for path in (variables / SECOND, root / SYSTEMDS_COPY / SECOND):
        if path.exists():
            raise ImageError(
                "There is a second command line, which nothing has measured.",
                code="cmdline.efi-options",
                expected="no variable SystemdOptions of the firmware",
                found=f"/{path.relative_to(root)}",
                todo=f"Remove it (chattr -i and rm /{EFI / 'efivars' / SECOND}). If nobody of yours has set it, the host has: "
                "systemd obeys it.",
            )
    if not (root / EFI).is_dir() or _has_entries(variables):
        return
    try:
        known = (root / "proc/filesystems").read_text(encoding="ascii", errors="replace").split()
    except OSError as error:
        raise _untold(str(error.strerror)) from error
    if "efivarfs" not in known:
        raise _untold("no efivarfs in /proc/filesystems")


def _has_entries(directory: Path) -> bool:
    try:
        return any(directory.iterdir())
    except OSError:
        return False


def _untold(found: str) -> ImageError:
    return ImageError(
        "Nobody can tell whether there is a second command line, in the firmware's variables.",
        code="cmdline.efi-untold",
        expected=f"efivarfs mounted at /{EFI / 'efivars'}",
        found=found,
        todo="Put the kernel module efivarfs into the initramfs: build it again.",
    )


def check_names(line: CommandLine, volumes: dict[str, str]) -> None:
    """Hold that no volume of agent.toml, name by UUID, has another name there. Raises ImageError.

    Whoever reads such a word would not find the volume open under that name, and would ask the console for its passphrase.
    """
    for uuid, name in line.luks_names:
        ours = volumes.get(uuid)
        if ours is not None and ours != name:
            raise ImageError(
                "The kernel command line gives a volume of agent.toml another name.",
                code="cmdline.luks-name",
                expected=f"rd.luks.name={uuid}={ours}, or no such word",
                found=ascii(name[:80]),
                todo="Change the word, or the volume's name in agent.toml, and build the image again.",
            )


def _luks_name(word: str) -> tuple[str, str] | None:
    """Give UUID and name of a word ``rd.luks.name=UUID=NAME`` or ``luks.name=``, as systemd and dracut read it.

    They take quotes off wherever these stand. Source: systemd-cryptsetup-generator(8), dracut.cmdline(7).
    """
    key, _, value = word.replace('"', "").replace("'", "").partition("=")
    if key not in {"rd.luks.name", "luks.name"}:
        return None
    uuid, _, name = value.partition("=")
    return uuid.removeprefix("luks-").casefold(), name


def _network(word: str) -> Network:
    """Make settings of the one word that carries an address. IPv6 has colons, so commas part what is in it."""
    address, *rest = word.removeprefix(ADDRESS_WORD).split(",")
    content: dict[str, Any] = {"method": "static", "address": address, "dns": []}
    for part in rest:
        key, _, value = part.partition("=")
        if key == "dns":
            content["dns"].append(value)
        elif key in {"gateway", "interface"} and key not in content:
            content[key] = value
        else:
            raise _refused("cmdline.ip", FORM, word)
    try:
        network = msgspec.convert(content, Network)
        check_network(network)
    except (msgspec.ValidationError, ImageError) as error:
        raise _refused("cmdline.ip", FORM, word) from error
    return network


def _refused(code: str, expected: str, word: str) -> ImageError:
    return ImageError(
        "The kernel command line sets what only agent.toml may set.",
        code=code,
        expected=expected,
        found=ascii(word[:80]),
        todo="Remove the word; put the setting into agent.toml and build the image again.",
    )
