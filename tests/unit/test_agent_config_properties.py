"""agent.toml: what the verifier writes is what the agent reads, and whatever else stands in it is an ImageError."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from kagimori_agent.config import MAX_BYTES, Config, load
from kagimori_protocol.errors import ImageError
from kagimori_verifier.cli.agent_toml import AgentToml

KEYS = [
    Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32).public_key().public_bytes_raw() for n in range(1, 5)
]
NAMES = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
TABLES = [
    "kind",
    "report_door",
    "limits.attempt_s",
    "limits.boot_budget_s",
    "tpm.driver",
    "tpm.cap_pcr",
    "tsm.root",
    "network.method",
    "network.address",
    "network.dns",
    "boot.on_failure",
    "verifiers",
    "volumes",
    "nothing.of.this",
    '"a key\\u0000"',
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the path of the file that each example writes."""
    return tmp_path_factory.mktemp("config") / "agent.toml"


@given(
    vm_id=st.from_regex(r"\A[a-z0-9][a-z0-9._-]{0,62}\Z"),
    kind=st.sampled_from(["svsm-vtpm", "snp-direct"]),
    verifier=NAMES,
    ports=st.lists(st.integers(1, 65535), min_size=1, max_size=4, unique=True),
    keys=st.integers(1, 4),
    volumes=st.dictionaries(st.uuids().map(str), NAMES, max_size=3),
    cap_pcr=st.integers(8, 15),
)
def test_what_the_verifier_writes_is_what_the_agent_reads(
    place: Path,
    vm_id: str,
    kind: str,
    verifier: str,
    ports: list[int],
    keys: int,
    volumes: dict[str, str],
    cap_pcr: int,
) -> None:
    """Two rooms that share no code write and read one file: nothing may mean another thing in the other."""
    urls = [f"https://keys.example:{port}" for port in ports]
    named = [(uuid, name) for uuid, name in volumes.items() if list(volumes.values()).count(name) == 1]
    encoded = [base64.b64encode(key).decode() for key in KEYS[:keys]]
    place.write_text(AgentToml(vm_id, kind, verifier, urls, encoded, named, cap_pcr).text())
    config = load(place)
    assert (config.vm_id, config.kind, config.tpm.cap_pcr) == (vm_id, kind, cap_pcr)
    [read] = config.verifiers
    assert (read.name, read.urls, read.keys) == (verifier, urls, KEYS[:keys])
    assert [(volume.uuid, volume.name) for volume in config.volumes] == named


LEAST = AgentToml(
    "web1", "svsm-vtpm", "home", ["http://keys.example:8117"], [base64.b64encode(KEYS[0]).decode()], [], 15
).text()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(TABLES),
            st.sampled_from(
                [
                    '""',
                    '"auto"',
                    "0",
                    "-1",
                    "15",
                    "1e999",
                    "nan",
                    "true",
                    "[]",
                    '["x"]',
                    "{}",
                    "1979-05-27",
                    '"/x"',
                    '"::1/0"',
                ]
            )
            | st.integers().map(str)
            | st.text("ab/.:\\n\u00e9", max_size=6).map(lambda text: f"'{text}'"),
        ),
        max_size=3,
    )
)
def test_any_value_of_any_key_is_read_as_what_it_says_or_refused(
    place: Path, lines: list[tuple[str, str]]
) -> None:
    """Dates, infinities and tables stand where numbers should: no TypeError shows them."""
    text = "\n".join(f"{key} = {value}" for key, value in lines) + "\n" + LEAST
    place.write_text(text)
    try:
        config = load(place)
    except ImageError as error:
        refused = error
    else:
        assert isinstance(config, Config)
        assert config.limits.connect_s <= config.limits.attempt_s <= config.limits.boot_budget_s
        return
    assert refused.code.startswith("config.")
    assert refused.expected
    assert len(str(refused)) < 2000


@pytest.mark.parametrize(
    "text",
    ["[" * 60_000, "a." * 30_000 + "b=1", "a." * 1999 + "b=1", "x = " + "[" * 5000, 'a="' + "\\u0041" * 9000],
)
def test_a_file_as_large_as_may_be_is_no_way_out(place: Path, text: str) -> None:
    """Depth is refused, or read; it is never a RecursionError."""
    place.write_text(text[:MAX_BYTES])
    with pytest.raises(ImageError):
        load(place)
