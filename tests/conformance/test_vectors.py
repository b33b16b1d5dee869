"""Our own vectors, through the code that both ends run: what is valid comes out as stored, what is not is refused by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey
from tests.conformance.making.vector import FAIL

from kagimori_protocol import (
    certificate_table,
    enrol_code,
    luks2_allowed,
    luks2_guard,
    luks2_layout,
    messages,
    sealing,
    signature,
    tpm,
    transcript,
)
from kagimori_protocol.errors import KagimoriError, UnsupportedVersion
from kagimori_verifier.trail import Trail
from kagimori_verifier.verify.vtpm import verify_ak, verify_quote

VECTORS: Final = Path(__file__).parent / "vectors"
DIRECTORIES: Final = sorted(
    path.parent.relative_to(VECTORS).as_posix() for path in VECTORS.rglob("expected.json")
)
MOST_BYTES: Final = 370_000
LONG: Final = 300

KINDS: Final[dict[str, type[msgspec.Struct]]] = {
    str(kind.__struct_config__.tag): kind for kind in messages.Message.__subclasses__()
}


class Given:
    """The input of one vector."""

    def __init__(self, name: str) -> None:
        """Read the directory."""
        self.name = name
        self._directory = VECTORS / name
        path = self._directory / "input.json"
        self._values: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}

    def file(self, name: str) -> bytes:
        """Give a file."""
        return (self._directory / name).read_bytes()

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 - whatever JSON can hold
        """Give a value."""
        return self._values[name]

    def __contains__(self, name: str) -> bool:
        """Tell whether there is a value."""
        return name in self._values

    def unhexed(self, name: str) -> bytes:
        """Give a value that is hex."""
        return bytes.fromhex(self._values[name])

    def body(self) -> bytes:
        """Give a message's body, stored or described by what is repeated."""
        if "repeat" not in self:
            return self.file("body")
        parts = [
            (one["text"].encode() if "text" in one else bytes.fromhex(one["hex"])) * one["times"]
            for one in self["repeat"]
        ]
        return b"".join(parts)


def told(value: Any) -> Any:  # noqa: ANN401 - a message, or a value in one
    """Tell a value as expectations do: byte strings in hex, long ones by their SHA-256."""
    if isinstance(value, bytes):
        return f"sha256:{hashlib.sha256(value).hexdigest()}" if len(value) > LONG else value.hex()
    if isinstance(value, msgspec.Struct):
        tag = value.__struct_config__.tag
        fields = {name: told(getattr(value, name)) for name in value.__struct_fields__}
        present = {name: one for name, one in fields.items() if one is not msgspec.UNSET}
        return ({"type": tag} if tag else {}) | present
    return [told(one) for one in value] if isinstance(value, list | tuple) else value


@cache
def response_key(mlkem_seed: str, x25519_private: str) -> sealing.ResponseKey:
    """Give an agent's key with the private key of a vector."""
    key = sealing.ResponseKey([bytes(32)])
    mlkem = MLKEM768PrivateKey.from_seed_bytes(bytes.fromhex(mlkem_seed))
    x25519 = X25519PrivateKey.from_private_bytes(bytes.fromhex(x25519_private))
    key._private = MLKEM768X25519PrivateKey(mlkem, x25519)
    key.public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()
    return key


def transcript_of(given: Given) -> Any:  # noqa: ANN401 - whatever JSON can hold
    """The tie."""
    if "nonce" in given:
        return transcript.svsm_report_data(given.unhexed("nonce"), given.unhexed("manifest")).hex()
    pairs = [
        (bytes.fromhex(one["verifier_public_key"]), bytes.fromhex(one["challenge"]))
        for one in given["challenges"]
    ]
    t0 = transcript.t0(given.unhexed("hello"), pairs)
    nonce, manifest = transcript.svsm_nonce(t0), given.unhexed("manifest")
    values = {
        "t0": t0,
        "svsm_nonce": nonce,
        "svsm_report_data": transcript.svsm_report_data(nonce, manifest),
        "direct_report_data": transcript.direct_report_data(t0),
        "t1": transcript.quote_qualifying_data(t0, given.unhexed("report"), manifest),
        "th": transcript.answer_binding(t0, pairs[given["own"]][1], given.unhexed("evidence")),
    }
    return {name: value.hex() for name, value in values.items()}


def messages_of(given: Given) -> Any:  # noqa: ANN401 - whatever JSON can hold
    """A message: read, told, and written again."""
    kind, body = given.name.split("/")[1], given.body()
    read = (
        messages.decode_payload(body) if kind in {"keys", "verdict"} else messages.decode(KINDS[kind], body)
    )
    assert messages.encode(read) == body
    return told(read)


def replies_of(given: Given) -> Any:  # noqa: ANN401 - whatever JSON can hold
    """A signed reply: verified, and signed again where the key is given."""
    keys = [bytes.fromhex(key) for key in given["public_keys"]]
    request, reply = given.unhexed("request"), given.unhexed("reply")
    key = signature.verify(keys, given["header"], request, reply)
    if "signing_seed" in given:
        private = Ed25519PrivateKey.from_private_bytes(given.unhexed("signing_seed"))
        assert signature.sign(private, request, reply) == given["header"]
    return {"key": key.hex(), "key_id": signature.key_id(key)}


def sealing_of(given: Given) -> Any:  # noqa: ANN401 - whatever JSON can hold
    """An answer opened, and sealed again; or a key made, or refused."""
    if "entropy" in given:
        made = sealing.ResponseKey([bytes.fromhex(source) for source in given["entropy"]])
        return {"public_sha256": hashlib.sha256(made.public).hexdigest()}
    if "hpke_public_key" in given:
        return sealing.seal(given.unhexed("hpke_public_key"), bytes(32), b"", None).hex()
    key, binding = response_key(given["mlkem_seed"], given["x25519_private"]), given.unhexed("binding")
    secret = None if given["secret"] is None else given.unhexed("secret")
    inner = key.open(given.file("sealed.bin"), binding)
    payload = inner if secret is None else sealing.open_inner(inner, binding, secret)
    # The outer layer is random, the inner one is not: sealed again, the same bytes lie within.
    assert key.open(sealing.seal(key.public, binding, payload, secret), binding) == inner
    return {"inner": inner.hex(), "payload": payload.hex()}


def confirm_of(given: Given) -> Any:  # noqa: ANN401 - whatever JSON can hold
    """The MAC of a Confirm."""
    mac = sealing.confirm_mac(given.unhexed("confirm_key"), given.unhexed("binding"), given["outcome"])
    return {"mac": mac.hex()}


def tpm_of(given: Given) -> Any:  # noqa: ANN401 - whatever JSON can hold
    """A TPM's structure, or a quote as a whole."""
    match given.name.split("/")[1]:
        case "ek":
            return {"name": tpm.object_name(tpm.require_ek_l1(given.file("raw.bin"))).hex()}
        case "ak":
            return {"name": verify_ak(Trail(), given.file("raw.bin")).hex()}
        case "pcr-selection":
            return list(tpm.selected_pcrs(given.file("raw.bin")))
        case "attest":
            attest = tpm.Attest.parse(given.file("raw.bin"))
            return {name: told(getattr(attest, name)) for name in attest.__slots__}
        case "signature":
            return {"scheme": int(tpm.parse_signature(given.file("raw.bin")).sigAlg)}
    claims = verify_quote(
        Trail(),
        ek_public=given.unhexed("ek_public"),
        ak_public=given.unhexed("ak_public"),
        ak_name=tpm.object_name(given.unhexed("ak_public")),
        quote=messages.Quote(attest=given.unhexed("attest"), signature=given.unhexed("signature")),
        pcrs=[
            messages.PcrValue(index=one["index"], digest=bytes.fromhex(one["digest"]))
            for one in given["pcrs"]
        ],
        qualifying_data=given.unhexed("qualifying_data"),
        selection=given.unhexed("pcr_selection"),
    )
    pcrs = {str(index): value.hex() for index, value in claims.pcrs.items()}
    return {"pcrs": pcrs, "ak_name": claims.ak_name.hex()}


def certificates_of(given: Given) -> Any:  # noqa: ANN401 - whatever JSON can hold
    """A host's certificate table."""
    return [
        {
            "name": entry.name,
            "payload_sha256": hashlib.sha256(entry.payload).hexdigest(),
            "der_sha256": hashlib.sha256(entry.der()).hexdigest(),
        }
        for entry in certificate_table.parse(given.file("raw.bin"))
    ]


def exchange_of(given: Given) -> Any:  # noqa: ANN401 - whatever JSON can hold
    """A whole exchange, walked from Hello to Receipt as both ends do."""
    bodies = {
        name: given.file(name) for name in ("hello", "challenge", "evidence", "sealed", "confirm", "receipt")
    }
    verifier = Ed25519PrivateKey.from_private_bytes(given.unhexed("verifier_signing_seed")).public_key()
    key = verifier.public_bytes_raw()
    for request, reply in (("hello", "challenge"), ("evidence", "sealed"), ("confirm", "receipt")):
        assert signature.verify([key], given["signatures"][reply], bodies[request], bodies[reply]) == key
    evidence = messages.decode(messages.Evidence, bodies["evidence"])
    assert (evidence.hello, evidence.challenges[0].challenge) == (bodies["hello"], bodies["challenge"])
    t0 = transcript.t0(bodies["hello"], [(one.key, one.challenge) for one in evidence.challenges])
    gives = {"t0": t0, "report_data": transcript.direct_report_data(t0)}
    if isinstance(evidence.manifest, bytes):
        nonce = transcript.svsm_nonce(t0)
        gives |= {"svsm_nonce": nonce, "report_data": transcript.svsm_report_data(nonce, evidence.manifest)}
        gives["t1"] = transcript.quote_qualifying_data(t0, evidence.report, evidence.manifest)
    if isinstance(evidence.enrol_proof, bytes):
        gives["enrol_proof"] = evidence.enrol_proof
    th = transcript.answer_binding(t0, bodies["challenge"], bodies["evidence"])
    sealed = messages.decode(messages.Sealed, bodies["sealed"])
    payload = response_key(given["mlkem_seed"], given["x25519_private"]).open(sealed.sealed, th)
    if given["secret"] is not None:
        payload = sealing.open_inner(payload, th, given.unhexed("secret"))
    confirm_key = messages.decode_payload(payload).confirm_key
    confirm = messages.decode(messages.Confirm, bodies["confirm"])
    assert confirm.mac == sealing.confirm_mac(confirm_key, th, confirm.outcome)
    receipt = messages.decode(messages.Receipt, bodies["receipt"])
    assert (receipt.session, receipt.outcome) == (confirm.session, given["outcome"])
    gives |= {"th": th, "payload": payload}
    return {name: value.hex() for name, value in gives.items()} | {
        "session": transcript.session_id(sealed.session)
    }


def enrol_of(given: Given) -> Any:  # noqa: ANN401 - whatever JSON can hold
    """An operator's code, or its proof."""
    code = enrol_code.EnrolCode.parse(given["code"])
    if "t0" not in given:
        assert enrol_code.EnrolCode.parse(code.text()).text() == code.text()
        return {"public_key": code.public_key.hex(), "fingerprint": code.fingerprint.hex()}
    proof = given.unhexed("enrol_proof") if "enrol_proof" in given else code.prove(given.unhexed("t0"))
    return {
        "enrol_proof": enrol_code.verify_proof(given.unhexed("public_key"), given.unhexed("t0"), proof).hex()
    }


def header_of(given: Given) -> Any:  # noqa: ANN401 - whatever JSON can hold
    """The JSON of a LUKS2 header, as it stands in one copy: what of it this unlock key vouches for."""
    document = json.loads(given.file("header.json"))
    size = int(document["config"]["json_size"]) + luks2_layout.BINARY_SIZE
    read = luks2_layout.LuksHeader(given["uuid"], "", "", 1, size, 0, document)
    key = given.unhexed("unlock_key")
    guarded = luks2_guard.authenticate(luks2_allowed.check(read, 1 << 30), key, given["header_epoch"])
    token = luks2_guard.tied(guarded.header)[guarded.slot]
    assert luks2_guard.seal(guarded.header, guarded.slot, key, guarded.epoch) == token
    memory = luks2_layout.parse(guarded.memory[:size], 0)
    assert (memory.uuid, memory.label, memory.size) == (read.uuid, "", size)
    text = guarded.memory[luks2_layout.BINARY_SIZE : size].rstrip(b"\0").decode()
    return {"slot": guarded.slot, "epoch": guarded.epoch, "mac": token["mac"], "memory": text}


AREAS: Final[dict[str, Callable[[Given], Any]]] = {
    "transcript": transcript_of,
    "messages": messages_of,
    "replies": replies_of,
    "sealing": sealing_of,
    "confirm": confirm_of,
    "tpm": tpm_of,
    "certificates": certificates_of,
    "enrol": enrol_of,
    "exchange": exchange_of,
    "header": header_of,
}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_vector_gives_what_it_says_or_fails_by_the_name_that_it_says(name: str) -> None:
    """A directory that ends in _fail is refused by the named check; any other gives exactly what it stores."""
    given, expected = Given(name), json.loads((VECTORS / name / "expected.json").read_bytes())
    handle = AREAS[name.split("/", maxsplit=1)[0]]
    assert name.endswith(FAIL) == ("fails" in expected)
    if "fails" not in expected:
        assert handle(given) == expected["gives"]
        return
    with pytest.raises(KagimoriError) as caught:
        handle(given)
    assert caught.value.code == expected["fails"]


def test_every_area_has_what_is_valid_and_what_is_not() -> None:
    """A vector that is added to an area that nobody walks would test nothing. A MAC has no wrong input."""
    areas = {name.split("/", maxsplit=1)[0] for name in DIRECTORIES}
    failing = {name.split("/", maxsplit=1)[0] for name in DIRECTORIES if name.endswith(FAIL)}
    assert areas == set(AREAS)
    assert areas - failing == {"confirm", "exchange"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_message_has_its_valid_form_and_each_rule_broken(kind: str) -> None:
    """Whoever adds a message adds its vectors."""
    rules = {
        "unknown-field",
        "missing-field",
        "other-type",
        "no-type",
        "field-twice",
        "other-order",
        "trailing-line-break",
        "trailing-bytes",
        "not-utf-8",
        "cut",
        "too-large",
    }
    struct = KINDS[kind]
    if "version" in struct.__struct_fields__:
        rules |= {"version-2", "no-version"}
    if kind != "unsupported-version":
        rules.add("loose-base64")
    there = {name.split("/")[2] for name in DIRECTORIES if name.startswith(f"messages/{kind}/")}
    assert {f"{rule}{FAIL}" for rule in rules} <= there
    assert "full" in there


def test_the_vectors_stay_small() -> None:
    """What is large is described, not stored."""
    assert sum(path.stat().st_size for path in VECTORS.rglob("*") if path.is_file()) < MOST_BYTES


def test_only_another_version_is_told_apart_from_what_cannot_be_read() -> None:
    """The code of a refused body is Malformed's or UnsupportedVersion's, and nothing else."""
    codes = {
        json.loads((VECTORS / name / "expected.json").read_bytes())["fails"]
        for name in DIRECTORIES
        if name.startswith("messages/") and name.endswith(FAIL)
    }
    assert codes == {"message.decode", "message.form", "message.size", UnsupportedVersion.default_code}
