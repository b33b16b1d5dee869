"""Session tokens, sealed answers and stored boxes: what was put in comes out, and no other bytes open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kagimori_protocol import messages, sealing
from kagimori_protocol.errors import Malformed, NotAuthentic, OperatorError
from kagimori_protocol.messages import Challenge
from kagimori_verifier import limits, token, wrapping
from kagimori_verifier.keystore.kek import KEK_SIZE, FileKek
from kagimori_verifier.keystore.unlock_keys import UnlockKeys
from kagimori_verifier.store import StoreUnavailable, columns
from kagimori_verifier.wrapping import BoxBroken

KEY = bytes(range(32))
challenges = st.builds(
    Challenge,
    version=st.just(1),
    session=st.just(b""),
    nonce=st.binary(min_size=32, max_size=32),
    expires_in=st.integers(1, 3600),
    pcr_selection=st.binary(min_size=4, max_size=64),
)


@given(st.binary(max_size=100), challenges, st.integers(0, 1 << 40))
def test_a_token_says_what_it_was_issued_for(hello: bytes, challenge: Challenge, now_s: int) -> None:
    """And the challenge around it still fits its message, and is bound as it was before."""
    issued = token.issue(KEY, hello, challenge, now_s)
    read = token.read(KEY, issued.session)
    assert (read.issued, read.nonce) == (now_s, challenge.nonce)
    assert read.challenge_sha256 == token.unbound_sha256(challenge) == token.unbound_sha256(issued)
    assert messages.decode(Challenge, messages.encode(issued)) == issued


@given(st.binary(max_size=400), st.binary(min_size=32, max_size=32))
def test_any_bytes_are_no_token(raw: bytes, key: bytes) -> None:
    """The guest keeps it, so it is the guest's to change."""
    with pytest.raises(BoxBroken):
        token.read(key, raw)


@given(st.binary(max_size=300).filter(lambda content: len(content) != 104))
def test_a_box_under_the_tokens_key_that_holds_something_else_is_no_token(content: bytes) -> None:
    """Its size is fixed, so nothing in it can be cut in two ways."""
    with pytest.raises(BoxBroken):
        token.read(KEY, wrapping.seal(KEY, token.LABEL_TOKEN, content, b""))


@given(
    st.text("ab1.-", min_size=1, max_size=4),
    st.uuids().map(str),
    st.integers(0, 1 << 70),
    st.binary(max_size=120),
)
def test_an_unlock_key_opens_for_its_vm_volume_and_version_alone(
    vm_id: str, uuid: str, version: int, raw: bytes
) -> None:
    """Whoever writes into the database cannot move one VM's key to another."""
    keys = UnlockKeys(KEY)
    key = keys.make()
    wrapped = keys.wrap(key, vm_id, uuid, version)
    assert keys.unwrap(wrapped, vm_id, uuid, version) == key
    for box, place in (
        (raw, (vm_id, uuid, version)),
        (wrapped, (vm_id + "x", uuid, version)),
        (wrapped, (vm_id, uuid[:-1], version)),
        (wrapped, (vm_id, uuid, version + 1)),
        (keys.wrap_confirm_key(key, vm_id.encode()), (vm_id, uuid, version)),
    ):
        with pytest.raises(BoxBroken):
            keys.unwrap(box, *place)


@settings(max_examples=50)
@given(st.binary(max_size=messages.HPKE_PUBLIC_SIZE) | st.binary(min_size=1300, max_size=1400))
def test_any_bytes_are_no_key_to_seal_to(public: bytes) -> None:
    """A Hello's key has the right size by its message; what it is, only sealing finds out."""
    with pytest.raises(Malformed) as caught:
        sealing.seal(public, bytes(32), b"payload", None)
    assert caught.value.code == "hello.hpke-key"


@settings(max_examples=50)
@given(st.binary(max_size=1400), st.binary(max_size=80), st.binary(max_size=40))
def test_any_bytes_are_no_answer(sealed: bytes, inner: bytes, secret: bytes) -> None:
    """In either layer, with any S, and once the key is gone."""
    key = sealing.ResponseKey([bytes(32)])
    with pytest.raises(NotAuthentic) as caught:
        key.open(sealed, bytes(32))
    assert caught.value.code == "answer.hpke"
    with pytest.raises(NotAuthentic) as caught:
        sealing.open_inner(inner, bytes(32), secret)
    assert caught.value.code == "answer.inner"


@given(st.binary(max_size=80))
def test_a_key_file_holds_a_key_or_is_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    """Neither cut nor padded."""
    path = Path(tmp_path_factory.getbasetemp()) / "kek-of-chance"
    path.write_bytes(raw)
    path.chmod(0o600)
    if len(raw) == KEK_SIZE:
        assert FileKek(path).read() == raw
        return
    with pytest.raises(OperatorError) as caught:
        FileKek(path).read()
    assert caught.value.code == "kek.size"


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), 1 << 63) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(json_values)
def test_a_column_gives_back_what_was_put_there(value: Any) -> None:  # noqa: ANN401 - whatever JSON can hold
    """What the database holds as text is one value."""
    assert columns.decode(columns.encode(value), Any, "a column") == value


@given(st.text(max_size=60) | st.just("[" * 100_000) | st.just("\ud800"))
def test_a_column_that_somebody_changed_is_an_operators_error(text: str) -> None:
    """No JSON error, and no depth, gets past the store."""
    try:
        found = columns.decode(text, list[str], "a column")
    except StoreUnavailable as error:
        code = error.code
    else:
        assert all(isinstance(one, str) for one in found)
        return
    assert code == "store.broken"


@given(st.text(max_size=60) | st.ip_addresses().map(str))
def test_any_address_is_one_source(address: str) -> None:
    """An ASGI server passes on what it was told; nothing of it makes the limits stumble."""
    source = limits.source_of(address)
    assert limits.source_of(source) in {source, source.partition("/")[0]} or "/" in source
