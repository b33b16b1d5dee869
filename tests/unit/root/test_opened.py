"""The record of what the agent has opened counts with agent.toml and the kernel, and never alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.root.sysfs import UUID, Kernel

from kagimori_agent import luks, opened, unlock
from kagimori_agent.config import Config
from kagimori_protocol.errors import DiskError, ImageError
from kagimori_protocol.messages import Keys, VolumeKey


def record(kernel: Kernel) -> Path:
    """Give the record's path."""
    return kernel.root / opened.RECORD


def test_a_mapping_that_the_agent_made_is_remembered(honest: Kernel, config: Config) -> None:
    """Under its number, for root alone."""
    assert opened.recorded(config.volumes, honest.root) == {
        honest.number("dm-0"): opened.Mapping(UUID, "cryptroot", honest.number("dm-0"))
    }
    assert record(honest).stat().st_mode & 0o777 == 0o600


def test_a_boot_begins_with_nothing_opened(honest: Kernel, config: Config) -> None:
    """Whatever a record says before the agent has opened anything."""
    opened.begin(honest.root)
    assert opened.recorded(config.volumes, honest.root) == {}
    opened.begin(honest.root)


def test_a_mapping_that_is_not_there_is_not_remembered(kernel: Kernel, config: Config) -> None:
    """Nor is one of another name."""
    kernel.opened("dm-0", kernel.disk("vda"), mapping="other")
    with pytest.raises(DiskError) as caught:
        opened.remember(config.volumes[0], kernel.root)
    assert caught.value.code == "opened.none"


def test_where_nothing_can_be_written_the_boot_ends(honest: Kernel, config: Config) -> None:
    """A volume without a record would be refused later, without the reason."""
    record(honest).unlink()
    record(honest).mkdir()
    for write in (lambda: opened.begin(honest.root), lambda: opened.remember(config.volumes[0], honest.root)):
        with pytest.raises(ImageError) as caught:
            write()
        assert caught.value.code == "opened.write"


def anybody_may_write(kernel: Kernel) -> None:
    """A record that is not root's alone."""
    record(kernel).chmod(0o666)


def another_volume(kernel: Kernel) -> None:
    """A volume that agent.toml does not name."""
    kernel.opened("dm-1", kernel.disk("vdb"), "evil", "11111111-2222-3333-4444-555555555555")
    with record(kernel).open("a") as file:
        file.write(f"11111111-2222-3333-4444-555555555555 evil {kernel.number('dm-1')}\n")


def another_number(kernel: Kernel) -> None:
    """The mapping went away, and a plain disk has its number."""
    record(kernel).write_text(f"{UUID} cryptroot {kernel.number('vda')}\n")


def made_anew(kernel: Kernel) -> None:
    """Somebody made another mapping of that name."""
    (kernel.root / "sys/class/block/dm-0/dm/uuid").write_text("CRYPT-PLAIN-cryptroot\n")


def no_lines(kernel: Kernel) -> None:
    """Words of nobody's."""
    record(kernel).write_text("cryptroot\n")


def no_text(kernel: Kernel) -> None:
    """Bytes that are no ASCII."""
    record(kernel).write_bytes(b"\xff")


@pytest.mark.parametrize(
    "changed",
    [anybody_may_write, another_volume, another_number, made_anew, no_lines, no_text],
    ids=lambda changed: changed.__name__,
)
def test_a_record_that_does_not_hold_is_refused(
    changed: Callable[[Kernel], None], honest: Kernel, config: Config
) -> None:
    """The function's own words say what is wrong with it."""
    changed(honest)
    with pytest.raises(DiskError) as caught:
        opened.recorded(config.volumes, honest.root)
    assert caught.value.code == "opened.record"


def test_the_unlock_records_what_it_maps_and_nothing_that_it_only_proves(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is opened, the record of whoever came before is gone."""
    calls: list[str] = []

    def open_volume(*_: object, **__: object) -> str:
        calls.append("open")
        return "mapped"

    monkeypatch.setattr(luks, "open_volume", open_volume)
    monkeypatch.setattr(opened, "begin", lambda: calls.append("begin"))
    monkeypatch.setattr(opened, "remember", lambda volume: calls.append(volume.name))
    key = VolumeKey(uuid=UUID, unlock_key=bytes(32), header_epoch=0)
    keys = Keys(confirm_key=bytes(32), volumes=[key])
    list(unlock._open(config, keys, calls.append, prove=False))
    assert calls == ["begin", "open", "cryptroot", "cryptroot: mapped"]
    calls.clear()
    list(unlock._open(config, keys, lambda _: None, prove=True))
    assert calls == ["open"]
