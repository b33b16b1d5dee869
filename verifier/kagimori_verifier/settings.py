"""verifier.toml: where things lie and how much the verifier takes on. Strict: an unknown key is an error."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import quote

import msgspec
from msgspec import Meta, Struct

from kagimori_protocol.errors import OperatorError
from kagimori_verifier.acting import User, owner_of
from kagimori_verifier.keystore.kek import CredentialKek, FileKek, KekProvider

DEFAULT_PATH: Final = Path("/etc/kagimori/verifier.toml")
MAX_BYTES: Final = 64 << 10
"""Largest verifier.toml in bytes."""
MAX_DOTS: Final = 2000
"""tomllib takes time with the square of a dotted key's parts; names and paths need a few hundred."""
_SQLITE: Final = "sqlite:///"

Text = Annotated[str, Meta(pattern=r"\A[^\x00-\x1f\x7f]+\Z")]
"""A path or a name: not empty, no control character."""
Url = Annotated[str, Meta(pattern=r"\Ahttps?://[\x21-\x7e]{1,500}\Z")]
"""What agents are told to ask; agent.toml is stricter still."""


class KekSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the key-encryption key comes from: ``file`` (a path) or ``credential`` (systemd's name for it)."""

    provider: Literal["file", "credential"] = "file"
    path: Text = "kek"
    name: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]*\Z")] = "kagimori-kek"


class TlsSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """TLS is welcome, but nothing depends on it: replies are signed."""

    certificate: Text
    key: Text


class Limits(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How much is taken on; each name carries its unit."""

    session_s: Annotated[int, Meta(ge=30, le=3600)] = 300
    concurrent_requests: Annotated[int, Meta(ge=1, le=1024)] = 32
    requests_per_minute_and_source: Annotated[int, Meta(ge=1, le=1_000_000)] = 120
    burst_per_source: Annotated[int, Meta(ge=1, le=10_000)] = 30


class _File(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What may stand in verifier.toml."""

    database: Text = f"{_SQLITE}verifier.db"
    endorsements: Text = "endorsements"
    listen: Annotated[str, Meta(pattern=r"\A(\[[0-9a-fA-F:]+\]|[0-9A-Za-z.-]+):[0-9]{1,5}\Z")] = (
        "127.0.0.1:8117"
    )
    public_urls: Annotated[list[Url], Meta(min_length=1, max_length=4)]
    kek: KekSettings = msgspec.field(default_factory=KekSettings)
    tls: TlsSettings | None = None
    limits: Limits = msgspec.field(default_factory=Limits)


class Settings(_File, frozen=True, kw_only=True):
    """All of verifier.toml, the ``directory`` that its relative paths are relative to, and whose they are.

    The ``owner`` is who may change them, if that is not root alone: root follows them no further than that user could.
    """

    directory: Path
    owner: User

    @property
    def host(self) -> str:
        """Address to listen on."""
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Port to listen on; 0 lets the system choose."""
        return int(self.listen.rpartition(":")[2])

    @property
    def database_url(self) -> str:
        """The database as SQLAlchemy wants it, with an absolute path for SQLite."""
        if self.database.startswith(_SQLITE) and not self.database.startswith(_SQLITE + "/"):
            # The directory is a path, in which every character is itself; in a URL, % and ? are not.
            return f"{_SQLITE}{quote(str(self.directory))}/{self.database.removeprefix(_SQLITE)}"
        return self.database

    @property
    def database_path(self) -> Path:
        """The file of an SQLite database. Raises OperatorError for another database, which has none."""
        name = self.database.removeprefix(_SQLITE)
        if name == self.database:
            raise _wrong(self.directory, f"a database {_SQLITE}FILE", self.database, "settings.database")
        return self.path(name)

    def path(self, name: str) -> Path:
        """Resolve a path of the settings against the file's own directory."""
        return self.directory / name

    def kek_provider(self) -> KekProvider:
        """Give what reads the KEK."""
        if self.kek.provider == "credential":
            return CredentialKek(self.kek.name)
        return FileKek(self.path(self.kek.path))


def load(path: Path) -> Settings:
    """Read verifier.toml. Raises OperatorError, naming the key that is wrong."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
            facts = os.fstat(file.fileno())
        directory = path.resolve().parent
        owner = User(facts.st_uid, facts.st_gid) if facts.st_uid else owner_of(directory)
    except OSError as error:
        raise _wrong(path, "a file that can be read", str(error.strerror), "settings.read") from error
    if len(raw) > MAX_BYTES:
        raise _wrong(path, f"at most {MAX_BYTES} bytes", "more", "settings.toml")
    if raw.count(b".") > MAX_DOTS:
        raise _wrong(path, f"at most {MAX_DOTS} dots", "more", "settings.toml")
    try:
        content = tomllib.loads(raw.decode())
    except (
        ValueError,
        RecursionError,
    ) as error:  # of TOML, of UTF-8, or of a number beyond Python's patience
        raise _wrong(path, "TOML", str(error), "settings.toml") from error
    try:
        parsed = msgspec.convert(content, _File)
    except msgspec.ValidationError as error:
        raise _wrong(
            path, "the keys of docs/verifier.md, in their types", str(error), "settings.key"
        ) from error
    settings = Settings(
        directory=directory,
        owner=owner,
        **{name: getattr(parsed, name) for name in parsed.__struct_fields__},
    )
    if not 0 <= settings.port <= 0xFFFF:  # noqa: PLR2004 - the range of ports
        raise _wrong(path, "a port up to 65535", settings.listen, "settings.key")
    return settings


def default_text(public_url: str, listen: str, kek: Literal["file", "credential"] = "file") -> str:
    """Write the verifier.toml of a new verifier, with the name of what gives its KEK."""
    return f"""\
# Kagimori verifier. Relative paths are relative to this file; unknown keys are errors.
database = "{_SQLITE}verifier.db"
endorsements = "endorsements"        # AMD's certificates and revocation lists
listen = "{listen}"
public_urls = ["{public_url}"]       # what agents are told to ask

[kek]                                # wraps every secret in the database: back it up, apart from the database
provider = "{kek}"{" " * (24 - len(kek))}# "file" has a path, "credential" the name of a systemd credential
path = "kek"
name = "kagimori-kek"

[limits]
session_s = 300                      # how old a challenge may be
concurrent_requests = 32
requests_per_minute_and_source = 120
burst_per_source = 30
"""


def rewritten(settings: Settings, *, database: str, endorsements: str, kek: str) -> str:
    """Write a verifier.toml anew with other places, all else as it is. JSON's strings and numbers are TOML's."""
    lines = [
        "# Kagimori verifier, restored: the places in the settings of the backup lay outside of their directory.",
        f"database = {json.dumps(database)}",
        f"endorsements = {json.dumps(endorsements)}",
        f"listen = {json.dumps(settings.listen)}",
        f"public_urls = {json.dumps(settings.public_urls)}",
        "",
        "[kek]",
        f"provider = {json.dumps(settings.kek.provider)}",
        f"path = {json.dumps(kek)}",
        f"name = {json.dumps(settings.kek.name)}",
        "",
        "[limits]",
        *(f"{name} = {getattr(settings.limits, name)}" for name in settings.limits.__struct_fields__),
    ]
    if settings.tls is not None:
        lines += ["", "[tls]"]
        lines += [f"{name} = {json.dumps(getattr(settings.tls, name))}" for name in ("certificate", "key")]
    return "\n".join(lines) + "\n"


def _wrong(path: Path, expected: str, found: str, code: str) -> OperatorError:
    return OperatorError(
        f"{path} cannot be used.",
        code=code,
        expected=expected,
        found=found,
        todo="Correct it, or make a new one with `kagimori-verifier init`.",
    )
