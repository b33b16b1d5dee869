"""Vectors of every message: valid ones, and each rule broken. ``body`` holds the exact bytes, without a line break."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from collections.abc import Iterator
from typing import Any, Final

from tests.conformance.making import bounds
from tests.conformance.making.form import (
    BODIES,
    DENIAL,
    EVIDENCE,
    HELLO,
    KEYS,
    OPTIONAL,
    PAYLOADS,
    UUID,
    VERDICT,
    Body,
    changed,
    form,
    short,
    without,
)
from tests.conformance.making.vector import Vector, given, hexed

DECODE: Final = "message.decode"
FORM: Final = "message.form"
SIZE: Final = "message.size"
VERSION: Final = "unsupported-version"
LONG_RUN: Final = 300
MAX_BODY: Final = 1 << 20
MAX_EVENT_LOG: Final = 640 << 10


def vectors() -> Iterator[Vector]:
    """Give all of them."""
    for name, body in BODIES.items():
        yield _valid(f"{name}/full", body, "Every field is there.")
        if name in OPTIONAL:
            bare = without(body, *OPTIONAL[name])
            yield _valid(f"{name}/bare", bare, "Optional fields are left out, never null.")
        yield from _rules(name, short(body))
    yield from _values()
    yield from _forms()
    yield from _sizes()
    for name, field, value in bounds.OUTSIDE:
        path = f"{name}/{field.replace('_', '-').replace('.', '-')}-{_named(value)}"
        about = f"{field} is outside its bounds."
        yield _bad(path, form(_placed(short(BODIES[name]), field, value)), about, DECODE)


def _valid(path: str, body: Body, about: str) -> Vector:
    return Vector(f"messages/{path}", about, {"body": form(body)}, hexed(_told(body)))


def _told(value: Any) -> Any:  # noqa: ANN401 - a message, or a value in one
    """Tell long byte strings by their SHA-256."""
    if isinstance(value, bytes) and len(value) > LONG_RUN:
        return f"sha256:{hashlib.sha256(value).hexdigest()}"
    return {name: _told(one) for name, one in value.items()} if isinstance(value, dict) else value


def _bad(path: str, body: bytes, about: str, code: str) -> Vector:
    return Vector(f"messages/{path}", about, _stored(body), fails=code)


def _stored(body: bytes) -> dict[str, bytes]:
    """Store a body, or describe it where most of it is one byte again and again."""
    run = re.search(rb"(.)\1{%d,}" % LONG_RUN, body, re.DOTALL)
    if run is None:
        return {"body": body}
    before, behind = body[: run.start()], body[run.end() :]
    return _parts((before, 1), (run[1], len(run[0])), (behind, 1))


def _rules(name: str, body: Body) -> Iterator[Vector]:
    """Break each rule of section 3 in a message of each kind."""
    good, fields = form(body), list(body)
    another = "receipt" if name != "receipt" else "confirm"
    turned = {field: body[field] for field in (*fields[:-2], fields[-1], fields[-2])}
    second = form({fields[1]: body[fields[1]]})[1:-1]
    last_required = next(field for field in reversed(fields) if field not in OPTIONAL.get(name, ()))
    broken = {
        "unknown-field": (good[:-1] + b',"more":0}', "A new field is a new version.", DECODE),
        "missing-field": (form(without(body, last_required)), f"{last_required} is missing.", DECODE),
        "other-type": (form(changed(body, type=another)), "No message passes for another.", DECODE),
        "no-type": (
            form(without(body, "type")),
            "Every message names its type.",
            DECODE if name in PAYLOADS else FORM,
        ),
        "field-twice": (good.replace(second, second + b"," + second, 1), "A field comes twice.", FORM),
        "other-order": (form(turned), "Fields stand in the order of the protocol.", FORM),
        "trailing-line-break": (good + b"\n", "Nothing follows the message.", FORM),
        "trailing-bytes": (good + b"\0", "Nothing follows the message.", DECODE),
        "not-utf-8": (good.replace(b'"type":"', b'"type":"\xff', 1), "Messages are UTF-8.", DECODE),
        "cut": (good[:-1], "The end is missing.", DECODE),
    }
    if name not in PAYLOADS:
        broken["version-2"] = (
            form(changed(body, version=2)),
            "A version that is not spoken is told apart from what cannot be read.",
            VERSION,
        )
        broken["no-version"] = (form(without(body, "version")), "Every message has its version.", DECODE)
    if bytes_field := _bytes_field(body):
        broken["loose-base64"] = (
            _loosened(good, body[bytes_field]),
            "Base64 has one form: unused bits are zero.",
            FORM,
        )
    for field in OPTIONAL.get(name, ())[:1]:
        null = good.replace(form({field: body[field]})[1:-1], f'"{field}":null'.encode(), 1)
        broken[f"null-{field.replace('_', '-')}"] = (null, "An absent field is left out, never null.", DECODE)
    for rule, (content, about, code) in broken.items():
        yield _bad(f"{name}/{rule}", content, about, code)


def _bytes_field(body: Body) -> str | None:
    """Name a field whose base64 ends in one ``=``, so that two of its bits stand for nothing."""
    return next(
        (name for name, value in body.items() if isinstance(value, bytes) and len(value) % 3 == 2), None
    )


def _loosened(good: bytes, value: bytes) -> bytes:
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    strict = b64encode(value)
    at = alphabet.index(strict[-2])
    return good.replace(strict, strict[:-2] + alphabet[at + 1 : at + 2] + b"=", 1)


def _values() -> Iterator[Vector]:
    """Give more valid messages: every value of what can be chosen, and the ends of what is bounded."""
    for purpose in ("dry-run", "preflight", "enrol"):
        yield _valid(f"hello/purpose-{purpose}", changed(short(HELLO), purpose=purpose), "A purpose.")
    direct = changed(without(HELLO, "ek_public", "ak_public"), kind="snp-direct", volumes=[])
    yield _valid("hello/kind-snp-direct", direct, "Without a TPM, and without a volume.")
    yield _valid("hello/longest-vm-id", changed(HELLO, vm_id="w" * 63), "The longest vm_id.")
    yield _valid(
        "hello/most-volumes", changed(HELLO, volumes=[UUID] * 16), "As many volumes as a message may name."
    )
    for outcome in ("received", "failed", "reencrypted"):
        for name in ("confirm", "receipt"):
            yield _valid(f"{name}/outcome-{outcome}", changed(BODIES[name], outcome=outcome), "An outcome.")
    for code in ("malformed", "unknown-vm", "stale-session", "used-session"):
        yield _valid(f"denial/{code}", changed(DENIAL, code=code), "A code of version 1.")
    yield _valid(
        "denial/no-session", changed(DENIAL, session=b""), "A Hello is denied: there is no session yet."
    )
    most = changed(EVIDENCE, challenges=EVIDENCE["challenges"] * 8)
    yield _valid("evidence/most-challenges", most, "Eight verifiers are asked at once.")
    yield _valid("evidence/no-pcrs", changed(EVIDENCE, pcrs=[]), "An empty list is another thing than none.")
    one_key = [without(KEYS["volumes"][0], "next_unlock_key")]
    yield _valid("keys/not-rotating", changed(KEYS, volumes=one_key), "There is no key that comes next.")
    yield _valid("verdict/allowed", changed(VERDICT, allowed=True, checks=[]), "Nothing was found wanting.")


def _forms() -> Iterator[Vector]:
    """Give what two JSON parsers might read alike, though it is not the one form. Any message would do; this is a Denial."""
    good = form(DENIAL)
    for rule, content, code in (
        ("blank-inside", good.replace(b":1", b": 1"), FORM),
        ("blank-in-front", b" " + good, FORM),
        ("byte-order-mark", b"\xef\xbb\xbf" + good, DECODE),
        ("second-message", good + good, DECODE),
        ("type-last", form({**without(DENIAL, "type"), "type": "denial"}), FORM),
        ("first-of-two-counts", good.replace(b'"version":1', b'"version":2,"version":1'), FORM),
        ("base64-unpadded", good.replace(b"dG9rZW4=", b"dG9rZW4"), DECODE),
        ("base64-padded-twice", good.replace(b"dG9rZW4=", b"dG9rZW4=="), DECODE),
        ("base64-line-break", good.replace(b"dG9rZW4=", b"dG9r\\nZW4="), DECODE),
        ("base64-for-urls", good.replace(b"dG9rZW4=", b"_-__"), DECODE),
        ("bytes-as-list", good.replace(b'"dG9rZW4="', b"[116,111]"), DECODE),
        ("escape-in-value", good.replace(b"denial", b"d\\u0065nial"), FORM),
        ("escape-in-name", good.replace(b'"code"', b'"c\\u006fde"'), FORM),
        ("escaped-slash", form(VERDICT).replace(b"slash/", b"slash\\/"), FORM),
        ("escaped-letter", form(VERDICT).replace("é".encode(), b"\\u00e9"), FORM),
        ("float", good.replace(b":1", b":1.0"), DECODE),
        ("exponent", good.replace(b":1", b":1e0"), DECODE),
        ("leading-zero", good.replace(b":1", b":01"), DECODE),
        ("minus-zero", form(KEYS).replace(b":7", b":-0"), FORM),
        ("bool-for-int", good.replace(b":1", b":true"), DECODE),
        ("string-for-int", good.replace(b":1", b':"1"'), DECODE),
        ("null-for-int", good.replace(b":1", b":null"), DECODE),
        ("half-surrogate", good.replace(b"not-authentic", b"\xed\xa0\x80"), DECODE),
        ("half-surrogate-escaped", form(VERDICT).replace(b"slash/", b"\\ud800"), DECODE),
        ("digits-5000", None, DECODE),
        ("nothing", b"", DECODE),
        ("list", b"[]", DECODE),
        ("null", b"null", DECODE),
        ("deep", None, DECODE),
    ):
        kind = (
            "verdict"
            if content and b'"verdict"' in content
            else "keys"
            if content and b'"keys"' in content
            else "denial"
        )
        path = f"{kind}/form-{rule}"
        about = "Another form of the same content, or no JSON at all."
        if content is None:
            yield Vector(f"messages/{path}", about, _repeated(rule, good), fails=code)
        else:
            yield _bad(path, content, about, code)


def _repeated(rule: str, good: bytes) -> dict[str, bytes]:
    """Describe a long body by its parts instead of storing it."""
    if rule == "deep":
        return _parts((b"[", 100_000))
    before, _, behind = good.partition(b"1")
    return _parts((before, 1), (b"9", 5000), (behind, 1))


def _parts(*pairs: tuple[bytes, int]) -> dict[str, bytes]:
    """Describe a body: each part so many times, one after another. A part is text where it is UTF-8."""
    repeat = []
    for part, times in pairs:
        try:
            repeat.append({"text": part.decode(), "times": times})
        except UnicodeDecodeError:
            repeat.append({"hex": part.hex(), "times": times})
    return given(repeat=repeat)


def _sizes() -> Iterator[Vector]:
    """Give bodies at and beyond the limit, described by what is repeated."""
    for name in BODIES:
        yield Vector(
            f"messages/{name}/too-large",
            "A body has at most 1 MiB, whatever its bytes are.",
            _parts((b"[", MAX_BODY + 1)),
            fails=SIZE,
        )
    yield Vector(
        "messages/denial/as-large-as-may-be",
        "A body of 1 MiB is read.",
        _parts((b"[", MAX_BODY)),
        fails=DECODE,
    )
    with_log = without(EVIDENCE, "enrol_proof")
    head = form(changed(with_log, event_log=b""))[:-2]
    # Three bytes are four characters; of the longest log one byte is left over, and one more is too many.
    groups = MAX_EVENT_LOG // 3
    for name, tail, fails in (("longest", b"AA==", None), ("too-long", b"AAA=", DECODE)):
        yield Vector(
            f"messages/evidence/event-log-{name}",
            "An event log has at most 640 KiB.",
            _parts((head, 1), (b"AAAA", groups), (tail + b'"}', 1)),
            gives=hexed(_told(changed(with_log, event_log=bytes(MAX_EVENT_LOG)))) if fails is None else None,
            fails=fails,
        )


def _placed(body: Body, path: str, value: Any) -> Body:  # noqa: ANN401 - a field's value
    """Set a field; ``a.b`` is b in a, or in the first element of a."""
    name, _, rest = path.partition(".")
    if not rest:
        return changed(body, **{name: value})
    inside = body[name]
    if isinstance(inside, list):
        return changed(body, **{name: [_placed(inside[0], rest, value), *inside[1:]]})
    return changed(body, **{name: _placed(inside, rest, value)})


def _named(value: Any) -> str:  # noqa: ANN401 - a field's value
    """Name a value in a directory's name."""
    if isinstance(value, bytes | list):
        return f"of-{len(value)}"
    if isinstance(value, int):
        return str(value).replace("-", "minus-")
    kept = "".join(character if character.isalnum() else "-" for character in value.lower())
    return kept if 0 < len(kept) <= 12 and kept.strip("-") else f"of-{len(value)}-characters"
