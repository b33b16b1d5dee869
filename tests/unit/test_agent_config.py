"""agent.toml and the kernel command line: what is not exactly understood is refused."""

from __future__ import annotations

import base64
import contextlib
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from kagimori_agent import VERSION
from kagimori_agent.config import MAX_BYTES, SMALL_ORDER, Config, Limits, Tpm, load
from kagimori_protocol.errors import ImageError

ROOT = Path(__file__).parent.parent.parent
KEY = base64.b64encode(bytes(range(32))).decode()
OTHER_KEY = base64.b64encode(bytes(range(1, 33))).decode()
UUID = "6f1c1a58-8a52-4b7e-9c8c-0d6f3c7f2a11"
OTHER_UUID = "00000000-8a52-4b7e-9c8c-0d6f3c7f2a11"

HEAD = 'vm_id = "web1"\n'
VERIFIER = f'[[verifiers]]\nname = "home"\nurls = ["https://kagi.example:8443"]\nkeys = ["{KEY}"]\n'
VOLUME = f'[[volumes]]\nuuid = "{UUID}"\nname = "cryptroot"\n'


def _verifier(name: str = "home", urls: str = '"http://kagi.example"', keys: str = f'"{KEY}"') -> str:
    return f'[[verifiers]]\nname = "{name}"\nurls = [{urls}]\nkeys = [{keys}]\n'


def _volume(uuid: str = UUID, name: str = "cryptroot", more: str = "") -> str:
    return f'[[volumes]]\nuuid = "{uuid}"\nname = "{name}"\n{more}\n'


def _static(address: str = "10.0.0.2/24", more: str = "") -> str:
    return f'[network]\nmethod = "static"\naddress = "{address}"\n{more}'


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Config]:
    """Give a function that writes an agent.toml and loads it."""

    def write_and_load(text: str) -> Config:
        path = tmp_path / "agent.toml"
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        return load(path)

    return write_and_load


def test_the_version_in_the_code_is_that_of_the_package() -> None:
    """The constant spares a boot the search through package metadata, and must not drift from it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION


def test_a_small_file_is_enough_and_everything_else_has_a_default(written: Callable[[str], Config]) -> None:
    """A name, a verifier and a volume are all that an ordinary VM must say."""
    config = written(HEAD + VERIFIER + VOLUME)
    assert config.vm_id == "web1"
    assert config.kind == "svsm-vtpm"
    assert config.verifiers[0].urls == ["https://kagi.example:8443"]
    assert config.verifiers[0].keys == [bytes(range(32))]
    assert config.verifiers[0].ca_file is None
    assert (config.volumes[0].uuid, config.volumes[0].name, config.volumes[0].device) == (
        UUID,
        "cryptroot",
        None,
    )
    assert config.tpm == Tpm()
    assert config.tsm.root == Path("/sys/kernel/config/tsm")
    assert config.limits == Limits()


def test_a_full_file_is_read_as_written(written: Callable[[str], Config]) -> None:
    """Every key that the format has reaches the field of its name."""
    config = written(
        'vm_id = "web1"\nkind = "snp-direct"\n'
        + _verifier("a", '"http://10.0.0.1:8117/kagi/", "https://[fd00::1]"', f'"{KEY}", "{OTHER_KEY}"')
        + 'ca_file = "/etc/kagimori/ca.pem"\n'
        + _volume(more='device = "/dev/vda3"')
        + '[tpm]\ntcti = "swtpm:path=/run/x"\nevent_log = "/run/log"\ncap_pcr = 14\n'
        + '[tsm]\nroot = "/run/tsm"\n'
        + "[limits]\nboot_budget_s = 20\nattempt_s = 2.5\nconnect_s = 1\ngather_s = 0\ncryptsetup_s = 30\n"
    )
    assert config.kind == "snp-direct"
    assert config.verifiers[0].ca_file == Path("/etc/kagimori/ca.pem")
    assert config.volumes[0].device == Path("/dev/vda3")
    assert (config.tpm.tcti, config.tpm.event_log) == ("swtpm:path=/run/x", Path("/run/log"))
    assert (config.limits.attempt_s, config.limits.gather_s) == (2.5, 0)


def test_a_boot_that_fails_ends_in_power_off_unless_the_owner_says_otherwise(
    written: Callable[[str], Config],
) -> None:
    """Nobody finds a shell on a console that is the host's because a line was forgotten."""
    assert written(HEAD + VERIFIER).boot.on_failure == "poweroff"
    assert written(HEAD + VERIFIER + '[boot]\non_failure = "shell"\n').boot.on_failure == "shell"


def test_a_static_network_is_read_as_written(written: Callable[[str], Config]) -> None:
    """Addresses of both families are taken; without any, DHCP is meant."""
    assert written(HEAD + VERIFIER).network.method == "dhcp"
    more = 'gateway = "fd00::1"\ndns = ["10.0.0.3", "fd00::53"]\ninterface = "ens3"\n'
    network = written(HEAD + VERIFIER + _static("fd00::2/64", more)).network
    assert (network.address, network.gateway, network.interface) == ("fd00::2/64", "fd00::1", "ens3")
    assert network.dns == ["10.0.0.3", "fd00::53"]


def test_a_file_without_volumes_is_good_for_a_dry_run(written: Callable[[str], Config]) -> None:
    """What may be done without volumes is the caller's question, not the file's."""
    assert written(HEAD + VERIFIER).volumes == []


@pytest.mark.parametrize(
    ("text", "key", "allowed"),
    [
        (HEAD + 'colour = "red"\n' + VERIFIER, "colour", "vm_id"),
        (HEAD + VERIFIER + "insecure = true\n", "verifiers.insecure", "verifiers.ca_file"),
        (HEAD + VERIFIER + VOLUME + 'keyfile = "/k"\n', "volumes.keyfile", "volumes.device"),
        (HEAD + VERIFIER + "[tpm]\nindex = 0\n", "tpm.index", "tpm.driver"),
        (HEAD + VERIFIER + "[tsm]\npath = 0\n", "tsm.path", "tsm.root"),
        (HEAD + VERIFIER + "[limits]\nboot_budget = 0\n", "limits.boot_budget", "limits.boot_budget_s"),
        (HEAD + VERIFIER + '[boot]\non_error = "shell"\n', "boot.on_error", "boot.on_failure"),
        (HEAD + VERIFIER + '[network]\nmode = "dhcp"\n', "network.mode", "network.method"),
    ],
)
def test_an_unknown_key_is_named_together_with_those_that_exist(
    written: Callable[[str], Config], text: str, key: str, allowed: str
) -> None:
    """A misspelt limit must not silently mean its default."""
    with pytest.raises(ImageError) as caught:
        written(text)
    assert caught.value.code == "config.unknown-key"
    assert key in str(caught.value.found)
    assert allowed in str(caught.value.expected)
    assert caught.value.todo


WRONG = {
    "no vm_id": VERIFIER,
    "an empty file": "",
    "no verifier": HEAD,
    "an empty list of verifiers": HEAD + "verifiers = []\n",
    "verifiers that are no tables": HEAD + 'verifiers = ["home"]\n',
    "a table where a list belongs": HEAD + '[verifiers]\nname = "home"\n',
    "a vm_id with a slash": 'vm_id = "web/1"\n' + VERIFIER,
    "a vm_id in capitals": 'vm_id = "Web1"\n' + VERIFIER,
    "a vm_id that ends in a line break": 'vm_id = "web1\\n"\n' + VERIFIER,
    "an unknown kind": 'vm_id = "web1"\nkind = "tdx"\n' + VERIFIER,
    "nine verifiers": HEAD
    + "".join(
        _verifier(f"v{n}", f'"http://h{n}"', f'"{base64.b64encode(bytes([n + 2]) * 32).decode()}"')
        for n in range(9)
    ),
    "a verifier without keys": HEAD + _verifier(keys=""),
    "a verifier without urls": HEAD + _verifier(urls=""),
    "five keys": HEAD
    + _verifier(keys=", ".join(f'"{base64.b64encode(bytes([n + 2]) * 32).decode()}"' for n in range(5))),
    "five urls": HEAD + _verifier(urls=", ".join(f'"http://h{n}"' for n in range(5))),
    "a key of 31 bytes": HEAD + _verifier(keys=f'"{base64.b64encode(bytes(31)).decode()}"'),
    "a key of 33 bytes": HEAD + _verifier(keys=f'"{base64.b64encode(bytes(33)).decode()}"'),
    "a key that is no base64": HEAD + _verifier(keys=f'"!{KEY[1:]}"'),
    "a key without padding": HEAD + _verifier(keys=f'"{KEY.rstrip("=")}"'),
    "a key whose last character has spare bits": HEAD + _verifier(keys=f'"{OTHER_KEY[:-2]}B="'),
    "the same key twice": HEAD + _verifier(keys=f'"{KEY}", "{KEY}"'),
    "one key for two verifiers": HEAD + _verifier("a", '"http://a"') + _verifier("b", '"http://b"'),
    "one name for two verifiers": HEAD + _verifier("a") + _verifier("a", '"http://b"', f'"{OTHER_KEY}"'),
    "one url for two verifiers": HEAD + _verifier("a") + _verifier("b", keys=f'"{OTHER_KEY}"'),
    "one url spelt with and without a slash": HEAD + _verifier(urls='"http://a", "http://a/"'),
    "an ftp url": HEAD + _verifier(urls='"ftp://kagi.example"'),
    "a file url": HEAD + _verifier(urls='"file:///etc/passwd"'),
    "a url without a host": HEAD + _verifier(urls='"https://"'),
    "a url without a host but a port": HEAD + _verifier(urls='"https://:8443"'),
    "a url without a scheme": HEAD + _verifier(urls='"kagi.example:8443"'),
    "a url with a password": HEAD + _verifier(urls='"https://me:secret@kagi.example"'),
    "a url with an empty user": HEAD + _verifier(urls='"https://@kagi.example"'),
    "a url with a query": HEAD + _verifier(urls='"https://kagi.example/?a=b"'),
    "a url with an empty query": HEAD + _verifier(urls='"https://kagi.example/?"'),
    "a url with a fragment": HEAD + _verifier(urls='"https://kagi.example/#"'),
    "a url with a backslash": HEAD + _verifier(urls='"https://kagi.example\\\\@evil"'),
    "a url with a backslash alone": HEAD + _verifier(urls='"https://kagi.example\\\\path"'),
    "a url with a blank": HEAD + _verifier(urls='"https://kagi.example/a b"'),
    "a url with a letter beyond ASCII": HEAD + _verifier(urls='"https://kägi.example"'),
    "a url with a port too high": HEAD + _verifier(urls='"https://kagi.example:65536"'),
    "a url with port zero": HEAD + _verifier(urls='"https://kagi.example:0"'),
    "a url with an empty port": HEAD + _verifier(urls='"https://kagi.example:"'),
    "a url with a port in letters": HEAD + _verifier(urls='"https://kagi.example:https"'),
    "a url with half an IPv6 address": HEAD + _verifier(urls='"https://[fd00::1"'),
    "a relative ca_file": HEAD + VERIFIER + 'ca_file = "ca.pem"\n',
    "a ca_file that is a number": HEAD + VERIFIER + "ca_file = 5\n",
    "an empty ca_file": HEAD + VERIFIER + 'ca_file = ""\n',
    "a uuid in capitals": HEAD + VERIFIER + _volume(UUID.upper()),
    "a uuid without dashes": HEAD + VERIFIER + _volume(UUID.replace("-", "")),
    "no uuid": HEAD + VERIFIER + '[[volumes]]\nname = "a"\n',
    "a mapping name that leaves its directory": HEAD + VERIFIER + _volume(name="../sda"),
    "a mapping name that looks like an option": HEAD + VERIFIER + _volume(name="--test-passphrase"),
    "a mapping name of device-mapper's own": HEAD + VERIFIER + _volume(name="control"),
    "a mapping name too long": HEAD + VERIFIER + _volume(name="a" * 65),
    "a uuid twice": HEAD + VERIFIER + _volume() + _volume(name="other"),
    "a mapping name twice": HEAD + VERIFIER + _volume() + _volume(OTHER_UUID),
    "a device twice": HEAD
    + VERIFIER
    + _volume(more='device = "/d"')
    + _volume(OTHER_UUID, "b", 'device = "/d"'),
    "a relative device": HEAD + VERIFIER + _volume(more='device = "vda3"'),
    "a device with a NUL": HEAD + VERIFIER + _volume(more='device = "/dev/vda\\u0000"'),
    "seventeen volumes": HEAD + VERIFIER + "".join(_volume(f"{n:08x}{UUID[8:]}", f"v{n}") for n in range(17)),
    "a tcti without an event log": HEAD + VERIFIER + '[tpm]\ntcti = "swtpm:path=/x"\n',
    "an event log without a tcti": HEAD + VERIFIER + '[tpm]\nevent_log = "/x"\n',
    "a cap PCR that can be reset": HEAD + VERIFIER + "[tpm]\ncap_pcr = 16\n",
    "a cap PCR that firmware extends": HEAD + VERIFIER + "[tpm]\ncap_pcr = 7\n",
    "a cap PCR that is true": HEAD + VERIFIER + "[tpm]\ncap_pcr = true\n",
    "a driver that is a path": HEAD + VERIFIER + '[tpm]\ndriver = "../x"\n',
    "a limit in text": HEAD + VERIFIER + '[limits]\nattempt_s = "15"\n',
    **{
        f"{value} for {name}": HEAD + VERIFIER + f"[limits]\n{name} = {value}\n"
        for name in Limits.__struct_fields__
        for value in ("nan", "inf", "-inf")
    },
    "a limit of no time": HEAD + VERIFIER + "[limits]\ncryptsetup_s = 0\n",
    "a negative limit": HEAD + VERIFIER + "[limits]\ngather_s = -1\n",
    "a limit of a thousand digits": HEAD + VERIFIER + f"[limits]\ngather_s = {'9' * 1000}\n",
    "a limit of ten thousand digits": HEAD + VERIFIER + f"[limits]\ngather_s = {'9' * 10000}\n",
    "a connection longer than its attempt": HEAD + VERIFIER + "[limits]\nconnect_s = 16\n",
    "an attempt longer than the boot": HEAD + VERIFIER + "[limits]\nboot_budget_s = 10\n",
    "a shortest pause above the longest": HEAD + VERIFIER + "[limits]\nbackoff_min_s = 31\n",
    "an end of a failed boot that nobody knows": HEAD + VERIFIER + '[boot]\non_failure = "continue"\n',
    "a static address that is missing": HEAD + VERIFIER + '[network]\nmethod = "static"\n',
    "an address that DHCP would not use": HEAD + VERIFIER + '[network]\naddress = "10.0.0.2/24"\n',
    "a gateway that DHCP would not use": HEAD + VERIFIER + '[network]\ngateway = "10.0.0.1"\n',
    "an address without its prefix length": HEAD + VERIFIER + _static("10.0.0.2"),
    "an address with a name's letters": HEAD + VERIFIER + _static("a.b/24"),
    "an address too large": HEAD + VERIFIER + _static("10.0.0.256/24"),
    "a gateway with a prefix length": HEAD + VERIFIER + _static(more='gateway = "10.0.0.1/24"\n'),
    "a resolver that is a command": HEAD + VERIFIER + _static(more='dns = ["$(reboot)"]\n'),
    "an interface that is an option": HEAD + VERIFIER + '[network]\ninterface = "-h"\n',
    "an interface that is a path": HEAD + VERIFIER + '[network]\ninterface = "../x"\n',
    "a key given twice": HEAD + HEAD + VERIFIER,
    "no TOML": "vm_id: web1",
    "no UTF-8": "vm_id = '\udcff'",
    "a thousand nested lists": f"vm_id = {'[' * 5000}",
    "more than anybody writes": HEAD + VERIFIER + "#" * MAX_BYTES,
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_file_is_an_error_of_the_image(written: Callable[[str], Config], text: str) -> None:
    """Whoever builds the image must act, and is told what was expected and what was found."""
    with pytest.raises(ImageError) as caught:
        written(text)
    error = caught.value
    assert error.code.startswith("config.")
    assert error.expected
    assert error.found
    assert error.todo


def _signs_for_everybody(key: bytes) -> bool:
    """Try to sign some messages with no private key: s is zero, and R is a point of small order too."""
    public = Ed25519PublicKey.from_public_bytes(key)
    for y in SMALL_ORDER:
        for sign in (0, 0x80):
            point = bytearray(y.to_bytes(32, "little"))
            point[31] |= sign
            for message in range(32):
                with contextlib.suppress(InvalidSignature):
                    public.verify(bytes(point) + bytes(32), bytes([message]))
                    return True
    return False


@pytest.mark.parametrize("sign", [0, 0x80])
@pytest.mark.parametrize("y", sorted(SMALL_ORDER), ids=hex)
def test_a_key_that_anybody_can_sign_for_is_refused(
    written: Callable[[str], Config], y: int, sign: int
) -> None:
    """A template's 32 zeros verify what a stranger signed; with such a key every server would be the verifier."""
    key = bytearray(y.to_bytes(32, "little"))
    key[31] |= sign
    assert _signs_for_everybody(bytes(key))
    with pytest.raises(ImageError) as caught:
        written(HEAD + _verifier(keys=f'"{base64.b64encode(key).decode()}"'))
    assert caught.value.code == "config.weak-key"


def test_bounds_belong_to_what_is_allowed(written: Callable[[str], Config]) -> None:
    """Equal limits are in order, and a file may be as long as it may be."""
    text = HEAD + VERIFIER + "[limits]\nbackoff_min_s = 2\nbackoff_max_s = 2\n"
    text += "boot_budget_s = 3\nattempt_s = 3\nconnect_s = 3\n"
    limits = written(text.ljust(MAX_BYTES, "#")).limits
    assert limits.backoff_min_s == limits.backoff_max_s
    assert limits.connect_s == limits.boot_budget_s


def test_a_password_in_a_url_is_not_repeated(written: Callable[[str], Config]) -> None:
    """Boot messages are for everyone's eyes."""
    for url in ("https://me:hunter2@kagi.example", "https://me:hunter2", "https://me:hunter2@[fd00"):
        with pytest.raises(ImageError) as caught:
            written(HEAD + _verifier(urls=f'"{url}"'))
        assert "hunter2" not in str(caught.value)


def test_a_missing_file_is_an_error_of_the_image(tmp_path: Path) -> None:
    """An image without agent.toml says so, with the path that was looked at."""
    with pytest.raises(ImageError) as caught:
        load(tmp_path / "agent.toml")
    assert caught.value.code == "config.read"
    assert str(tmp_path) in str(caught.value.expected)


@given(st.binary(max_size=300))
def test_whatever_the_bytes_are_only_an_error_of_the_image_leaves(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    """No ValueError of TOML, base64 or Unicode gets past the parser."""
    path = tmp_path_factory.getbasetemp() / "agent-of-chance.toml"
    path.write_bytes(HEAD.encode() + data)
    with pytest.raises(ImageError):
        load(path)


@given(
    st.text(
        alphabet=st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters='"\\'), max_size=40
    )
)
def test_whatever_a_url_is_it_loads_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, tail: str
) -> None:
    """A URL has many ways to be none; no ValueError shows them."""
    path = tmp_path_factory.getbasetemp() / "agent-with-a-url-of-chance.toml"
    path.write_text(HEAD + _verifier(urls=f'"https://{tail}"'))
    try:
        config = load(path)
    except ImageError as error:
        assert error.code in {"config.url", "config.key"}  # noqa: PT017 - both outcomes are allowed
    else:
        assert config.verifiers[0].urls == [f"https://{tail}"]
