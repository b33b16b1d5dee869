"""The command ``unlock`` leaves a capped boot behind, whatever ends it, and whenever."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kagimori_agent import cap as cap_module
from kagimori_agent import cli, memory, signals
from kagimori_agent import unlock as unlock_module
from kagimori_protocol.errors import ImageError, NetworkError

AGENT_TOML = """\
vm_id = "web1"
[[verifiers]]
name = "home"
urls = ["http://127.0.0.1:1"]
keys = ["11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="]
[tpm]
cap_pcr = 14
"""


@pytest.fixture
def caps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note the PCR of each cap in place of making it."""
    made: list[int] = []

    def cap(pcr: int = 15, **_: object) -> list[object]:
        made.append(pcr)
        return []

    monkeypatch.setattr(cap_module, "cap", cap)
    monkeypatch.setattr(unlock_module, "cap", cap)
    monkeypatch.setattr(memory, "forbid_core_dumps", lambda: None)
    monkeypatch.setattr(memory, "lock_memory", lambda: True)
    return made


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """Give an agent.toml."""
    path = tmp_path / "agent.toml"
    path.write_text(AGENT_TOML)
    return path


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Hold that a command leaves the process's signals as they were."""
    before = [signal.getsignal(number) for number in signals.ENDING]
    yield
    assert [signal.getsignal(number) for number in signals.ENDING] == before


def _unlock(toml: Path) -> int:
    return cli.main(["unlock", "--config", str(toml)])


def _instead(monkeypatch: pytest.MonkeyPatch, do: Callable[[], object]) -> None:
    monkeypatch.setattr(unlock_module, "_get_and_open", lambda *_, **__: do())


def test_memory_that_cannot_be_protected_ends_in_a_capped_boot(
    caps: list[int], toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That comes before anything is asked for, and the boot goes on or gives up all the same."""

    def fail() -> None:
        raise ImageError("Core dumps cannot be forbidden.")

    monkeypatch.setattr(memory, "forbid_core_dumps", fail)
    assert _unlock(toml) == ImageError.exit_code
    assert caps == [14]


def test_a_broken_agent_toml_ends_in_a_capped_boot(caps: list[int], toml: Path) -> None:
    """Then by the PCR that a cap takes without being told."""
    toml.write_text("vm_id = 1")
    assert _unlock(toml) == ImageError.exit_code
    assert caps == [15]


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, SystemExit, RuntimeError])
def test_what_nobody_foresaw_ends_in_a_capped_boot(
    caps: list[int], toml: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """Before the configuration is read, where the unlock's own cap cannot be reached."""

    def load(_: Path) -> object:
        raise error

    monkeypatch.setattr("kagimori_agent.config.load", load)
    if error is KeyboardInterrupt:
        assert _unlock(toml) == cli.INTERRUPTED
    else:
        with pytest.raises(error):
            _unlock(toml)
    assert caps == [15]


@pytest.mark.parametrize("number", signals.ENDING)
def test_a_signal_while_the_verifier_is_waited_for_ends_in_a_capped_boot(
    caps: list[int], toml: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """An init system that loses patience sends SIGTERM; Python alone would end without another word."""
    _instead(monkeypatch, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as caught:
        _unlock(toml)
    assert caught.value.code == 128 + number
    assert set(caps) == {14}


def test_a_signal_in_the_middle_of_the_cap_does_not_keep_it_off(
    toml: Path, caps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has the console presses ctrl-c again and again; the cap is made anew, and undisturbed."""
    finished: list[int] = []

    def cap(pcr: int = 15, **_: object) -> list[object]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        finished.append(pcr)
        return []

    monkeypatch.setattr(cap_module, "cap", cap)
    monkeypatch.setattr(unlock_module, "cap", cap)

    def away() -> None:
        raise NetworkError("Nobody answers.")

    _instead(monkeypatch, away)
    with pytest.raises(SystemExit) as caught:
        _unlock(toml)
    assert caught.value.code == cli.INTERRUPTED
    assert finished == [14]


def test_not_even_the_first_signal_keeps_the_last_cap_off(
    toml: Path, caps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unlock's own cap was in vain; the one after it is made whole, whoever is told to end meanwhile."""
    finished: list[int] = []

    def cap(pcr: int = 15, **_: object) -> list[object]:
        os.kill(os.getpid(), signal.SIGTERM)
        finished.append(pcr)
        return []

    monkeypatch.setattr(cap_module, "cap", cap)

    def away() -> None:
        raise NetworkError("Nobody answers.")

    _instead(monkeypatch, away)
    assert _unlock(toml) == NetworkError.exit_code
    assert finished == [14]


def test_a_cap_that_fails_is_what_is_told(
    toml: Path, caps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever called must power off then, whatever else went wrong."""

    def cap(*_: object, **__: object) -> list[object]:
        raise ImageError("No TPM has this driver.", code="tpm.no-driver")

    monkeypatch.setattr(cap_module, "cap", cap)
    monkeypatch.setattr(unlock_module, "cap", cap)

    def away() -> None:
        raise NetworkError("Nobody answers.")

    _instead(monkeypatch, away)
    assert _unlock(toml) == ImageError.exit_code
