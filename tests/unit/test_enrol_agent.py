"""What the agent does around an enrolment's exchange: whom it believes, what it writes down, what a person hands over."""

from __future__ import annotations

import argparse
import os
from base64 import b64encode
from pathlib import Path

import pytest

from kagimori_agent import config, enrol, enrol_cli, enrol_volumes
from kagimori_agent.config import Config, Volume
from kagimori_protocol.enrol_code import EnrolCode, fingerprint
from kagimori_protocol.errors import DiskError, ImageError, OperatorError, UsageError

OURS, THEIRS, NEXT = (bytes([number]) * 32 for number in (7, 8, 9))
UUID = "0b3a6a7c-5c1b-4f5e-9d0e-0f4f8f6f2a11"
OTHER = "1b3a6a7c-5c1b-4f5e-9d0e-0f4f8f6f2a11"


def toml(path: Path, more: str = "") -> Path:
    """Write an agent.toml of two verifiers."""
    path.write_text(
        "# words of its owner\n"
        'vm_id = "web1"\n'
        f'[[verifiers]]\nname = "away"\nurls = ["http://a"]\nkeys = ["{b64encode(THEIRS).decode()}"]\n'
        f'[[verifiers]]\nname = "home"\nurls = ["http://b"]\n'
        f'keys = ["{b64encode(NEXT).decode()}", "{b64encode(OURS).decode()}"]\n' + more
    )
    return path


@pytest.fixture
def loaded(tmp_path: Path) -> Config:
    """Give it as the agent reads it."""
    return config.load(toml(tmp_path / "agent.toml"))


def code(key: bytes) -> EnrolCode:
    """Make a code of the verifier with this key."""
    return EnrolCode(bytes(16), fingerprint(key))


def test_one_verifier_is_asked_and_one_key_is_believed(loaded: Config) -> None:
    """The one that the code names; agent.toml's other keys may be the host's."""
    volume = Volume(uuid=UUID, name="root")
    asking = enrol.narrowed(loaded, code(OURS), [volume])
    assert [(one.name, one.keys) for one in asking.verifiers] == [("home", [OURS])]
    assert asking.volumes == [volume]
    with pytest.raises(OperatorError) as caught:
        enrol.narrowed(loaded, code(bytes(32)), [volume])
    assert caught.value.code == "enrol.verifier"


def test_volumes_are_written_into_agent_toml_once_and_nothing_else_changes(
    tmp_path: Path, loaded: Config
) -> None:
    """Comments stay, and so does the file's mode."""
    path = tmp_path / "agent.toml"
    path.chmod(0o640)
    before = path.read_text()
    volumes = [Volume(uuid=UUID, name="root"), Volume(uuid=OTHER, name="data", device=Path("/dev/vdb"))]
    assert enrol_volumes.add_to_config(path, loaded, volumes) == volumes
    assert path.read_text().startswith(before)
    assert path.stat().st_mode & 0o777 == 0o640
    again = config.load(path)
    assert again.volumes == volumes
    assert enrol_volumes.add_to_config(path, again, volumes) == []
    assert [one.name for one in tmp_path.iterdir()] == ["agent.toml"]


def test_an_agent_toml_that_would_make_no_sense_is_left_alone(tmp_path: Path, loaded: Config) -> None:
    """Two volumes of one name: the file stays as it was, and nothing is left beside it."""
    path = tmp_path / "agent.toml"
    before = path.read_bytes()
    with pytest.raises(ImageError):
        enrol_volumes.add_to_config(
            path, loaded, [Volume(uuid=UUID, name="root"), Volume(uuid=OTHER, name="root")]
        )
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["agent.toml"]
    with pytest.raises(OperatorError) as caught:
        enrol_volumes.add_to_config(
            tmp_path / "absent" / "agent.toml", loaded, [Volume(uuid=UUID, name="root")]
        )
    assert caught.value.code == "enrol.config"


def test_a_volume_is_called_as_its_mapping_is_now(tmp_path: Path) -> None:
    """What fstab and the kernel command line say stays true; what is not mapped gets systemd's name."""
    for number, (name, uuid) in enumerate({"vda3_crypt": UUID, "other": OTHER}.items()):
        dm = tmp_path / f"sys/class/block/dm-{number}/dm"
        dm.mkdir(parents=True)
        (dm / "uuid").write_text(f"CRYPT-LUKS2-{uuid.replace('-', '')}-{name}\n")
    assert enrol_volumes.mapped_name(UUID, tmp_path) == "vda3_crypt"
    assert enrol_volumes.mapped_name(UUID[:-1] + "2", tmp_path) is None


def test_nothing_that_is_no_luks2_volume_is_enrolled_and_nothing_is_formatted(
    tmp_path: Path, loaded: Config
) -> None:
    """T3: an empty disk is not an invitation."""
    empty = tmp_path / "empty"
    empty.write_bytes(bytes(1 << 20))
    with pytest.raises(DiskError) as caught:
        enrol_volumes.chosen(loaded, [empty], [])
    assert caught.value.code == "enrol.luks2"
    assert not any(empty.read_bytes())
    with pytest.raises(UsageError) as none:
        enrol_volumes.chosen(loaded, [], [])
    assert none.value.code == "enrol.volumes"


def secrets(**options: object) -> enrol_cli.Secrets:
    """Hand over secrets as options say."""
    absent = dict.fromkeys(("code_fd", "passphrase_fd", "key_file"))
    return enrol_cli.Secrets(argparse.Namespace(**(absent | options)))


def pipe(content: bytes) -> int:
    """Give a descriptor to read from."""
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    return reader


VOLUMES = [(Volume(uuid=f"{UUID[:-1]}{n}", name=f"v{n}"), Path(f"/dev/vd{n}")) for n in range(3)]


def test_passphrases_come_a_line_each_and_the_last_counts_for_the_rest() -> None:
    """With or without a line break at the end; each is read once."""
    for content in (b"first\nsecond\n", b"first\nsecond"):
        given = secrets(passphrase_fd=pipe(content))
        assert [given.passphrase(*one) for one in VOLUMES] == [b"first", b"second", b"second"]
        assert given.passphrase(*VOLUMES[0]) == b"first"


def test_a_key_file_is_taken_whole(tmp_path: Path) -> None:
    """Line breaks in it are part of the key."""
    path = tmp_path / "key"
    path.write_bytes(b"a\nkey\n")
    assert secrets(key_file=path).passphrase(*VOLUMES[0]) == b"a\nkey\n"


@pytest.mark.parametrize("given", ["nothing", "absent", "closed", "long"])
def test_a_secret_that_cannot_be_taken_is_said_so(tmp_path: Path, given: str) -> None:
    """Never a traceback, and never an empty passphrase."""
    options: dict[str, dict[str, object]] = {
        "nothing": {"passphrase_fd": pipe(b"")},
        "absent": {"key_file": tmp_path / "absent"},
        "closed": {"passphrase_fd": 1000},
        "long": {"code_fd": pipe(b"0" * 2000)},
    }
    one = secrets(**options[given])
    with pytest.raises(UsageError) as caught:
        one.code() if given == "long" else one.passphrase(*VOLUMES[0])
    assert caught.value.code == "enrol.secret"
