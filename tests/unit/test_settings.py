"""verifier.toml: strict, and every error names the key and what it may be."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagimori_protocol.errors import OperatorError
from kagimori_verifier import settings
from kagimori_verifier.keystore.kek import CredentialKek, FileKek
from kagimori_verifier.settings import Settings

LEAST = 'public_urls = ["http://keys.example:8117"]\n'


def loaded(directory: Path, text: str | bytes) -> Settings:
    """Load these settings."""
    path = directory / "verifier.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return settings.load(path)


def refused(directory: Path, text: str | bytes) -> OperatorError:
    """Load settings that must not be taken."""
    with pytest.raises(OperatorError) as caught:
        loaded(directory, text)
    assert "verifier.toml" in caught.value.what
    return caught.value


def test_what_init_writes_is_what_load_reads(tmp_path: Path) -> None:
    """The template spells out the defaults."""
    written = loaded(tmp_path, settings.default_text("http://keys.example:8117", "127.0.0.1:8117"))
    assert written == loaded(tmp_path, LEAST)


def test_relative_paths_are_relative_to_the_file_and_not_to_where_one_stands(tmp_path: Path) -> None:
    """A verb gives the same result from any directory."""
    found = loaded(tmp_path, LEAST)
    assert found.directory == tmp_path.resolve()
    assert found.path("kek") == tmp_path.resolve() / "kek"
    assert found.path("/etc/kek") == Path("/etc/kek")
    assert found.database_url == f"sqlite:///{tmp_path.resolve()}/verifier.db"


def test_an_absolute_database_stays_where_it_is(tmp_path: Path) -> None:
    """Four slashes, as SQLAlchemy has it."""
    assert (
        loaded(tmp_path, 'database = "sqlite:////srv/k.db"\n' + LEAST).database_url == "sqlite:////srv/k.db"
    )


@pytest.mark.parametrize("name", ["100%41", "what?", "a#b", "sp ace", "uni-鍵"])
def test_a_directory_of_any_name_holds_a_database(tmp_path: Path, name: str) -> None:
    """In a URL some characters mean something; in a directory's name they do not."""
    from sqlalchemy.engine import make_url

    (tmp_path / name).mkdir()
    found = loaded(tmp_path / name, LEAST)
    assert make_url(found.database_url).database == str((tmp_path / name).resolve() / "verifier.db")


def test_host_and_port_are_read_from_listen(tmp_path: Path) -> None:
    """Names, IPv4 and bracketed IPv6."""
    for listen, host, port in (
        ("keys.example:443", "keys.example", 443),
        ("0.0.0.0:0", "0.0.0.0", 0),  # noqa: S104 - read, never bound
        ("[::1]:8117", "::1", 8117),
    ):
        found = loaded(tmp_path, f'listen = "{listen}"\n{LEAST}')
        assert (found.host, found.port) == (host, port)


def test_the_provider_of_the_kek_is_chosen_by_name(tmp_path: Path) -> None:
    """A file by default, a systemd credential on demand."""
    assert isinstance(loaded(tmp_path, LEAST).kek_provider(), FileKek)
    credential = loaded(tmp_path, LEAST + '[kek]\nprovider = "credential"\nname = "kek"\n')
    assert isinstance(credential.kek_provider(), CredentialKek)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        pytest.param("", "public_urls", id="nothing at all"),
        pytest.param("public_urls = []", "public_urls", id="no URL"),
        pytest.param('public_urls = ["ftp://x"]', "public_urls", id="a URL that no agent takes"),
        pytest.param('public_urls = ["http://a\\"b"]\nurl = 1', "url", id="an unknown key"),
        pytest.param('public_urls = "http://x"', "public_urls", id="a text instead of a list"),
        pytest.param(LEAST + "[limits]\nsession_s = 29", "limits.session_s", id="a session too short"),
        pytest.param(LEAST + "[limits]\nsession_s = 3601", "limits.session_s", id="a session too long"),
        pytest.param(LEAST + '[limits]\nsession_s = "300"', "limits.session_s", id="a number in quotes"),
        pytest.param(
            LEAST + "[limits]\nconcurrent_requests = 0", "limits.concurrent", id="no request at all"
        ),
        pytest.param(LEAST + "[limits]\nwhatever = 1", "whatever", id="an unknown limit"),
        pytest.param(LEAST + '[kek]\nprovider = "none"', "kek.provider", id="an unknown provider"),
        pytest.param(LEAST + '[kek]\npath = ""', "kek.path", id="an empty path"),
        pytest.param(LEAST + '[kek]\npath = "a\\u0000b"', "kek.path", id="a zero byte in a path"),
        pytest.param(LEAST + '[kek]\nname = "../../etc/shadow"', "kek.name", id="a credential elsewhere"),
        pytest.param(LEAST + '[tls]\ncertificate = "c.pem"', "key", id="half of TLS"),
        pytest.param('listen = "8117"\n' + LEAST, "listen", id="a port without an address"),
        pytest.param('listen = "::1:8117"\n' + LEAST, "listen", id="IPv6 without brackets"),
        pytest.param('listen = "a:8117\\n"\n' + LEAST, "listen", id="a line break"),
        pytest.param('listen = "a:70000"\n' + LEAST, "70000", id="a port that is none"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, text: str, named: str) -> None:
    """The error tells which key, so that nobody has to guess."""
    error = refused(tmp_path, text)
    assert error.code == "settings.key"
    assert named in (error.found or "")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"\xff\xfe", id="no UTF-8"),
        pytest.param("a = ", id="no TOML"),
        pytest.param("a = " + "[" * 5000, id="lists in lists"),
        pytest.param("a = " + "1" * 5000, id="a number without end"),
        pytest.param(LEAST + "#" * (64 << 10), id="too large"),
    ],
)
def test_what_is_no_toml_is_called_so(tmp_path: Path, text: str | bytes) -> None:
    """One error, never a stray one out of the parser."""
    assert refused(tmp_path, text).code == "settings.toml"


@given(text=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_garbage_is_an_operators_error_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, text: bytes
) -> None:
    """Whatever stands in the file."""
    path = tmp_path_factory.getbasetemp() / "verifier.toml"
    path.write_bytes(text)
    with pytest.raises(OperatorError):
        settings.load(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Not there, or a directory."""
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(OperatorError) as caught:
            settings.load(path)
        assert caught.value.code == "settings.read"
        assert str(path) in caught.value.what


@pytest.mark.parametrize("parts", [1900, 30_000])
def test_a_key_of_thousands_of_parts_is_refused_at_once(tmp_path: Path, parts: int) -> None:
    """Reading it takes time with the square of its parts: half a minute for a file that is just small enough."""
    started = time.process_time()
    refused(tmp_path, "a." * parts + "b = 1")
    assert time.process_time() - started < 3
