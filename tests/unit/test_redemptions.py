"""A session is used once, whoever races; and what belongs to a VM or a profile goes with it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kagimori_protocol.errors import OperatorError
from kagimori_verifier import ledger
from kagimori_verifier.store import (
    Conflict,
    Store,
    Txn,
    identities,
    observations,
    profiles,
    redemptions,
    references,
    roots,
    vms,
)
from kagimori_verifier.store.identities import Identity
from kagimori_verifier.store.observations import Observation
from kagimori_verifier.store.profiles import ProfileRow
from kagimori_verifier.store.redemptions import AlreadyRedeemed, Redemption
from kagimori_verifier.store.references import BootStateRow, MeasurementRow
from kagimori_verifier.store.roots import RootRow
from kagimori_verifier.store.vms import VmRow, VolumeRow

CHIP, REPORT_ID, OTHER_REPORT_ID = b"\xc1" * 64, b"\xa1" * 32, b"\xa2" * 32
PCRS = {"4": {"digest": "44" * 32, "events": [["ab" * 32, "boot loader"]]}}
REDEMPTION = Redemption(
    session_sha256=b"\x01" * 32,
    session="00112233aabbccdd",
    evidence_sha256=b"\xe1" * 32,
    vm_id="web1",
    purpose="unlock",
    decision="keys",
    kind="svsm-vtpm",
    signer="vcek",
    chip_id=CHIP,
    report_id=REPORT_ID,
    binding=b"\xb1" * 32,
    created=1000,
    expires=1300,
    answer=None,
    confirm_key=None,
    outcome=None,
)


class _Interrupted(Exception):
    """Whatever may be raised inside a transaction."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Make a database with one profile and one VM."""
    made = Store.create(f"sqlite:///{tmp_path / 'verifier.db'}")
    with made.write() as txn:
        profiles.add(txn, ProfileRow("debian", "{}", 0))
        vms.add(txn, VmRow("web1", "debian", True, ["unlock", "dry-run"], ["ab" * 64], 0))
    yield made
    made.close()


def test_a_session_redeemed_by_two_programs_at_once_is_redeemed_once(tmp_path: Path, store: Store) -> None:
    """Both ask first and insert then, as release does; one of them finds what the other wrote."""
    code = (
        "import dataclasses, sys\n"
        "from kagimori_verifier import ledger\n"
        "from kagimori_verifier.store import Store, redemptions\n"
        "store = Store.open(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "for number in range(40):\n"
        "    with store.write() as txn:\n"
        "        session = number.to_bytes(32, 'big')\n"
        "        if redemptions.find(txn, session) is None:\n"
        "            redemptions.insert(txn, redemptions.Redemption(\n"
        "                session, f'{number:016x}', sys.argv[2].encode(), 'web1', 'unlock', 'keys',\n"
        "                'svsm-vtpm', 'vcek', b'c', b'r', b'b', 0, 0, None, None, None))\n"
        "            ledger.append(txn, at_s=0, event='released', vm_id='web1',\n"
        "                          session=f'{number:016x}', body={'by': sys.argv[2]})\n"
        "            print('redeemed', number, flush=True)\n"
    )
    url = f"sqlite:///{tmp_path / 'verifier.db'}"
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", code, url, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in ("one", "two")
    ]
    for program in programs:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
    for program in programs:
        assert program.stdin is not None
        program.stdin.write("go\n")
        program.stdin.flush()
    said = [program.communicate(timeout=60)[0].split("\n")[:-1] for program in programs]
    assert [program.returncode for program in programs] == [0, 0]
    assert sorted(said[0] + said[1]) == sorted(f"redeemed {number}" for number in range(40))
    with store.read() as txn:
        assert ledger.verify(txn)[0] == 40


def test_a_redemption_comes_back_as_it_was_kept(store: Store) -> None:
    """By the hash of its session."""
    with store.write() as txn:
        redemptions.insert(txn, REDEMPTION)
    with store.read() as txn:
        assert redemptions.find(txn, REDEMPTION.session_sha256) == REDEMPTION
        assert redemptions.find(txn, bytes(32)) is None


def test_a_second_use_of_a_session_is_refused_by_the_table_itself(store: Store) -> None:
    """Even code that forgot to ask cannot overwrite what was decided."""
    with store.write() as txn:
        redemptions.insert(txn, REDEMPTION)
    other = dataclasses.replace(REDEMPTION, evidence_sha256=b"\xe2" * 32, decision="denied")
    with pytest.raises(AlreadyRedeemed), store.write() as txn:
        redemptions.insert(txn, other)
    with store.read() as txn:
        assert redemptions.find(txn, REDEMPTION.session_sha256) == REDEMPTION


def test_answer_and_outcome_are_kept_until_the_session_expires(store: Store) -> None:
    """A lost reply is sent again; afterwards nobody can ask for it, and only the facts stay."""
    key = REDEMPTION.session_sha256
    with store.write() as txn:
        redemptions.insert(txn, REDEMPTION)
        redemptions.store_answer(txn, key, b"sealed", b"wrapped")
        redemptions.set_outcome(txn, key, "received")
        redemptions.purge_answers(txn, REDEMPTION.expires)
        kept = redemptions.find(txn, key)
        assert kept == dataclasses.replace(
            REDEMPTION, answer=b"sealed", confirm_key=b"wrapped", outcome="received"
        )
        redemptions.purge_answers(txn, REDEMPTION.expires + 1)
        gone = redemptions.find(txn, key)
        assert kept is not None
        assert gone == dataclasses.replace(kept, answer=None)


def test_neither_answers_nor_wrapped_keys_are_shown(store: Store) -> None:
    """A record in a log or a traceback tells what was decided, and no bytes that help anyone."""
    record = dataclasses.replace(REDEMPTION, answer=b"sealed", confirm_key=b"wrapped")
    volume = VolumeRow("web1", "u", "active", b"wrapped", 1, 0, "cryptroot", 0)
    identity = Identity("k", "token", None, b"wrapped", 0, "current")
    for shown in map(repr, (record, volume, identity)):
        assert "sealed" not in shown
        assert "wrapped" not in shown


def test_a_boot_without_a_tpm_is_granted_keys_once(store: Store) -> None:
    """The session that has the grant keeps it when it asks again; every other gets none, also another VM's."""
    with store.write() as txn:
        assert redemptions.claim_direct_grant(txn, "vcek", CHIP, REPORT_ID, b"one")
        assert redemptions.claim_direct_grant(txn, "vcek", CHIP, REPORT_ID, b"one")
        assert not redemptions.claim_direct_grant(txn, "vcek", CHIP, REPORT_ID, b"two")
        assert redemptions.claim_direct_grant(txn, "vcek", CHIP, OTHER_REPORT_ID, b"two")


def test_one_boot_is_one_boot_whoever_signs_for_it(store: Store) -> None:
    """A guest may choose between the keys of chip and provider, and its host may mask CHIP_ID: neither makes a new boot."""
    with store.write() as txn:
        assert redemptions.claim_direct_grant(txn, "vcek", CHIP, REPORT_ID, b"one")
        assert not redemptions.claim_direct_grant(txn, "vlek", CHIP, REPORT_ID, b"two")
        assert not redemptions.claim_direct_grant(txn, "vcek", bytes(64), REPORT_ID, b"two")


def test_a_grant_is_undone_with_its_transaction(store: Store) -> None:
    """A redemption that could not be written has granted nothing."""

    def grant_and_fail() -> None:
        with store.write() as txn:
            redemptions.claim_direct_grant(txn, "vcek", CHIP, REPORT_ID, b"one")
            raise _Interrupted

    with pytest.raises(_Interrupted):
        grant_and_fail()
    with store.write() as txn:
        assert redemptions.claim_direct_grant(txn, "vcek", CHIP, REPORT_ID, b"two")


def test_a_boot_is_opened_once_it_is_marked(store: Store) -> None:
    """Marking it again, from another session too, changes nothing."""
    with store.write() as txn:
        assert not redemptions.is_opened(txn, REPORT_ID)
        redemptions.mark_opened(txn, "vcek", CHIP, REPORT_ID, b"one")
        redemptions.mark_opened(txn, "vlek", CHIP, REPORT_ID, b"two")
        assert redemptions.is_opened(txn, REPORT_ID)
        assert not redemptions.is_opened(txn, OTHER_REPORT_ID)


def _observation(number: int, *, vm_id: str = "web1", confirmed: bool = False) -> Observation:
    return Observation(f"{number:016x}", vm_id, "debian", number, confirmed, PCRS)


def test_unproven_observations_push_out_no_proven_one(store: Store) -> None:
    """Whoever can make authentic evidence, but not confirm it, cannot make the owner forget what was confirmed."""
    with store.write() as txn:
        observations.add(txn, _observation(1))
        observations.confirm(txn, f"{1:016x}")
        for number in range(2, 2 + 3 * observations.KEPT):
            observations.add(txn, _observation(number))
        observations.add(txn, _observation(9999, vm_id="web2"))
        seen = observations.for_vm(txn, "web1")
        assert [row.confirmed for row in seen] == [False] * observations.KEPT + [True]
        assert observations.get(txn, f"{1:016x}") == dataclasses.replace(_observation(1), confirmed=True)
        assert observations.get(txn, f"{2:016x}") is None


def test_confirmed_observations_are_bounded_too(store: Store) -> None:
    """A VM that boots every day for years leaves its newest boots."""
    with store.write() as txn:
        for number in range(2 * observations.KEPT):
            observations.add(txn, _observation(number))
            observations.confirm(txn, f"{number:016x}")
        kept = observations.for_vm(txn, "web1")
    assert [row.created for row in kept] == list(range(2 * observations.KEPT - 1, observations.KEPT - 1, -1))
    with store.write() as txn:
        observations.confirm(txn, "no such session")


def test_a_measurement_is_of_one_kind_in_all_profiles(store: Store) -> None:
    """The kind decides which checks apply, so no second profile may call an SVSM's build snp-direct."""
    svsm = MeasurementRow(b"\x5a" * 48, "debian", "svsm-vtpm", "build 1", ["vtpm"], 0)
    with store.write() as txn:
        profiles.add(txn, ProfileRow("other", "{}", 0))
        references.add_measurement(txn, svsm)
        references.add_measurement(txn, dataclasses.replace(svsm, profile="other"))
        assert references.measurement(txn, "debian", svsm.digest) == svsm
        assert references.measurement(txn, "debian", bytes(48)) is None
        assert len(references.measurements(txn)) == 2
        assert references.measurements(txn, "debian") == (svsm,)
        assert references.remove_measurement(txn, "debian", svsm.digest)
        assert not references.remove_measurement(txn, "debian", svsm.digest)
    with pytest.raises(OperatorError) as caught, store.write() as txn:
        references.add_measurement(txn, dataclasses.replace(svsm, kind="snp-direct"))
    assert caught.value.code == "reference.kind"


def test_a_measurement_or_vm_of_no_profile_is_refused(store: Store) -> None:
    """Foreign keys hold: nothing can be judged by a policy that is not there."""
    adders: tuple[Callable[[Txn], None], ...] = (
        lambda txn: references.add_measurement(txn, MeasurementRow(b"d", "none", "snp-direct", "", [], 0)),
        lambda txn: vms.add(txn, VmRow("web2", "none", True, [], [], 0)),
        lambda txn: vms.add_volume(txn, VolumeRow("web2", "u", "active", b"w", 1, 0, "l", 0)),
    )
    for add in adders:
        with pytest.raises(Conflict), store.write() as txn:
            add(txn)


def test_a_profile_in_use_is_not_removed(store: Store) -> None:
    """The VMs that have it are named."""
    with pytest.raises(OperatorError, match="web1") as caught, store.write() as txn:
        profiles.remove(txn, "debian")
    assert caught.value.code == "profile.used"
    with store.write() as txn:
        assert profiles.replace(txn, "debian", '{"a":1}')
        assert not profiles.replace(txn, "none", "{}")
        assert profiles.all(txn) == (ProfileRow("debian", '{"a":1}', 0),)
        assert profiles.get(txn, "none") is None


def test_a_profile_and_a_vm_of_an_old_name_inherit_nothing(store: Store) -> None:
    """What was accepted for one that was removed must not be accepted for another that is called the same."""
    volume = VolumeRow("web1", "0f", "adding", b"wrapped", 1, 0, "cryptroot", 0)
    with store.write() as txn:
        vms.add_volume(txn, volume)
        for owner_kind, owner in (("vm", "web1"), ("profile", "debian")):
            references.add_boot_state(txn, BootStateRow(owner_kind, owner, "l", PCRS, "s", 0))
        observations.add(txn, _observation(1, confirmed=True))
        assert vms.remove(txn, "web1")
        assert not vms.remove(txn, "web1")
        assert profiles.remove(txn, "debian")
        assert not profiles.remove(txn, "debian")
        profiles.add(txn, ProfileRow("debian", "{}", 1))
        vms.add(txn, VmRow("web1", "debian", True, [], [], 1))
        assert vms.volumes(txn, "web1", state=None) == ()
        assert references.boot_states(txn, "vm", "web1") == ()
        assert references.boot_states(txn, "profile", "debian") == ()
        assert observations.for_vm(txn, "web1") == ()


def test_a_vm_is_what_it_was_last_told_to_be(store: Store) -> None:
    """Lists come back as lists."""
    changed = VmRow("web1", "debian", False, ["dry-run"], [], 0)
    with store.write() as txn:
        vms.update(txn, changed)
        assert vms.get(txn, "web1") == changed
        assert vms.all(txn) == (changed,)
        assert vms.get(txn, "web2") is None


def test_a_volume_has_its_key_in_versions_each_in_a_state(store: Store) -> None:
    """Only active ones are given unless another state is asked for, so a key that is being added is not released."""
    adding = VolumeRow("web1", "0f", "adding", b"second", 2, 0, "cryptroot", 1)
    active = VolumeRow("web1", "0f", "active", b"first", 1, 0, "cryptroot", 0)
    with store.write() as txn:
        vms.add_volume(txn, active)
        vms.add_volume(txn, adding)
        assert vms.volumes(txn, "web1") == (active,)
        assert vms.volumes(txn, "web1", state="adding") == (adding,)
        assert vms.volumes(txn, "web1", state=None) == (active, adding)
        vms.set_volume_state(txn, "web1", "0f", 2, "active")
        vms.set_volume_state(txn, "web1", "0f", 1, "removed")
        assert vms.volumes(txn, "web1") == (dataclasses.replace(adding, state="active"),)
        assert vms.remove_volume(txn, "web1", "0f", 1)
        assert not vms.remove_volume(txn, "web1", "0f", 1)


def test_boot_states_come_back_with_their_ids(store: Store) -> None:
    """Oldest first, of their owner only; an id that was given once is not given again to a newer state."""
    state = BootStateRow("vm", "web1", "6.12.1", PCRS, "event log", 0)
    with store.write() as txn:
        first = references.add_boot_state(txn, state)
        second = references.add_boot_state(txn, dataclasses.replace(state, label="6.12.2"))
        references.add_boot_state(txn, dataclasses.replace(state, owner="web2"))
        kept = references.boot_states(txn, "vm", "web1")
        assert [(row.id, row.label) for row in kept] == [(first, "6.12.1"), (second, "6.12.2")]
        assert kept[0].pcrs == PCRS
        assert references.boot_states(txn, "profile", "web1") == ()
        assert references.remove_boot_state(txn, first)
        assert not references.remove_boot_state(txn, first)


def test_roots_and_identities_come_back_as_they_were_kept(store: Store) -> None:
    """Oldest first; what is removed is trusted no longer."""
    root = RootRow(b"\x0a" * 32, "Milan", "our lab", 5)
    older = Identity("k1", "signing", b"p", b"w", 1, "retired")
    newer = Identity("k2", "signing", b"q", b"v", 2, "current")
    with store.write() as txn:
        roots.add(txn, root)
        identities.add(txn, newer)
        identities.add(txn, older)
        assert roots.all(txn) == (root,)
        assert identities.all(txn, "signing") == (older, newer)
        assert identities.all(txn, "token") == ()
        assert roots.remove(txn, root.spki_sha256)
        assert not roots.remove(txn, root.spki_sha256)
        assert roots.all(txn) == ()
