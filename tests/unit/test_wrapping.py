"""Sealed boxes: what rests in the database opens only under its key, for its use, with what it was bound to."""

from __future__ import annotations

import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagimori_verifier import wrapping
from kagimori_verifier.keystore.unlock_keys import UnlockKeys
from kagimori_verifier.wrapping import BoxBroken

KEY = bytes(range(32))
LABEL = b"kagimori/1/test"
SECRET = b"a secret that a search would find"
AAD = b"what it is bound to"


def test_a_box_opens_under_its_key_label_and_associated_data() -> None:
    """What went in comes out."""
    assert wrapping.unseal(KEY, LABEL, wrapping.seal(KEY, LABEL, SECRET, AAD), AAD) == SECRET


def test_an_empty_plaintext_is_a_plaintext() -> None:
    """Nothing is a value like any other, and is authenticated like any other."""
    box = wrapping.seal(KEY, LABEL, b"", AAD)
    assert wrapping.unseal(KEY, LABEL, box, AAD) == b""
    with pytest.raises(BoxBroken):
        wrapping.unseal(KEY, LABEL, box, b"")


def test_two_boxes_of_one_plaintext_have_nothing_in_common() -> None:
    """Each box has a salt, and so a key, of its own: the zero nonce is never used twice."""
    first, second = (wrapping.seal(KEY, LABEL, SECRET, AAD) for _ in range(2))
    assert first[:32] != second[:32]
    assert first[32:] != second[32:]


@pytest.mark.parametrize(
    ("key", "label", "aad"),
    [
        pytest.param(bytes(32), LABEL, AAD, id="another key"),
        pytest.param(KEY, LABEL + b"x", AAD, id="another label"),
        pytest.param(KEY, LABEL, AAD + b"x", id="other associated data"),
        pytest.param(KEY, LABEL, b"", id="no associated data"),
    ],
)
def test_a_box_does_not_open_for_anything_else(key: bytes, label: bytes, aad: bytes) -> None:
    """One difference is enough, and the error says for which use the box was tried."""
    box = wrapping.seal(KEY, LABEL, SECRET, AAD)
    with pytest.raises(BoxBroken) as caught:
        wrapping.unseal(key, label, box, aad)
    assert caught.value.code == "box.broken"
    assert label.decode() in str(caught.value)


@given(bit=st.integers(min_value=0, max_value=(32 + len(SECRET) + 16) * 8 - 1))
def test_one_flipped_bit_anywhere_breaks_a_box(bit: int) -> None:
    """Salt, ciphertext and tag are all authenticated."""
    box = bytearray(wrapping.seal(KEY, LABEL, SECRET, AAD))
    box[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(BoxBroken):
        wrapping.unseal(KEY, LABEL, bytes(box), AAD)


@given(box=st.binary(max_size=120))
def test_other_bytes_are_no_box_and_never_a_stray_error(box: bytes) -> None:
    """Too short, too long, anything: one named error."""
    with pytest.raises(BoxBroken):
        wrapping.unseal(KEY, LABEL, box, AAD)


@pytest.mark.parametrize("cut", [0, 31, 32, 47, -1])
def test_a_cut_box_does_not_open(cut: int) -> None:
    """What is bound is never padded or shortened."""
    box = wrapping.seal(KEY, LABEL, SECRET, AAD)
    with pytest.raises(BoxBroken):
        wrapping.unseal(KEY, LABEL, box[:cut], AAD)


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_key_of_another_size_is_refused_both_ways(size: int) -> None:
    """A short key is an error, not a weaker box."""
    with pytest.raises(BoxBroken):
        wrapping.seal(bytes(size), LABEL, SECRET, AAD)
    with pytest.raises(BoxBroken):
        wrapping.unseal(bytes(size), LABEL, bytes(64), AAD)


def test_no_error_and_no_representation_shows_what_is_secret() -> None:
    """Neither plaintext nor key can be read from an exception, its chain or a repr."""
    keys = UnlockKeys(KEY)
    box = keys.wrap(SECRET[:32], "web1", "uuid", 1)
    with pytest.raises(BoxBroken) as caught:
        keys.unwrap(box, "web2", "uuid", 1)
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value.args) + repr(keys)
    for secret in (SECRET[:32], KEY):
        assert secret.hex() not in shown
        assert repr(secret) not in shown
        assert secret.decode("latin-1") not in shown


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(("web2", "uuid", 1), id="another VM"),
        pytest.param(("web1", "diud", 1), id="another volume"),
        pytest.param(("web1", "uuid", 2), id="another version"),
        pytest.param(("web1\x00uuid", "", 1), id="the same letters, cut elsewhere"),
    ],
)
def test_a_wrapped_unlock_key_cannot_be_moved_to_another_row(other: tuple[str, str, int]) -> None:
    """Whoever writes the database cannot make one VM receive another's key."""
    keys = UnlockKeys(KEY)
    box = keys.wrap(SECRET[:32], "web1", "uuid", 1)
    assert keys.unwrap(box, "web1", "uuid", 1) == SECRET[:32]
    with pytest.raises(BoxBroken):
        keys.unwrap(box, *other)


def test_a_confirm_key_is_no_unlock_key() -> None:
    """The two kinds of wrapped keys cannot take each other's place, and each confirm key has its session."""
    keys = UnlockKeys(KEY)
    session = b"s" * 32
    box = keys.wrap_confirm_key(SECRET[:32], session)
    assert keys.unwrap_confirm_key(box, session) == SECRET[:32]
    with pytest.raises(BoxBroken):
        keys.unwrap_confirm_key(box, b"t" * 32)
    with pytest.raises(BoxBroken):
        keys.unwrap(box, "web1", "uuid", 1)


def test_unlock_keys_are_32_bytes_and_differ() -> None:
    """Each volume gets its own."""
    keys = UnlockKeys(KEY)
    made = {keys.make() for _ in range(8)}
    assert len(made) == 8
    assert {len(key) for key in made} == {32}
