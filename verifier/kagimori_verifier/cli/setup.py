"""``init``, ``serve``, ``identity``: make a verifier and run it."""

from __future__ import annotations

import argparse
import json
import os
from base64 import b64encode
from pathlib import Path
from typing import TYPE_CHECKING

from kagimori_protocol import signature
from kagimori_protocol.errors import OperatorError
from kagimori_verifier import settings
from kagimori_verifier.cli.output import Output, add_verb, group, now_s, reading
from kagimori_verifier.keystore.kek import FileKek
from kagimori_verifier.store import identities

if TYPE_CHECKING:
    from kagimori_verifier.cli.output import Verbs

DEFAULT_LISTEN = "127.0.0.1:8117"


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
        metavar="HOST:PORT",
        help="address to serve at (default: %(default)s)",
    )
    parser.add_argument(
        "--public-url", metavar="URL", help="what agents are told to ask (default: http://LISTEN)"
    )
    add_verb(
        verbs, "serve", _serve, "Answer guests until SIGTERM.", "--config /etc/kagimori/verifier.toml serve"
    )
    identity = group(add_verb(verbs, "identity", None, "The key that signs this verifier's answers."))
    add_verb(identity, "show", _identity_show, "Print the public keys that agents pin.", "identity show")


def _init(options: argparse.Namespace, output: Output) -> int:
    from kagimori_verifier import app  # noqa: PLC0415 - the web stack, which small verbs do without

    directory: Path = options.dir
    path = directory / "verifier.toml"
    if path.exists():
        raise OperatorError(
            f"There is a verifier in {directory} already.",
            code="init.exists",
            expected="a directory without verifier.toml",
            found=str(path),
            todo="Choose another directory; nothing was touched.",
        )
    text = settings.default_text(options.public_url or f"http://{options.listen}", options.listen)
    try:
        (directory / "endorsements").mkdir(parents=True, exist_ok=True)
        draft = directory / "verifier.toml.new"
        draft.write_text(text, encoding="utf-8")
        loaded = settings.load(draft)
        kek = FileKek(loaded.path(loaded.kek.path)).create()
        keys = app.create(loaded, kek, now_s())
        draft.rename(path)
    except OSError as error:
        raise OperatorError(
            f"{directory} cannot be used.",
            code="init.write",
            expected="a directory that can be written",
            found=str(error.strerror),
        ) from error
    public = b64encode(keys.current).decode()
    output.result(
        {"config": str(path), "public_key": public, "key_id": signature.key_id(keys.current)},
        f"made {path}",
        f"made {directory / 'kek'}: it wraps every secret. Back it up, apart from the database.",
        f"public key {public}",
        "next: endorsements import, profile add, reference measurement add, vm add, volume add, serve",
    )
    return 0


def _identity_show(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        rows = [
            {"key_id": row.key_id, "public_key": b64encode(row.public).decode(), "state": row.state}
            for row in identities.all(txn, "signing")
            if row.public is not None
        ]
    current = next((row for row in rows if row["state"] == "current"), {})
    output.result(
        current | {"keys": rows}, *(f"{row['state']}  {row['key_id']}  {row['public_key']}" for row in rows)
    )
    return 0


def _serve(options: argparse.Namespace, output: Output) -> int:
    from kagimori_verifier import app, logs, serving  # noqa: PLC0415 - the web stack, which small verbs do without

    logs.to_stderr()
    verifier = app.open_verifier(settings.load(options.config))

    def listening(url: str) -> None:
        if output.as_json:
            print(json.dumps({"url": url, "pid": os.getpid()}), flush=True)
        else:
            output.note(f"listening on {url}")

    try:
        serving.serve(verifier, listening)
    finally:
        verifier.close()
    return 0
