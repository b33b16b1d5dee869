"""The tables, as SQLAlchemy Core knows them. Times are UTC seconds since 1970; JSON is text."""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    text,
)

metadata: Final = MetaData()

setting: Final = Table(
    "setting", metadata, Column("name", Text, primary_key=True), Column("value", Text, nullable=False)
)

identity: Final = Table(
    "identity",
    metadata,
    Column("key_id", Text, primary_key=True),
    Column("role", Text, nullable=False),
    Column("public", LargeBinary),
    Column("wrapped", LargeBinary, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
)

root: Final = Table(
    "root",
    metadata,
    Column("spki_sha256", LargeBinary, primary_key=True),
    Column("product", Text, nullable=False),
    Column("label", Text, nullable=False),
    Column("created", BigInteger, nullable=False),
)

profile: Final = Table(
    "profile",
    metadata,
    Column("name", Text, primary_key=True),
    Column("policy", Text, nullable=False),
    Column("created", BigInteger, nullable=False),
)

measurement: Final = Table(
    "measurement",
    metadata,
    Column("digest", LargeBinary, nullable=False),
    Column("profile", Text, ForeignKey("profile.name"), nullable=False),
    Column("kind", Text, nullable=False),
    Column("label", Text, nullable=False),
    Column("svsm_features", Text, nullable=False),
    Column("created", BigInteger, nullable=False),
    PrimaryKeyConstraint("digest", "profile"),
)

vm: Final = Table(
    "vm",
    metadata,
    Column("vm_id", Text, primary_key=True),
    Column("profile", Text, ForeignKey("profile.name"), nullable=False),
    Column("enabled", Boolean, nullable=False),
    Column("purposes", Text, nullable=False),
    Column("chips", Text, nullable=False),
    Column("created", BigInteger, nullable=False),
)

volume: Final = Table(
    "volume",
    metadata,
    Column("vm_id", Text, ForeignKey("vm.vm_id"), nullable=False),
    Column("uuid", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("wrapped", LargeBinary, nullable=False),
    Column("version", Integer, nullable=False),
    Column("header_epoch", Integer, nullable=False),
    Column("label", Text, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("origin", Text, nullable=False, server_default="made"),
    Column("epoch_given", Integer, nullable=False, server_default=text("0")),
    PrimaryKeyConstraint("vm_id", "uuid", "version"),
)

enrol_code: Final = Table(
    "enrol_code",
    metadata,
    Column("vm_id", Text, ForeignKey("vm.vm_id", ondelete="CASCADE"), primary_key=True),
    Column("public_key", LargeBinary, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("expires", BigInteger, nullable=False),
    Column("session", Text),
    Column("recovery", LargeBinary),
)

enrolment: Final = Table(
    "enrolment",
    metadata,
    Column("vm_id", Text, nullable=False),
    Column("uuid", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("provenance", Text, nullable=False),
    Column("session", Text, index=True),
    Column("explained", Boolean, nullable=False),
    ForeignKeyConstraint(
        ["vm_id", "uuid", "version"],
        ["volume.vm_id", "volume.uuid", "volume.version"],
        ondelete="CASCADE",
    ),
    PrimaryKeyConstraint("vm_id", "uuid", "version"),
)

boot_state: Final = Table(
    "boot_state",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("owner_kind", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("label", Text, nullable=False),
    Column("pcrs", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("created", BigInteger, nullable=False),
    Index("boot_state_owner", "owner_kind", "owner"),
)

redemption: Final = Table(
    "redemption",
    metadata,
    Column("session_sha256", LargeBinary, primary_key=True),
    Column("session", Text, nullable=False, index=True),
    Column("evidence_sha256", LargeBinary, nullable=False),
    Column("vm_id", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("decision", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("signer", Text, nullable=False),
    Column("chip_id", LargeBinary, nullable=False),
    Column("report_id", LargeBinary, nullable=False),
    Column("binding", LargeBinary, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("expires", BigInteger, nullable=False),
    Column("answer", LargeBinary),
    Column("confirm_key", LargeBinary),
    Column("outcome", Text),
    Column("verifier_key", Text),
)
_answered: Final = redemption.c.answer.is_not(None)
Index("redemption_answered", redemption.c.expires, sqlite_where=_answered, postgresql_where=_answered)
"""Answers are dropped when they expire, so this index stays small while the table grows."""


def _boot_key(name: str) -> Table:
    """Make a table of boots by REPORT_ID, with the session that was first, and who signed for which CHIP_ID then."""
    return Table(
        name,
        metadata,
        Column("signer", Text, nullable=False),
        Column("chip_id", LargeBinary, nullable=False),
        Column("report_id", LargeBinary, primary_key=True),
        Column("session_sha256", LargeBinary, nullable=False),
    )


direct_grant: Final = _boot_key("direct_grant")
opened_boot: Final = _boot_key("opened_boot")

observation: Final = Table(
    "observation",
    metadata,
    Column("session", Text, primary_key=True),
    Column("vm_id", Text, nullable=False, index=True),
    Column("profile", Text, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("confirmed", Boolean, nullable=False),
    Column("pcrs", Text, nullable=False),
)

refusal: Final = Table(
    "refusal",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("created", BigInteger, nullable=False),
    Column("path", Text, nullable=False),
    Column("session", Text),
    Column("vm_id", Text),
    Column("code", Text, nullable=False),
    Column("expected", Text, nullable=False),
    Column("found", Text, nullable=False),
    Column("source", Text, nullable=False),
)

ledger: Final = Table(
    "ledger",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("previous", LargeBinary, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("event", Text, nullable=False),
    Column("vm_id", Text, index=True),
    Column("session", Text, index=True),
    Column("body", Text, nullable=False),
)
