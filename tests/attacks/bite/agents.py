"""Stories of the agent's side: what it must not take, what it must not open, and what it must not leave open behind it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import pytest
from tests.attacks import hosts, lies
from tests.attacks.attacker import UNLOCK_KEY, UUID, SoftwareAk
from tests.attacks.bite.line import agent_toml, attested, confirmed
from tests.attacks.bite.story import Scene, Stopped, Story, ask_as_the_vm_does, loot, named
from tests.attacks.software import SoftwareTpm

from kagimori_agent import cap, collect
from kagimori_agent.cap import CAP_DATA, Capped
from kagimori_agent.collect import SvsmVtpm
from kagimori_protocol import messages, sealing, signature
from kagimori_protocol.errors import NotAuthentic
from kagimori_protocol.messages import Challenge, Evidence, Hello, Keys, Sealed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.attacks.bite.blind import Twin

    from kagimori_agent.devices.tpm_places import Place

CAP_OF_ITS_OWN: Final = 12
"""A PCR below 16 that the GRUB policy does not look at."""
RESETTABLE: Final = 16
"""The debug PCR: whoever has the TPM may reset it."""


def planted(middle: hosts.Middle, scene: Scene) -> None:
    """The host answers with a key of its own; the goal is that the agent would open the planted disk with it."""
    answered = attested(scene, agent_toml(scene, UUID), middle)
    assert isinstance(answered.payload, Keys)
    assert answered.payload.volumes[0].unlock_key == hosts.PLANTED_KEY


def asked_by_the_host(scene: Scene) -> None:
    """The host asks in the verifier's place; the goal is evidence over a nonce that it chose."""
    seen: list[Evidence] = []

    def listen(path: str, body: bytes, ask: Callable[[], hosts.Reply]) -> hosts.Reply:
        if path == messages.PATH_RELEASE:
            seen.append(messages.decode(Evidence, body))
        return hosts.made_up_challenge(path, body, ask)

    with contextlib.suppress(Stopped):
        attested(scene, agent_toml(scene, UUID), listen)
    if not seen:
        raise Stopped("reply.unsigned")
    assert messages.decode(Challenge, seen[0].challenges[0].challenge).nonce == bytes(32)


def confirmed_by_the_host(scene: Scene) -> None:
    """The host keeps the Confirm; the goal is that the agent believes it to have arrived."""
    scene.machine.reboot()
    settings = agent_toml(scene, UUID)
    answered = attested(scene, settings, lambda _path, _body, ask: ask())
    confirmed(scene, settings, answered, hosts.made_up_receipt)


def another_tpms_manifest(scene: Scene) -> None:
    """The SVSM vouches for an EK of the host's; the goal is S in the host's hands, and with it the inner layer."""
    soft = SoftwareTpm()
    scene.monitor.manifest = soft.ek_public
    secrets: list[bytes] = []

    def keep(path: str, body: bytes, ask: Callable[[], hosts.Reply]) -> hosts.Reply:
        status, reply, signed = ask()
        if path != messages.PATH_RELEASE or not isinstance(messages.decode_answer(reply), Sealed):
            return status, reply, signed
        hello = messages.decode(Hello, messages.decode(Evidence, body).hello)
        credential = messages.decode(Sealed, reply).credential
        assert isinstance(credential, messages.Credential)
        assert isinstance(hello.ak_public, bytes)
        soft.ak.public = hello.ak_public
        secrets.append(soft.activate(credential.id_object, credential.encrypted_secret))
        return 503, b"", None

    try:
        attested(scene, agent_toml(scene, UUID), keep)
    except Stopped:
        if not secrets:
            raise
    assert [len(secret) for secret in secrets] == [32]


def capped_where_nobody_looks(scene: Scene) -> None:
    """agent.toml caps a PCR that the verifier does not look at; the goal is a second key after the cap."""
    attested(scene, agent_toml(scene, UUID), lambda _path, _body, ask: ask(), CAP_OF_ITS_OWN)
    assert scene.stand is not None
    scene.stand.vtpm.measure(CAP_OF_ITS_OWN, CAP_DATA)
    ask_as_the_vm_does(scene)


@dataclass
class LyingTpm:
    """A TPM whose extends go nowhere, or that fails as no TPM should."""

    scene: Scene
    fails: bool = False

    def measure(self, _pcr: int, _data: bytes) -> None:
        """Say that it is done."""
        if self.fails:
            message = "the library has lost its mind"
            raise RuntimeError(message)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - all else is the real TPM's
        """Be the real TPM in all else."""
        assert self.scene.stand is not None
        return getattr(self.scene.stand.vtpm, name)


def capped_in_vain(scene: Scene, *, fails: bool = False) -> None:
    """The cap goes nowhere; the goal is that the boot goes on, and root gets the key again."""

    @contextlib.contextmanager
    def opened(_place: Place) -> Iterator[LyingTpm]:
        yield LyingTpm(scene, fails)

    with pytest.MonkeyPatch.context() as patch, named():
        patch.setattr(cap, "device_class", lambda _name: opened)
        cap.cap(15, tcti="swtpm:whichever")
    ask_as_the_vm_does(scene)


def capped_for_a_moment(scene: Scene) -> None:
    """agent.toml names a PCR that anyone may reset; the goal is a cap that root takes off again."""
    assert scene.stand is not None
    device = scene.stand.vtpm

    @contextlib.contextmanager
    def opened(_place: Place) -> Iterator[Any]:
        yield device

    with pytest.MonkeyPatch.context() as patch, named():
        patch.setattr(cap, "device_class", lambda _name: opened)
        ((_, _, after),) = cap.cap(RESETTABLE, tcti="swtpm:whichever")
    assert any(after)
    device._esapi.pcr_reset(RESETTABLE)
    assert device.read_pcrs([RESETTABLE]) == [(RESETTABLE, bytes(32))]


def eavesdropped(scene: Scene) -> None:
    """Who commands the VM's TPM, but has not the agent's HPKE key, opens the agent's answer."""
    agent, eavesdropper = scene.attacker(), scene.attacker()
    told = agent.send(agent.evidence())
    assert loot(eavesdropper, told) == {UUID: UNLOCK_KEY}


def opened_without_the_tpm(scene: Scene) -> None:
    """A bad boot and an AK in software: the HPKE key is the attacker's, S is in a TPM that it cannot ask; it guesses."""
    attacker = scene.attacker()
    attacker.activate = lambda _id_object, _encrypted_secret: bytes(32)
    told = attacker.send(lies.with_software_ak(attacker, SoftwareAk()))
    assert loot(attacker, told) == {UUID: UNLOCK_KEY}


def a_key_without_chance(scene: Scene) -> None:
    """An agent whose sources of randomness are dry makes the key that an attacker can make as well."""
    agent, thief = scene.attacker(), scene.attacker()
    with named():
        agent.key = sealing.ResponseKey([b""])
    told = agent.send(agent.evidence())
    thief.key = sealing.ResponseKey([b""])
    assert loot(thief, told) == {UUID: UNLOCK_KEY}


# Careless twins


def unsigned_counts(patch: pytest.MonkeyPatch) -> None:
    """Take a reply without a signature for the verifier's."""
    _instead(patch, "reply.unsigned")


def any_key_counts(patch: pytest.MonkeyPatch) -> None:
    """Take a reply that somebody has signed for the verifier's."""
    _instead(patch, "reply.key")


def any_signature_counts(patch: pytest.MonkeyPatch) -> None:
    """Compare the key's name, and not what it signed."""
    _instead(patch, "reply.signature")


def _instead(patch: pytest.MonkeyPatch, code: str) -> None:
    """Verify signatures as ever, and overlook what is refused by one name."""
    strict = signature.verify

    def verify(public_keys: tuple[bytes, ...], header: str | None, request: bytes, reply: bytes) -> bytes:
        try:
            return strict(public_keys, header, request, reply)
        except NotAuthentic as error:
            if error.code != code:
                raise
            return public_keys[0]

    patch.setattr(signature, "verify", verify)


def no_credential_no_secret(patch: pytest.MonkeyPatch) -> None:
    """Open an answer without a credential as if this VM had no TPM."""
    strict = SvsmVtpm.open_credential

    def open_credential(self: SvsmVtpm, credential: messages.Credential | None) -> bytes | None:
        return None if credential is None else strict(self, credential)

    patch.setattr(SvsmVtpm, "open_credential", open_credential)


def any_manifest(patch: pytest.MonkeyPatch) -> None:
    """Do not compare the SVSM's manifest with the TPM that is used."""
    strict = SvsmVtpm.collect

    def careless(self: SvsmVtpm, t0: bytes, pcr_selection: bytes, *rest: float) -> dict[str, Any]:
        self._ek_public = self._tsm.service_report(bytes(64), collect.VTPM_SERVICE).manifest
        return strict(self, t0, pcr_selection, *rest)

    patch.setattr(SvsmVtpm, "collect", careless)


def any_cap(patch: pytest.MonkeyPatch) -> None:
    """Do not ask whether the verifier looks at the cap."""
    patch.setattr(SvsmVtpm, "_require_cap_looked_at", lambda _self, _pcr_selection: None)


def not_read_back(patch: pytest.MonkeyPatch) -> None:
    """Extend, and believe it."""

    def cap_one(place: Place, pcr: int) -> Capped:
        opened = vars(cap)["device_class"]  # the story's, by now
        with opened("vtpm")(place) as device:
            device.measure(pcr, CAP_DATA)
        return Capped(place.name, bytes(32), cap.CAPPED)

    patch.setattr(cap, "_cap_one", cap_one)


def whatever_happens(patch: pytest.MonkeyPatch) -> None:
    """Go on when a TPM fails in a way that nobody has thought of."""
    strict = cap._cap_one

    def cap_one(place: Place, pcr: int) -> Capped:
        try:
            return strict(place, pcr)
        except RuntimeError:
            return Capped(place.name, bytes(32), bytes(32))

    patch.setattr(cap, "_cap_one", cap_one)


def any_pcr(patch: pytest.MonkeyPatch) -> None:
    """Cap whatever PCR is named."""
    patch.setattr(cap, "LAST_STATIC_PCR", 23)


def no_outer_layer(patch: pytest.MonkeyPatch) -> None:
    """Leave HPKE away, at both ends."""

    class Through:
        @staticmethod
        def encrypt(plaintext: bytes, _key: object, **_: bytes) -> bytes:
            return plaintext

        decrypt = encrypt

    patch.setattr(sealing, "_SUITE", Through)


def no_inner_layer(patch: pytest.MonkeyPatch) -> None:
    """Leave the encryption under S away, at both ends."""
    through = SimpleNamespace(
        encrypt=lambda _nonce, plaintext, _aad: plaintext, decrypt=lambda _nonce, sealed, _aad: sealed
    )
    patch.setattr(sealing, "_inner", lambda _secret, _binding: through)


def no_entropy(patch: pytest.MonkeyPatch) -> None:
    """Make a key of whatever there is."""
    patch.setattr(sealing, "_SMALLEST_ENTROPY", 0)


TWINS: Final[dict[str, Twin]] = {
    "reply.unsigned": unsigned_counts,
    "reply.key": any_key_counts,
    "reply.signature": any_signature_counts,
    "answer.credential": no_credential_no_secret,
    "answer.hpke": no_outer_layer,
    "answer.inner": no_inner_layer,
    "collect.other-tpm": any_manifest,
    "challenge.cap-pcr": any_cap,
    "cap.not-held": not_read_back,
    "cap.failed": whatever_happens,
    "cap.pcr": any_pcr,
    "sealing.entropy": no_entropy,
}

STORIES: tuple[Story, ...] = (
    Story(
        "T18: an unsigned key for a planted disk",
        ("reply.unsigned",),
        partial(planted, hosts.unsigned),
        "agent",
    ),
    Story("T18: a key signed by the host", ("reply.key",), partial(planted, hosts.own_key), "agent"),
    Story(
        "T18: a key signed by the host in the verifier's name",
        ("reply.signature",),
        partial(planted, hosts.own_key_under_its_name),
        "agent",
    ),
    Story(
        "T18: a key under the signature of another answer",
        ("reply.signature",),
        partial(planted, hosts.signature_of_the_true_answer),
        "agent",
    ),
    Story(
        "T18: a key that no TPM had to open",
        ("reply.unsigned", "answer.credential"),
        partial(planted, hosts.without_credential),
        "agent",
    ),
    Story("T8: a question by the host", ("reply.unsigned",), asked_by_the_host, "agent"),
    Story("T9: a receipt by the host", ("reply.unsigned",), confirmed_by_the_host, "agent"),
    Story(
        "T9: another TPM's manifest", ("collect.other-tpm", "manifest.hello"), another_tpms_manifest, "agent"
    ),
    Story("T4: a cap where nobody looks", ("challenge.cap-pcr",), capped_where_nobody_looks, "agent"),
    Story("T4: a cap that goes nowhere", ("cap.not-held",), capped_in_vain),
    Story("T4: a TPM that fails as none should", ("cap.failed",), partial(capped_in_vain, fails=True)),
    Story("T4: a cap that can be taken off", ("cap.pcr",), capped_for_a_moment),
    Story("T9: an answer without its outer layer", ("answer.hpke",), eavesdropped),
    Story("T9: an answer without its inner layer", ("answer.inner",), opened_without_the_tpm, "evil"),
    Story("T17: a key that the attacker can make too", ("sealing.entropy",), a_key_without_chance),
)
