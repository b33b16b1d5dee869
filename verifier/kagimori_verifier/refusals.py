"""Refusals before authenticity, kept for the owner's eyes in a bounded ring: whoever causes them is unproven."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from kagimori_verifier.store import StoreUnavailable, refusals
from kagimori_verifier.trail import plain

if TYPE_CHECKING:
    from kagimori_protocol.errors import KagimoriError
    from kagimori_verifier.store import Store

_log = structlog.get_logger("kagimori")


class Refusals:
    """Notes refusals in the store. One that cannot be kept is logged, and the denial is sent all the same."""

    def __init__(self, store: Store) -> None:
        """Keep the store."""
        self._store = store

    def note(  # noqa: PLR0913 - the columns of one row
        self,
        *,
        at_s: int,
        path: str,
        session: str | None,
        vm_id: str | None,
        error: KagimoriError,
        source: str,
    ) -> None:
        """Write one refusal down, in texts of bounded length: the sender had a say in them."""
        texts = {name: plain(text) for name, text in error.as_dict().items()}
        _log.warning("refused", path=path, session=session, vm=vm_id, source=source, **texts)
        row = refusals.Refusal(
            created=at_s,
            path=path,
            session=session,
            vm_id=vm_id,
            code=error.code,
            expected=texts.get("expected", ""),
            found=texts.get("found", ""),
            source=source,
        )
        try:
            with self._store.write() as txn:
                refusals.note(txn, row)
        except StoreUnavailable as unavailable:
            _log.error("refusal not kept", **unavailable.as_dict())
