"""What a killed reencryption leaves of a header at rest is taken away; nothing else is, and no stray error comes of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conformance.making.header import Json
from tests.unit.luks.headers import DEVICE_SIZE, HONEST, SIZE, edited, header, reader

from kagimori_protocol import luks2_settle
from kagimori_protocol.errors import DiskError
from kagimori_protocol.luks2_change import Pieces
from kagimori_protocol.luks2_layout import LuksHeader, copies

SALTS = (bytes(64), bytes(range(64)))


def _left(one: Json) -> None:
    """Leave the keyslot of a key that no data is under, with a token that is tied to it."""
    second = json.loads(json.dumps(one["keyslots"]["0"]))
    second["area"]["offset"] = "290816"
    one["keyslots"]["1"] = second
    one["digests"]["1"] = one["digests"]["0"] | {"keyslots": ["1"], "segments": []}
    one["tokens"]["0"] = {"type": "kagimori-header", "keyslots": ["1"], "epoch": "1", "mac": "0" * 64}


def _plan(document: Json) -> Pieces:
    return luks2_settle.tidied(reader(header(json.dumps(document).encode())), DEVICE_SIZE, SALTS)


def _after(writes: Pieces) -> list[LuksHeader]:
    raw = bytearray(2 * SIZE)
    for at, data in writes:
        if at < 2 * SIZE:
            raw[at : at + len(data)] = data
    return [one for one in copies(reader(bytes(raw))) if isinstance(one, LuksHeader)]


def test_a_keyslot_of_no_data_goes_with_its_digest_and_its_bytes() -> None:
    """Both copies of the header first: until then, either opens with what it points at."""
    writes = _plan(edited(_left))
    assert [(at, len(data)) for at, data in writes] == [(SIZE, SIZE), (0, SIZE), (290816, 258048)]
    assert not any(writes[2][1])
    expected = edited(lambda one: one["tokens"].update({"0": _token_of_none()}))
    assert [one.json for one in _after(writes)] == [expected, expected]


def _token_of_none() -> Json:
    return {"type": "kagimori-header", "keyslots": [], "epoch": "1", "mac": "0" * 64}


def test_the_key_that_is_left_may_have_any_number() -> None:
    """Killed as cryptsetup ended: the old key's keyslot is left, and the data's digest is the second."""
    document = edited(_left)
    digests = document["digests"]
    digests["0"]["segments"], digests["1"]["segments"] = [], ["0"]
    read = _after(_plan(document))[0]
    assert list(read.json["keyslots"]) == ["1"]
    assert read.json["digests"] == {"0": digests["1"]}


def _under_way(one: Json) -> None:
    _left(one)
    one["config"]["requirements"] = {"mandatory": ["online-reencrypt-v2"]}


def _two_keys(one: Json) -> None:
    _left(one)
    one["digests"]["1"]["segments"] = ["0"]


@pytest.mark.parametrize(
    "edit",
    [
        lambda _: None,
        _under_way,
        _two_keys,
        lambda one: one.update(digests={}),
        lambda one: one.update(digests=[]),
    ],
    ids=["at rest", "under way", "two keys of data", "no digest", "no object"],
)
def test_what_no_run_leaves_is_left_as_it_is(edit: Callable[[Json], object]) -> None:
    """What is wrong with it is told by whoever looks at it next."""
    assert _plan(edited(edit)) == ()


@pytest.mark.parametrize("offset", ["32768", "0", "16777216", "x", "9" * 30])
def test_bytes_of_what_stays_are_never_overwritten(offset: str) -> None:
    """The host says where a keyslot lies that is to go."""
    document = edited(_left)
    document["keyslots"]["1"]["area"]["offset"] = offset
    assert [at for at, _ in _plan(document)] == [SIZE, 0]


def test_a_header_that_would_be_refused_even_so_is_refused_at_once() -> None:
    """It is not written anew with right checksums."""
    document = edited(_left)
    document["segments"]["0"]["encryption"] = "cipher_null-ecb"
    with pytest.raises(DiskError) as caught:
        _plan(document)
    assert caught.value.code == "luks.cipher"


def _paths(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:  # noqa: ANN401 - JSON
    if not isinstance(value, dict):
        return [path]
    inner = [one for name in value for one in _paths(value[name], (*path, name))]
    return [path, *inner] if path else inner


ODD: st.SearchStrategy[Any] = (
    st.none()
    | st.integers(0, 9)
    | st.sampled_from(["", "0", "1"])
    | st.lists(st.sampled_from(["0", "1", 1, None, []]))
)


@given(
    path=st.sampled_from(_paths(edited(_left))), value=ODD | st.dictionaries(st.just("0"), ODD, max_size=1)
)
def test_whatever_stands_in_a_members_place_is_tidied_or_refused(
    path: tuple[str, ...], value: object
) -> None:
    """The host wrote it."""

    def put(one: Any) -> None:  # noqa: ANN401 - JSON
        _left(one)
        for name in path[:-1]:
            one = one[name]
        one[path[-1]] = value

    with contextlib.suppress(DiskError):
        for read in _after(_plan(edited(put))):
            assert list(read.json["digests"]) == ["0"]
            assert read.json["segments"] == HONEST["segments"]
