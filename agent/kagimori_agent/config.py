"""agent.toml: whom to ask, what to open, with which TPM, and for how long. Part of the measured image.

Strict: an unknown key, a loose spelling or a value out of bounds is an error, because a file that means less than
its author thinks would still measure well. Because it lies in the image, every error here is an ImageError.

Import budget: ``tomllib``, ``msgspec``, ``urllib.parse``, ``ipaddress`` (which the former loads), the error tree and
the messages' types.
"""

from __future__ import annotations

import base64
import ipaddress
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import SplitResult, urlsplit

import msgspec
from msgspec import Meta, Struct

from kagimori_protocol.errors import ImageError
from kagimori_protocol.messages import Kind, Uuid, VmId

DEFAULT_PATH: Final = Path("/etc/kagimori/agent.toml")
MAX_DOTS: Final = 2000  # tomllib takes time with the square of a dotted key's parts
MAX_BYTES: Final = 64 << 10
"""Largest agent.toml in bytes: 8 verifiers and 16 volumes take about 4 KiB."""

_SIGN_BIT: Final = 0x80
"""In the last byte of a public key: the sign of x; the other bits are y, little-endian (RFC 8032 section 5.1.2)."""
_P: Final = (1 << 255) - 19
_Y_OF_ORDER_8: Final = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
SMALL_ORDER: Final = frozenset({0, 1, _P - 1, _P, _P + 1, _Y_OF_ORDER_8, _P - _Y_OF_ORDER_8})
"""y of all points of order 1, 2, 4 and 8, and their other spellings below 2^255: as a key, anybody can sign for them."""

Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
Name = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
Address = Annotated[str, Meta(pattern=r"\A[0-9A-Fa-f:./]{2,43}\Z")]
Url = Annotated[str, Meta(pattern=r"\A[\x21-\x7e]{1,512}\Z")]


class Verifier(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One verifier: where it answers, and the Ed25519 keys (raw, 32 bytes) that prove an answer is its own.

    ``ca_file`` holds the CA certificates (PEM) that its TLS is checked with. Without it https encrypts and proves
    nothing, and need not: the keys do that (PROTOCOL.md section 1).
    """

    name: Name
    urls: Annotated[list[Url], Meta(min_length=1, max_length=4)]
    keys: Annotated[list[Key], Meta(min_length=1, max_length=4)]
    ca_file: Path | None = None


class Volume(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One LUKS2 volume: its header's UUID, and the ``name`` that it gets in /dev/mapper.

    ``device`` says where to look in place of everywhere; the UUID must match there too.
    """

    uuid: Uuid
    name: Name
    device: Path | None = None


class Tpm(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which TPM speaks for this boot: the only one of a kernel ``driver``.

    ``tcti`` names a TPM directly, for tests, and then ``event_log`` names its log. ``cap_pcr`` is the PCR that closes
    the door after the boot: one that the firmware leaves at zero, and that only a reset of the VM sets back (TCG PC
    Client Platform Firmware Profile, PCR usage: 8 to 15 are the operating system's, from 16 on they can be reset).
    """

    driver: Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9_-]{0,63}\Z")] = "tpm_svsm"
    tcti: Annotated[str, Meta(pattern=r"\A[\x21-\x7e]{1,256}\Z")] | None = None
    event_log: Path | None = None
    cap_pcr: Annotated[int, Meta(ge=8, le=15)] = 15


class Tsm(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the kernel's report door (configfs-tsm) is."""

    root: Path = Path("/sys/kernel/config/tsm")


class SevGuest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the kernel's other report door (the device of its driver sev-guest) is."""

    device: Path = Path("/dev/sev-guest")


class Limits(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How long things may take; all in seconds.

    ``boot_budget_s`` is for everything until the answer, ``attempt_s`` for one request, of which ``connect_s`` for
    the connection; ``gather_s`` is how long further verifiers' challenges are waited for once the first is there;
    the pause between attempts grows from ``backoff_min_s`` to ``backoff_max_s``; ``cryptsetup_s`` is for opening one
    volume.
    """

    boot_budget_s: Annotated[float, Meta(ge=1, le=86_400)] = 300
    attempt_s: Annotated[float, Meta(ge=0.1, le=600)] = 15
    connect_s: Annotated[float, Meta(ge=0.1, le=600)] = 5
    gather_s: Annotated[float, Meta(ge=0, le=60)] = 2
    backoff_min_s: Annotated[float, Meta(ge=0.01, le=600)] = 1
    backoff_max_s: Annotated[float, Meta(ge=0.01, le=600)] = 30
    cryptsetup_s: Annotated[float, Meta(ge=1, le=3600)] = 120


class Boot(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What becomes of a boot whose volumes do not open; it is capped first, whatever it is.

    ``shell`` is for who debugs an image: the console, and so that shell, is the host's. A verifier that is away, or waits
    for a person, is no failure until limits.boot_budget_s are over, and with ``wait`` "forever" never.
    """

    on_failure: Literal["poweroff", "reboot", "shell"] = "poweroff"
    wait: Literal["budget", "forever"] = "budget"


class Network(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the early boot reaches a verifier; the scripts of the initramfs read it, never the agent.

    ``dhcp`` asks on every interface of hardware, or on ``interface`` alone; ``static`` gives ``address`` (with its prefix
    length), ``gateway`` and ``dns`` to that interface, or to the only one; ``none`` leaves all of it to others.
    """

    method: Literal["dhcp", "static", "none"] = "dhcp"
    interface: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,14}\Z")] | None = None
    address: Address | None = None
    gateway: Address | None = None
    dns: Annotated[list[Address], Meta(max_length=3)] = []


class Config(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All of agent.toml. ``kind`` is a hint only; without volumes, nothing but a dry-run makes sense.

    ``report_door`` is where reports come from: "auto" is configfs-tsm where it exists, else sev-guest. For ``svsm-vtpm`` it
    is always the former; sev-guest then serves certificates, where the SVSM passes none on.
    """

    vm_id: VmId
    kind: Kind = "svsm-vtpm"
    report_door: Literal["auto", "configfs-tsm", "sev-guest"] = "auto"
    verifiers: Annotated[list[Verifier], Meta(min_length=1, max_length=8)]
    volumes: Annotated[list[Volume], Meta(max_length=16)] = []
    tpm: Tpm = Tpm()
    tsm: Tsm = Tsm()
    sev_guest: SevGuest = SevGuest()
    limits: Limits = Limits()
    boot: Boot = Boot()
    network: Network = Network()


_TABLES: Final[dict[str, type[Struct]]] = {
    "verifiers": Verifier,
    "volumes": Volume,
    "tpm": Tpm,
    "tsm": Tsm,
    "sev_guest": SevGuest,
    "limits": Limits,
    "boot": Boot,
    "network": Network,
}


def load(path: Path = DEFAULT_PATH) -> Config:
    """Read agent.toml. Raises ImageError, naming the key that is wrong and what it may be."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _wrong("config.read", f"a file {path} that can be read", str(error.strerror)) from error
    if len(data) > MAX_BYTES or data.count(b".") > MAX_DOTS:
        raise _wrong("config.size", f"at most {MAX_BYTES} bytes and {MAX_DOTS} dots", "more")
    try:
        content = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8, or of too long an integer
        raise _wrong("config.toml", "TOML in UTF-8", str(error)) from error
    return _convert(content)


def _convert(content: dict[str, Any]) -> Config:
    _require_known_keys(content)
    try:
        config = msgspec.convert(content, Config, dec_hook=_path)
    except msgspec.ValidationError as error:  # its texts name the key and the rule, and quote no values
        raise _wrong("config.key", "the keys of agent.toml, in their types and bounds", str(error)) from error
    _require_exact_keys(content, config)
    _require_strong_keys(config)
    _require_urls(config)
    _require_names(config)
    _require_absolute_paths(config)
    _require_sense(config)
    check_network(config.network)
    return config


def _path(kind: type, value: object) -> Path:
    if kind is Path and isinstance(value, str) and value and "\0" not in value:
        return Path(value)
    raise ValueError("Expected a path")


def _require_known_keys(content: dict[str, Any]) -> None:
    """Refuse unknown keys before anything else, so that a misspelt one is told as what it is."""
    _require_fields("", content, Config)
    for name, kind in _TABLES.items():
        tables = content.get(name)
        for table in tables if isinstance(tables, list) else [tables]:
            if isinstance(table, dict):  # what is not one is refused by its type later
                _require_fields(f"{name}.", table, kind)


def _require_fields(prefix: str, table: Mapping[str, object], kind: type[Struct]) -> None:
    unknown = sorted(set(table) - set(kind.__struct_fields__))
    if unknown:
        raise _wrong(
            "config.unknown-key",
            ", ".join(prefix + name for name in kind.__struct_fields__),
            ", ".join(ascii(prefix + name[:80]) for name in unknown[:4]),
        )


def _require_exact_keys(content: dict[str, Any], config: Config) -> None:
    """Refuse other spellings of a key's base64: one key, one text, so that a search for it finds it."""
    for table, verifier in zip(content["verifiers"], config.verifiers, strict=True):
        for text, key in zip(table["keys"], verifier.keys, strict=True):
            if text != base64.b64encode(key).decode():
                raise _wrong(
                    "config.base64",
                    "verifiers.keys in standard, padded base64",
                    f"another spelling in a key of {verifier.name}",
                )


def _require_strong_keys(config: Config) -> None:
    """Refuse keys that sign for everybody, such as 32 zeros that were left in a template.

    The library that verifies takes them (RFC 8032 leaves that open), and then a signature needs no private key.
    """
    for verifier in config.verifiers:
        for key in verifier.keys:
            y = int.from_bytes(bytes([*key[:-1], key[-1] & ~_SIGN_BIT]), "little")
            if y in SMALL_ORDER:
                raise _wrong(
                    "config.weak-key",
                    "verifiers.keys that somebody holds the private key of",
                    f"a key of {verifier.name} that anybody can sign for",
                )


def _require_urls(config: Config) -> None:
    for verifier in config.verifiers:
        for url in verifier.urls:
            try:
                parts = urlsplit(url)
                flaws = list(_flaws(url, parts))
            except ValueError:  # its text may quote a password
                flaws = ["no valid host and port"]
            if flaws:
                # Not the URL itself: what is wrong with it may be that it carries a password.
                raise _wrong(
                    "config.url",
                    "verifiers.urls as http://HOST[:PORT][/PATH] or https://HOST[:PORT][/PATH]",
                    f"a URL of {verifier.name} with {', '.join(flaws)}",
                )


def _flaws(url: str, parts: SplitResult) -> Iterator[str]:
    """Name what is wrong with a URL. Raises ValueError for what cannot be taken apart."""
    if parts.scheme not in {"http", "https"}:
        yield "another scheme"
    if not parts.hostname:
        yield "no host"
    if "@" in parts.netloc:
        yield "a user or password"
    if "?" in url or "#" in url:
        yield "a query or fragment"
    if "\\" in url:
        yield "a backslash"
    if parts.netloc.endswith(":") or parts.port == 0:  # reading .port checks it
        yield "an empty port"


def _require_names(config: Config) -> None:
    """Refuse whatever is there twice: a key, URL, verifier, UUID or mapping name means exactly one thing."""
    verifiers, volumes = config.verifiers, config.volumes
    _require_unique("verifiers.name", [one.name for one in verifiers])
    _require_unique("verifiers.urls", [url.rstrip("/") for one in verifiers for url in one.urls])
    _require_unique(
        "verifiers.keys", [base64.b64encode(key).decode() for one in verifiers for key in one.keys]
    )
    _require_unique("volumes.uuid", [one.uuid for one in volumes])
    _require_unique("volumes.name", [one.name for one in volumes])
    _require_unique("volumes.device", [str(one.device) for one in volumes if one.device is not None])
    if any(one.name == "control" for one in volumes):
        raise _wrong("config.name", "volumes.name that device-mapper does not use itself", "control")


def _require_unique(key: str, values: list[str]) -> None:
    repeated = sorted({value for value in values if values.count(value) > 1})
    if repeated:
        raise _wrong("config.repeated", f"{key} without repetition", f"more than once: {', '.join(repeated)}")


def _require_absolute_paths(config: Config) -> None:
    paths = {
        "tpm.event_log": config.tpm.event_log,
        "tsm.root": config.tsm.root,
        "sev_guest.device": config.sev_guest.device,
        **{f"verifiers.ca_file of {one.name}": one.ca_file for one in config.verifiers},
        **{f"volumes.device of {one.name}": one.device for one in config.volumes},
    }
    for key, path in paths.items():
        if path is not None and not path.is_absolute():
            raise _wrong("config.path", f"{key} as an absolute path", ascii(str(path)))


def _require_sense(config: Config) -> None:
    tpm, limits = config.tpm, config.limits
    if config.kind == "svsm-vtpm" and config.report_door == "sev-guest":
        expected = "report_door of kind svsm-vtpm as auto or configfs-tsm: only there an SVSM can be asked"
        raise _wrong("config.report-door", expected, config.report_door)
    if (tpm.tcti is None) != (tpm.event_log is None):
        raise _wrong("config.tcti", "tpm.tcti and tpm.event_log together, or neither", "only one of them")
    if not limits.connect_s <= limits.attempt_s <= limits.boot_budget_s:
        raise _wrong(
            "config.limits",
            "limits.connect_s <= limits.attempt_s <= limits.boot_budget_s",
            f"{limits.connect_s:g}, {limits.attempt_s:g}, {limits.boot_budget_s:g}",
        )
    if limits.backoff_min_s > limits.backoff_max_s:
        raise _wrong(
            "config.limits",
            "limits.backoff_min_s <= limits.backoff_max_s",
            f"{limits.backoff_min_s:g}, {limits.backoff_max_s:g}",
        )


def check_network(network: Network) -> None:
    """Refuse addresses that are none, and a method whose address is missing or stands beside it for nothing.

    Raises ImageError.
    """
    given = [
        ("address", network.address, ipaddress.ip_interface),
        ("gateway", network.gateway, ipaddress.ip_address),
    ]
    given += [("dns", dns, ipaddress.ip_address) for dns in network.dns]
    for key, text, read in given:
        try:
            if text is not None:
                read(text)
        except ValueError as error:
            raise _wrong("config.address", f"network.{key} as an IP address", str(error)) from error
    if network.address is not None and "/" not in network.address:
        raise _wrong("config.address", "network.address with its prefix length", "none")
    if (network.method == "static") != (network.address is not None):
        raise _wrong(
            "config.network", "network.address where method is static, and only there", network.method
        )
    if network.method != "static" and (network.gateway is not None or network.dns):
        raise _wrong("config.network", "gateway and dns only where method is static", network.method)


def _wrong(code: str, expected: str, found: str) -> ImageError:
    return ImageError(
        "agent.toml cannot be used.",
        code=code,
        expected=expected,
        found=found,
        todo="Correct agent.toml, build the image again, and have the owner accept its new measurement.",
    )
