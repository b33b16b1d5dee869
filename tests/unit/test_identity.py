"""A verifier's own keys: made once, wrapped, and never replaced in silence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from kagimori_protocol import messages, signature
from kagimori_protocol.errors import OperatorError
from kagimori_verifier import identity
from kagimori_verifier.store import Store, identities, schema
from kagimori_verifier.wrapping import BoxBroken

KEK = b"k" * 32


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Give an empty database."""
    made = Store.create(f"sqlite:///{tmp_path}/verifier.db")
    yield made
    made.close()


def test_an_identity_signs_what_its_public_key_verifies(store: Store) -> None:
    """What agents pin is what replies are signed by, also after a restart."""
    with store.write() as txn:
        made = identity.create(txn, KEK, 0)
    with store.read() as txn:
        loaded = identity.load(txn, KEK)
    assert loaded.current == made.current
    assert loaded.token == made.token
    assert loaded.public == {made.current}
    denial = messages.encode(messages.Denial(version=1, session=b"", code="malformed"))
    header = signature.sign(loaded.signing, b"request", denial)
    assert signature.verify(made.public, header, b"request", denial) == made.current


def test_a_second_identity_is_refused_and_the_first_stays(store: Store) -> None:
    """Guests pin the first: a silent replacement would lock them all out."""
    with store.write() as txn:
        made = identity.create(txn, KEK, 0)
    with pytest.raises(OperatorError) as caught, store.write() as txn:
        identity.create(txn, KEK, 1)
    assert caught.value.code == "identity.exists"
    with store.read() as txn:
        assert identity.load(txn, KEK).current == made.current


def test_a_database_without_an_identity_says_so(store: Store) -> None:
    """Never a new one made on the way."""
    with pytest.raises(OperatorError) as caught, store.read() as txn:
        identity.load(txn, KEK)
    assert caught.value.code == "identity.missing"


def test_another_kek_opens_no_identity(store: Store) -> None:
    """Both keys rest wrapped."""
    with store.write() as txn:
        identity.create(txn, KEK, 0)
    with pytest.raises(BoxBroken), store.read() as txn:
        identity.load(txn, b"l" * 32)


def test_wrapped_keys_cannot_change_places(store: Store) -> None:
    """A row's box is bound to its role and its key id: swapped ones do not open."""
    with store.write() as txn:
        identity.create(txn, KEK, 0)
        signing, token = identities.all(txn, "signing")[0], identities.all(txn, "token")[0]
        for row, wrapped in ((signing, token.wrapped), (token, signing.wrapped)):
            where = schema.identity.c.key_id == row.key_id
            txn.execute(sa.update(schema.identity).where(where).values(wrapped=wrapped))
    with pytest.raises(BoxBroken), store.read() as txn:
        identity.load(txn, KEK)


def test_a_next_key_is_accepted_and_a_retired_one_is_not(store: Store) -> None:
    """Challenges signed by the next key count already; those of a retired one no longer."""
    with store.write() as txn:
        made = identity.create(txn, KEK, 0)
        staged = identity.make_signing_key(txn, KEK, 1, "next")
        identity.make_signing_key(txn, KEK, 1, "retired")
    with store.read() as txn:
        assert identity.load(txn, KEK).public == {made.current, staged.public}


def test_two_current_keys_are_no_identity(store: Store) -> None:
    """Which one would sign is not left to chance."""
    with store.write() as txn:
        identity.create(txn, KEK, 0)
        row = identities.all(txn, "signing")[0]
        identities.add(txn, replace(row, key_id="second"))
    with pytest.raises(OperatorError) as caught, store.read() as txn:
        identity.load(txn, KEK)
    assert caught.value.code == "identity.missing"


def test_no_secret_of_an_identity_is_shown_or_kept_in_the_clear(store: Store, tmp_path: Path) -> None:
    """Neither repr shows them, and the database's files hold them only wrapped."""
    with store.write() as txn:
        made = identity.create(txn, KEK, 0)
    private = made.signing.private_bytes_raw()
    with store.read() as txn:
        rows = identities.all(txn, "signing") + identities.all(txn, "token")
    store.close()
    shown = repr(made) + repr(rows)
    files = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for secret in (private, made.token):
        assert secret.hex() not in shown
        assert repr(secret) not in shown
        assert secret not in files
