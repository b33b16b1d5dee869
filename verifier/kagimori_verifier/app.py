"""Put a verifier together from its settings: the one place that knows all rooms."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kagimori_protocol.errors import OperatorError
from kagimori_verifier import identity
from kagimori_verifier.endorsements.directory import EndorsementDirectory
from kagimori_verifier.facts import StoredFacts
from kagimori_verifier.keyring import Keyring
from kagimori_verifier.keystore.kek import kek_id
from kagimori_verifier.keystore.unlock_keys import UnlockKeys
from kagimori_verifier.limits import RateLimit
from kagimori_verifier.metrics import Metrics
from kagimori_verifier.pipeline import Pipeline
from kagimori_verifier.refusals import Refusals
from kagimori_verifier.release import Release
from kagimori_verifier.server import application
from kagimori_verifier.service import Service
from kagimori_verifier.store import Store
from kagimori_verifier.store import settings as stored

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.applications import Starlette

    from kagimori_verifier.identity import Keys
    from kagimori_verifier.settings import Settings


@dataclass(frozen=True, slots=True)
class Verifier:
    """An opened verifier: its store, keys and service. Close it."""

    settings: Settings
    store: Store
    keyring: Keyring
    unlock_keys: UnlockKeys
    metrics: Metrics
    service: Service

    @property
    def keys(self) -> Keys:
        """Its own keys of now."""
        return self.keyring.keys()

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def application(self) -> Starlette:
        """Give the ASGI application."""
        limits = self.settings.limits
        return application(
            service=self.service,
            metrics=self.metrics,
            rate=RateLimit(
                per_minute=limits.requests_per_minute_and_source,
                burst=limits.burst_per_source,
                clock=time.monotonic,
            ),
            concurrency=limits.concurrent_requests,
            ready=self.store.ping,
        )


def create(settings: Settings, kek: bytes, at_s: int) -> Keys:
    """Make database and identity of a new verifier, or give those that were made under this KEK.

    Raises OperatorError if there is an identity under another KEK.
    """
    store = Store.create(settings.database_url)
    try:
        with store.write() as txn:
            if stored.get(txn, stored.KEK_ID) == kek_id(kek):
                return identity.load(txn, kek)
            stored.put(txn, stored.KEK_ID, kek_id(kek))
            return identity.create(txn, kek, at_s)
    finally:
        store.close()


def open_verifier(settings: Settings, clock: Callable[[], float] = time.time) -> Verifier:
    """Open a verifier. Raises OperatorError: no database, another schema, another KEK, no identity."""
    kek = settings.kek_provider().read()
    store = Store.open(settings.database_url)
    try:
        with store.read() as txn:
            made_under = stored.get(txn, stored.KEK_ID)
            if made_under != kek_id(kek):
                raise OperatorError(
                    "This database was made under another key-encryption key.",
                    code="kek.other",
                    expected=f"the KEK {made_under}",
                    found=f"the KEK {kek_id(kek)}",
                    todo="Restore the KEK that belongs to this database from your backup.",
                )
        keyring = Keyring(store, kek)
    except BaseException:
        store.close()
        raise
    metrics, unlock_keys = Metrics(), UnlockKeys(kek)
    service = Service(
        pipeline=Pipeline(
            facts=StoredFacts(store),
            endorsements=EndorsementDirectory(settings.path(settings.endorsements)),
            session_s=settings.limits.session_s,
        ),
        release=Release(store, unlock_keys, metrics),
        keys=keyring.keys,
        refusals=Refusals(store),
        metrics=metrics,
        clock=clock,
    )
    return Verifier(settings, store, keyring, unlock_keys, metrics, service)
