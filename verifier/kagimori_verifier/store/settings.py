"""Facts about this database itself, by name."""

from __future__ import annotations

from typing import Final

from sqlalchemy import delete, insert, select

from kagimori_verifier.store.database import Txn
from kagimori_verifier.store.schema import setting

KEK_ID: Final = "kek-id"
"""The ID of the KEK that all secrets in this database are wrapped by."""


def get(txn: Txn, name: str) -> str | None:
    """Give a setting, or None."""
    return txn.execute(select(setting.c.value).where(setting.c.name == name)).scalar_one_or_none()


def put(txn: Txn, name: str, value: str) -> None:
    """Set a setting."""
    txn.execute(delete(setting).where(setting.c.name == name))
    txn.execute(insert(setting).values(name=name, value=value))
