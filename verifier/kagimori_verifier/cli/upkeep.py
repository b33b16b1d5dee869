"""``upgrade``: bring a database of an older release to this one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from kagimori_verifier import settings
from kagimori_verifier.cli.access import now_s
from kagimori_verifier.cli.output import Output, add_verb
from kagimori_verifier.store import Store
from kagimori_verifier.store.database import SCHEMA

if TYPE_CHECKING:
    from kagimori_verifier.cli.output import Verbs


def register(verbs: Verbs) -> None:
    """Declare the verb."""
    add_verb(
        verbs,
        "upgrade",
        _upgrade,
        "Bring the database's tables from an older release to this one. What was is kept beside the database, as a\n"
        "copy. Stop the verifier first; killed at any moment, the tables are the old ones or the new ones.",
        "upgrade",
    )


def _upgrade(options: argparse.Namespace, output: Output) -> int:
    loaded = settings.load(options.config)
    path = loaded.database_path
    found, kept = Store.upgrade(
        loaded.database_url, lambda found: path.with_name(f"{path.name}.schema-{found}.{now_s()}")
    )
    output.result(
        {"from": found, "to": SCHEMA, "kept": None if kept is None else str(kept)},
        f"schema {found} already: nothing to do"
        if kept is None
        else f"schema {found} is now schema {SCHEMA}",
        *([] if kept is None else [f"kept what was in {kept}: remove it once the verifier has served"]),
    )
    return 0
