"""kill -9 `volume reseal` at every step, with a host that shows another header to the next run: no epoch is given twice."""

from __future__ import annotations

import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.faults import invariants
from tests.faults.test_owner_killed import PASSPHRASE, Desk, Disk, furnished, points
from tests.unit.luks.headers import reader

from kagimori_protocol import luks2_guard
from kagimori_protocol.errors import DiskError
from kagimori_simulator import disk
from kagimori_verifier.keystore.kek import FileKek
from kagimori_verifier.keystore.unlock_keys import UnlockKeys
from kagimori_verifier.store import vms

__all__ = ["furnished"]

pytestmark = pytest.mark.slow  # a process per point

AREA = 16 << 20
PARTS = 3


@dataclass
class Sealed:
    """A desk whose one volume is enrolled, and the words that seal it anew."""

    disk: Disk

    @classmethod
    def copied(cls, template: Path, to: Path, furnished: Desk) -> Sealed:
        """Copy a desk with its image."""
        desk = Desk(furnished.launcher, Path(shutil.copytree(template, to)))
        return cls(Disk(desk, desk.directory / "disk.img", ()))

    def row(self) -> vms.VolumeRow:
        """Give the volume."""
        store = self.disk.desk.store()
        with store.read() as txn:
            (row,) = vms.volumes(txn, "web1")
        store.close()
        return row

    def words(self) -> tuple[str, ...]:
        """Give the verb."""
        return ("volume", "reseal", "--vm", "web1", "--uuid", self.row().uuid, "--device", "disk.img")

    def epoch_of(self, raw: bytes, least: int = 1) -> int:
        """Give the epoch of a header that an agent would open by, which has to be ``least``."""
        row = self.row()
        kek = FileKek(self.disk.desk.directory / "kek").read()
        key = UnlockKeys(kek).unwrap(row.wrapped, "web1", row.uuid, row.version)
        size = self.disk.image.stat().st_size
        return luks2_guard.choose(reader(raw), size, row.uuid, key, least).epoch

    def area(self) -> bytes:
        """Take a snapshot of header and keyslots, as any host can."""
        with self.disk.image.open("rb") as file:
            return file.read(AREA)

    def put_back(self, snapshot: bytes) -> None:
        """Show a header of before."""
        with self.disk.image.open("r+b") as file:
            file.write(snapshot)


@pytest.fixture(scope="session")
def added(furnished: Desk, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Give a desk with an enrolled volume, to be copied, and the points that a seal passes."""
    directory = tmp_path_factory.mktemp("sealed")
    disk.make_volume(directory / "disk.img", PASSPHRASE)
    desk = Desk(furnished.launcher, Path(shutil.copytree(furnished.directory, directory / "desk")))
    desk.good(*Disk.beside(desk, directory / "disk.img").words)
    whole = Sealed.copied(desk.directory, directory / "whole", furnished)
    assert whole.disk.desk.run(*whole.words(), record=directory / "record").code == 0
    assert (whole.row().header_epoch, whole.epoch_of(whole.area())) == (2, 2)
    return desk.directory, points(directory / "record")


@pytest.mark.parametrize("part", range(PARTS))
def test_a_host_that_hides_the_header_of_a_killed_reseal_cannot_show_it_after_the_next(
    furnished: Desk, added: tuple[Path, list[str]], part: int, tmp_path: Path
) -> None:
    """Two headers of one epoch would both be taken, and the host would choose; the volume opens at every moment."""
    template, all_points = added
    done: list[bool] = []
    for number, point in list(enumerate(all_points))[part::PARTS]:
        sealed = Sealed.copied(template, tmp_path / str(number), furnished)
        before = sealed.area()
        assert sealed.disk.desk.run(*sealed.words(), at=point).code == -signal.SIGKILL, point
        invariants.the_ledger_holds(furnished.launcher, sealed.disk.desk.directory)
        assert sealed.disk.states() == ["active"], point
        left = sealed.area()
        sealed.epoch_of(left, sealed.row().header_epoch)  # opens
        done.append(sealed.row().header_epoch > 1)
        if done[-1]:
            sealed.put_back(before)
            assert sealed.disk.desk.run(*sealed.words()).json["error"]["code"] == "volume.epoch", point
            sealed.put_back(left)
        else:
            sealed.put_back(before)
        sealed.disk.desk.good(*sealed.words())
        epoch = sealed.row().header_epoch
        assert sealed.epoch_of(sealed.area(), epoch) == epoch, point
        with pytest.raises(DiskError) as caught:
            sealed.epoch_of(left, epoch)
        assert caught.value.code == "luks.epoch", point
        sealed.disk.image.unlink()
    assert done == sorted(done)
    assert False in done
