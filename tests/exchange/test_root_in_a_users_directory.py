"""An owner types commands as root, and a verifier that was broken into owns the directory in which they work."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.desks import Desk, run

from kagimori_simulator.amd import AmdRoot
from kagimori_verifier.acting import User, acting_as

SERVICE = User(65534, 65534)
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as somebody else")


def _give(path: Path) -> None:
    """Let the service's user own a directory and all in it, as ``chown -R`` does."""
    for one in [path, *path.rglob("*")]:
        os.chown(one, SERVICE.uid, SERVICE.gid, follow_symlinks=False)


@pytest.fixture
def place() -> Iterator[Path]:
    """Give a directory of root's that others can pass: those of pytest are closed to them."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def desk(place: Path, new_desk: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    """Give a verifier that runs as the service's user, whose owner is root; the KEK is root's, elsewhere."""
    shutil.copytree(new_desk, place / "state/main")
    (place / "state/main/kek").rename(place / "kek")
    settings = (place / "state/main/verifier.toml").read_text().replace('"kek"', f'"{place / "kek"}"')
    (place / "state/main/verifier.toml").write_text(settings)
    _give(place / "state")
    return Desk(place / "state/main", capsys)


@pytest.fixture
def certificate(place: Path, cache: Path) -> Path:
    """Give a certificate that only root may read."""
    file = place / "ark.der"
    file.write_bytes(AmdRoot.cached(cache / "amd").ark_der)
    file.chmod(0o600)
    return file


def _kept(desk: Desk) -> Path:
    (file,) = (desk.directory / "endorsements/ca").iterdir()
    return file


def test_an_import_through_a_link_of_the_services_overwrites_nothing_of_roots(
    desk: Desk, place: Path, certificate: Path
) -> None:
    """The directory `ca` leads to one of root's, in which a file has the name that the certificate will get."""
    desk.good("endorsements", "import", certificate)
    (place / "roots").mkdir()
    victim = place / "roots" / _kept(desk).name
    victim.write_bytes(b"what root has there")
    shutil.rmtree(desk.directory / "endorsements/ca")
    (desk.directory / "endorsements/ca").symlink_to(place / "roots")
    assert desk("--json", "endorsements", "import", certificate).error == "endorsements.write"
    assert [path.read_bytes() for path in (place / "roots").iterdir()] == [b"what root has there"]


def test_what_root_imports_under_a_narrow_umask_the_service_can_read(desk: Desk, certificate: Path) -> None:
    """It is the service's, whatever root's shell says."""
    before = os.umask(0o077)
    try:
        desk.good("endorsements", "import", certificate)
    finally:
        os.umask(before)
    with acting_as(SERVICE):
        assert _kept(desk).read_bytes()
    assert desk.good("endorsements", "list")


def test_settings_that_lead_to_a_directory_of_roots_have_nothing_imported_there(
    desk: Desk, place: Path, certificate: Path
) -> None:
    """The service may write verifier.toml, too."""
    (place / "roots").mkdir()
    text = desk.config.read_text().replace('"endorsements"', f'"{place / "roots"}"')
    desk.config.write_text(text)
    assert desk("--json", "endorsements", "import", certificate).error == "endorsements.write"
    assert not list((place / "roots").iterdir())


def test_a_backup_holds_no_file_of_roots_that_the_service_links_to(desk: Desk, place: Path) -> None:
    """It would be the service's to read, who has the key of every backup."""
    (place / "secret").write_bytes(b"root's alone")
    (place / "secret").chmod(0o600)
    (desk.directory / "endorsements/ca").mkdir()
    (desk.directory / "endorsements/ca/x.der").symlink_to(place / "secret")
    done = desk("--json", "backup", place / "backup")
    assert (done.error, done.json["error"]["found"]) == (
        "backup.write",
        f"Permission denied: {desk.directory / 'endorsements/ca/x.der'}",
    )
    assert {path.name for path in place.iterdir()} == {"state", "kek", "secret"}


def test_a_backup_of_endorsements_that_cannot_be_read_is_none(desk: Desk, place: Path) -> None:
    """It was made without them, and nobody was told."""
    (desk.directory / "endorsements/ca").mkdir(mode=0o700)  # root's, from under a narrow umask
    done = desk("--json", "backup", place / "backup")
    assert (done.error, done.json["error"]["found"]) == (
        "backup.write",
        f"Permission denied: {desk.directory / 'endorsements/ca'}",
    )


def test_a_backup_in_the_services_directory_is_the_services(
    desk: Desk, place: Path, certificate: Path
) -> None:
    """Root writes there what the service could have written, and nothing through its links; elsewhere it is root's."""
    desk.good("endorsements", "import", certificate)
    for file, owner in ((place / "state/backup", SERVICE.uid), (place / "backup", 0)):
        desk.good("backup", file)
        assert (file.stat().st_uid, file.stat().st_mode & 0o777) == (owner, 0o600)
        assert [path.name for path in file.parent.glob(".*")] == []


@pytest.mark.parametrize("named", ["backup", "../private/sub/backup", "../../state/backup"])
def test_root_backs_up_and_restores_in_a_directory_that_the_service_cannot_pass(
    desk: Desk, place: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    """Such as its own home, by a name that begins there."""
    (place / "private/sub").mkdir(mode=0o700, parents=True)
    (place / "private").chmod(0o700)
    monkeypatch.chdir(place / "private" if named.startswith("../private") else place / "private/sub")
    config = os.path.relpath(desk.config)
    made = run(desk.capsys, "--config", config, "backup", named)
    assert made.code == 0, made.err
    restored = run(
        desk.capsys, "restore", named, "--kek", place / "kek", "--dir", os.path.relpath(place / "state/again")
    )
    assert restored.code == 0, restored.err
    assert (place / "state/again").stat().st_uid == SERVICE.uid


@pytest.mark.parametrize("waiting", ["new", "copy"])
def test_a_file_that_somebody_has_put_under_the_unfinished_name_is_not_filled(
    desk: Desk, place: Path, waiting: str
) -> None:
    """In a directory in which everybody may write, the backup would be theirs."""
    (place / "all").mkdir()
    (place / "all").chmod(0o1777)
    theirs = place / f"all/.backup.{waiting}"
    theirs.touch()
    os.chown(theirs, SERVICE.uid, SERVICE.gid)
    done = desk("--json", "backup", place / "all/backup")
    if waiting == "new":
        assert done.error == "backup.write"
        assert theirs.stat().st_size == 0
    else:
        assert done.code == 0  # root may take away what is in the way
        assert (place / "all/backup").stat().st_uid == 0


def test_what_root_restores_into_the_services_directory_is_the_services(desk: Desk, place: Path) -> None:
    """All of it, so that the service can start; and nothing was made there by root's rights."""
    desk.good("backup", place / "backup")
    words = ("restore", place / "backup", "--kek", place / "kek", "--dir", place / "state/again")
    assert desk("--json", *words).code == 0
    made = [place / "state/again", *(place / "state/again").rglob("*")]
    assert {path.stat().st_uid for path in made} == {SERVICE.uid}
    assert (place / "state/again/verifier.db") in made


def test_the_copy_of_an_upgrade_is_made_by_the_rights_of_its_directorys_owner(desk: Desk) -> None:
    """SQLite opens it a second time, by its name."""
    store = desk.store()
    store.snapshot(desk.directory / "copy")
    store.close()
    assert (desk.directory / "copy").stat().st_uid == SERVICE.uid


def test_root_has_its_rights_again_afterwards() -> None:
    """Also after an error, and one inside another counts by itself."""
    before = os.geteuid(), os.getegid(), os.getgroups()

    def fail() -> None:
        with acting_as(SERVICE):
            with acting_as(User(0, 0)):
                assert (os.geteuid(), os.getegid()) == (0, 0)
            assert (os.geteuid(), os.getegid(), os.getgroups()) == (SERVICE.uid, SERVICE.gid, [SERVICE.gid])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (os.geteuid(), os.getegid(), os.getgroups()) == before


def test_a_root_that_may_not_become_another_user_does_nothing_in_their_directory(
    desk: Desk, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container without the capability: it says so, and does not go on as root."""

    def refuse(_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "setgroups", refuse)
    assert desk("--json", "endorsements", "import", certificate).error == "acting.user"
    assert not list((desk.directory / "endorsements").iterdir())
