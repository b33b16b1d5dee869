"""The database: SQLite by default, tables and statements by SQLAlchemy Core.

Every module here holds the functions of one table; each takes a transaction first and gives or takes frozen records.
"""

from kagimori_verifier.store.database import Conflict, Store, StoreOutdated, StoreUnavailable, Txn

__all__ = ["Conflict", "Store", "StoreOutdated", "StoreUnavailable", "Txn"]
