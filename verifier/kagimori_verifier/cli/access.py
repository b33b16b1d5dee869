"""What the verbs work on: the database that verifier.toml names."""

from __future__ import annotations

import argparse
import contextlib
import time
from typing import TYPE_CHECKING

from kagimori_protocol.errors import OperatorError
from kagimori_verifier import settings
from kagimori_verifier.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kagimori_verifier.settings import Settings
    from kagimori_verifier.store import Txn


@contextlib.contextmanager
def opened(options: argparse.Namespace) -> Iterator[tuple[Settings, Store]]:
    """Open the database that the settings name."""
    loaded = settings.load(options.config)
    store = Store.open(loaded.database_url)
    try:
        yield loaded, store
    finally:
        store.close()


@contextlib.contextmanager
def reading(options: argparse.Namespace) -> Iterator[Txn]:
    """Read the database in one transaction."""
    with opened(options) as (_, store), store.read() as txn:
        yield txn


@contextlib.contextmanager
def writing(options: argparse.Namespace) -> Iterator[Txn]:
    """Write the database in one transaction."""
    with opened(options) as (_, store), store.write() as txn:
        yield txn


def now_s() -> int:
    """Give the time in seconds since 1970."""
    return int(time.time())


def unknown(what: str, name: str, todo: str) -> OperatorError:
    """Say that something named on the command line does not exist."""
    return OperatorError(
        f"There is no {what} {name}.",
        code=f"{what.lower().replace(' ', '-')}.unknown",
        expected=f"a {what} that exists",
        found=name,
        todo=todo,
    )


def exists(what: str, name: str, todo: str) -> OperatorError:
    """Say that something exists already and is left alone."""
    return OperatorError(
        f"There is a {what} {name} already.",
        code=f"{what.lower().replace(' ', '-')}.exists",
        expected=f"a new {what}",
        found=name,
        todo=todo,
    )
