"""``init``, ``serve``: make a verifier and run it."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
from base64 import b64encode
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO

from kagimori_protocol import signature
from kagimori_protocol.errors import OperatorError
from kagimori_verifier import settings
from kagimori_verifier.cli import arguments
from kagimori_verifier.cli.access import now_s
from kagimori_verifier.cli.output import Output, add_verb
from kagimori_verifier.keystore.kek import KEK_SIZE, FileKek

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kagimori_verifier.cli.output import Verbs
    from kagimori_verifier.identity import Keys

DEFAULT_LISTEN: Final = "127.0.0.1:8117"
CONFIG: Final = "verifier.toml"
DRAFT: Final = "verifier.toml.new"
CREDENTIAL: Final = settings.KekSettings().name
MADE: Final = (CONFIG, DRAFT, "kek", "verifier.db", "verifier.db-wal", "verifier.db-shm")
"""Files that init makes, or that would show that a verifier is, or was being, made here."""


def register(verbs: Verbs) -> None:
    """Declare the verbs."""
    parser = add_verb(
        verbs,
        "init",
        _init,
        "Make a verifier: settings, key-encryption key, database, identity.",
        "init --dir /etc/kagimori --public-url https://keys.example:8117",
    )
    parser.add_argument(
        "--dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="where it is made; nothing that exists is touched",
    )
    parser.add_argument(
        "--listen",
        default=DEFAULT_LISTEN,
        type=arguments.listen,
        metavar="HOST:PORT",
        help="address to serve at; port 0 lets the system choose (default: %(default)s)",
    )
    parser.add_argument(
        "--public-url",
        type=arguments.url,
        metavar="URL",
        help="what agents are told to ask (default: http://LISTEN)",
    )
    parser.add_argument(
        "--kek-credential",
        type=Path,
        metavar="FILE",
        help=f"make the key-encryption key there, not in DIR; systemd hands it over as the credential {CREDENTIAL}",
    )
    add_verb(
        verbs,
        "serve",
        _serve,
        "Answer guests until SIGTERM, logging JSON lines on stderr. With --json, the first line on stdout is the URL.",
        "--config /etc/kagimori/verifier.toml serve",
    )


def _init(options: argparse.Namespace, output: Output) -> int:
    directory: Path = options.dir
    kek: Path = options.kek_credential or directory / "kek"
    text = settings.default_text(
        options.public_url or f"http://{options.listen}",
        options.listen,
        "file" if options.kek_credential is None else "credential",
    )
    keys = _made(directory, text, kek)
    public, config = b64encode(keys.current).decode(), directory / CONFIG
    output.result(
        {"config": str(config), "public_key": public, "key_id": signature.key_id(keys.current)},
        f"made {config}",
        f"made {kek}: it wraps every secret. Back it up, apart from the database.",
        f"public key {public}",
        "next: endorsements import, profile add, reference measurement add, vm add, volume add, serve",
        f"each with --config {config}",
    )
    return 0


def _made(directory: Path, text: str, kek: Path) -> Keys:
    """Make all of a verifier or nothing, its KEK in ``kek``; its settings come last, so that what has them is whole.

    Their draft comes first: what lies beside a draft is of an init that was killed, and is taken up where it ended.
    """
    from kagimori_verifier import app  # noqa: PLC0415 - the web stack, which small verbs do without

    with _writable(directory), contextlib.ExitStack() as undo:
        if not directory.is_dir():
            directory.mkdir(parents=True, mode=0o700)
            undo.callback(_quietly, directory.rmdir)
        new = [directory / name for name in MADE[1:] if not os.path.lexists(directory / name)]
        # What was made is taken back before the draft is let go, and another init may begin.
        with _draft(directory) as draft, undo.pop_all() as undo_all:
            endorsements = directory / "endorsements"
            if not endorsements.is_dir():
                endorsements.mkdir()
                undo_all.callback(_quietly, endorsements.rmdir)
            for path in new:
                undo_all.callback(_quietly, path.unlink)
            draft.truncate(0)
            draft.write(text)
            draft.flush()
            os.fsync(draft.fileno())
            loaded = settings.load(directory / DRAFT)
            keys = app.create(loaded, _kek(kek, directory / DRAFT not in new, undo_all), now_s())
            (directory / DRAFT).rename(directory / CONFIG)
            undo_all.pop_all()
    return keys


@contextlib.contextmanager
def _draft(directory: Path) -> Iterator[TextIO]:
    """Hold the draft of the settings while a verifier is being made. Raises OperatorError if one is there, or being made.

    The lock goes with the process, however that ends; the draft does not.
    """
    there = [name for name in MADE if os.path.lexists(directory / name)]
    if CONFIG in there or (there and DRAFT not in there):
        raise _exists(directory, there)
    descriptor = os.open(directory / DRAFT, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with os.fdopen(descriptor, "r+", encoding="utf-8") as draft:
        try:
            fcntl.flock(draft, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _exists(directory, ["another init at work"]) from None
        if os.path.lexists(directory / CONFIG):  # that other one was quicker
            raise _exists(directory, [CONFIG])
        yield draft


def _kek(path: Path, begun: bool, undo: contextlib.ExitStack) -> bytes:  # noqa: FBT001 - whether an init was killed here
    """Make the KEK, or take the one that a killed init has made; only what was made here is undone. Raises OperatorError."""
    if begun:
        with contextlib.suppress(FileNotFoundError):
            if path.lstat().st_size >= KEK_SIZE:
                return FileKek(path).read()
            path.unlink()  # nothing can rest behind a key that was not written to its end
    kek = FileKek(path).create()
    undo.callback(_quietly, path.unlink)
    return kek


def _exists(directory: Path, there: list[str]) -> OperatorError:
    return OperatorError(
        f"There is a verifier in {directory} already.",
        code="init.exists",
        expected=f"a directory without {', '.join(MADE[:1] + MADE[2:4])}",
        found=", ".join(there),
        todo="Choose another directory; nothing was touched.",
    )


@contextlib.contextmanager
def _writable(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OperatorError(
            f"{directory} cannot be used.",
            code="init.write",
            expected="a directory that can be written",
            found=str(error.strerror),
        ) from error


def _quietly(remove: Callable[[], None]) -> None:
    """Take back what may not have been made yet."""
    with contextlib.suppress(OSError):
        remove()


def _serve(options: argparse.Namespace, output: Output) -> int:
    from kagimori_verifier import app, logs, serving  # noqa: PLC0415 - the web stack, which small verbs do without

    verifier = app.open_verifier(settings.load(options.config))
    logs.to_stderr()
    try:
        serving.serve(verifier, lambda url: _listening(output, url))
    finally:
        verifier.close()
    return 0


def _listening(output: Output, url: str) -> None:
    if output.as_json:
        print(json.dumps({"url": url, "pid": os.getpid()}), flush=True)
    else:
        output.note(f"listening on {url}")
