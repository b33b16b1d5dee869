"""``explain`` and ``ledger refusals`` for sessions as a verifier leaves them behind."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kagimori_verifier import ledger
from kagimori_verifier.cli import main
from kagimori_verifier.store import Store, refusals

SESSION = "0123456789abcdef"
BODY = {
    "purpose": "unlock",
    "kind": "svsm-vtpm",
    "root": "AMD Milan",
    "chip_id": "ab" * 64,
    "measurement": "5a" * 48,
    "volumes": ["00000000-0000-4000-8000-000000000000"],
}
HOLDS = {"id": "report.tie", "ok": True, "expected": "this exchange's", "found": "so it is"}
FAILS = {"id": "pcr.9", "ok": False, "expected": "one kernel", "found": "another kernel"}


class Office:
    """A verifier in a directory."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.config = directory / "verifier.toml"
        self._url = f"sqlite:///{directory}/verifier.db"
        self._capsys = capsys

    def write(self, *lines: tuple[str, dict[str, Any]]) -> None:
        """Append lines about the session."""
        store = Store.open(self._url)
        with closing(store), store.write() as txn:
            for event, body in lines:
                ledger.append(txn, at_s=1, event=event, vm_id="web1", session=SESSION, body=body)

    def refuse(self, code: str, found: str) -> None:
        """Keep a refusal under the session's name."""
        store = Store.open(self._url)
        row = refusals.Refusal(1, "release", SESSION, "web1", code, "another thing", found, "192.0.2.1")
        with closing(store), store.write() as txn:
            refusals.note(txn, row)

    def explain(self, *words: str) -> tuple[int, str]:
        """Run ``explain``; gives exit code and stdout."""
        self._capsys.readouterr()
        code = main(["--config", str(self.config), *words, "explain", SESSION])
        return code, self._capsys.readouterr().out


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a new verifier, to copy."""
    directory = tmp_path_factory.mktemp("explained") / "verifier"
    assert main(["init", "--dir", str(directory)]) == 0
    return directory


@pytest.fixture
def office(tmp_path: Path, template: Path, capsys: pytest.CaptureFixture[str]) -> Office:
    """Give a verifier."""
    shutil.copytree(template, tmp_path / "verifier")
    return Office(tmp_path / "verifier", capsys)


def test_a_key_that_was_released_and_opened(office: Office) -> None:
    """Exit code 0, and three facts that are not one another."""
    office.write(
        ("released", BODY | {"checks": [HOLDS]}),
        ("confirmed-received", {"purpose": "unlock"}),
        ("confirmed-opened", {"purpose": "unlock"}),
    )
    code, told = office.explain()
    assert code == 0
    for fact in ("released ", "delivered ", "opened "):
        assert f"{fact:<17}yes" in told
    for value in ("web1", "ab" * 64, "5a" * 48, "svsm-vtpm", "AMD Milan", BODY["volumes"][0]):
        assert value in told
    shown = json.loads(office.explain("--json")[1])
    decision = shown["decision"]
    assert (decision["released"], decision["delivered"], decision["opened"]) == (True, True, True)
    assert [one["outcome"] for one in decision["confirmed"]] == ["received", "opened"]
    assert shown["failed"] == []


def test_a_refusal_by_policy_says_what_failed_and_what_to_do(office: Office) -> None:
    """Exit code 1; whether the refused VM has read its verdict stays unknown."""
    office.write(("refused", BODY | {"checks": [HOLDS, FAILS]}))
    code, told = office.explain()
    assert code == 1
    assert "another kernel" in told
    assert "reference accept" in told
    assert f"{'released':<17}no" in told
    assert f"{'delivered':<17}not known" in told
    failed = json.loads(office.explain("--json")[1])["failed"]
    assert [one["id"] for one in failed] == ["pcr.9"]
    assert all(one["about"] and one["todo"] for one in failed)


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_evidence_that_was_not_believed_is_explained_too(office: Office, words: tuple[str, ...]) -> None:
    """It has no line in the ledger: whoever sent it is unproven."""
    office.refuse("report.signature", "a signature that does not verify")
    code, told = office.explain(*words)
    assert code == 1
    for word in ("report.signature", "another thing", "a signature that does not verify", "192.0.2.1"):
        assert word in told


def test_what_a_sender_wrote_does_not_command_the_owners_terminal(office: Office) -> None:
    """Refusals quote bytes of whoever sent them."""
    office.refuse("session.token", "\x1b[2J\x07\u202e evil")
    for words in ((), ("--json",)):
        told = office.explain(*words)[1]
        assert "evil" in told
        assert not {"\x1b", "\x07", "\u202e"} & set(told)


def test_a_refusal_beside_a_decision_hides_neither(office: Office) -> None:
    """Somebody replays a session that an honest boot has used."""
    office.write(("released", BODY | {"checks": [HOLDS]}))
    office.refuse("session.unused", "other evidence")
    code, told = office.explain()
    assert code == 1
    assert "report.tie" in told
    assert "not believed: release from 192.0.2.1" in told


def test_a_session_of_which_nothing_is_known_is_an_error(office: Office) -> None:
    """Exit code 3: it is a name that does not exist."""
    code, told = office.explain("--json")
    assert code == 3
    assert json.loads(told)["error"]["code"] == "session.unknown"
