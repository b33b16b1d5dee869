"""The commands for one artefact, with anything in the files: 0, 1 or 2, never a traceback, and what they print is plain.

The files come from the fuzzers' seeds and mutators, so that they are nearly right: what is refused at the door is easy.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz import workshop
from tests.fuzz.mutators import documents
from tests.fuzz.target import Target
from tests.fuzz.targets import certificates, eventlog, report, tpm

from kagimori_protocol.errors import Malformed
from kagimori_verifier.cli.main import main
from kagimori_verifier.examine import pcr_values
from kagimori_verifier.examine.quote import parse_ak
from kagimori_verifier.verify.eventlog_layout import DIGEST_SIZES

TRIES = 40


class Command(NamedTuple):
    """A command, what its files are made of, and how an input becomes files."""

    words: list[str]
    target: Target
    seeds: Callable[[], Iterator[bytes]]
    parts: Callable[[bytes], list[bytes]]


def bare_reports() -> Iterator[bytes]:
    """Give the seeds that are reports as they are."""
    return (seed for seed in report.seeds() if seed[0] == 0)


def quotes() -> Iterator[bytes]:
    """Give the seeds that are a key, a signature and an attestation."""
    return (seed for seed in tpm.seeds() if seed[0] == tpm.FILES)


COMMANDS = {
    "snp show": Command(["snp", "show", "0"], report.TARGET, bare_reports, lambda data: [data[1:]]),
    "snp verify": Command(
        ["snp", "verify", "0", "--vek", "1", "--ca", "."],
        report.TARGET,
        bare_reports,
        lambda data: [data[1:], report.chip("Milan", "vcek").endorsements.certificates[0]],
    ),
    "eventlog show": Command(["eventlog", "show", "0"], eventlog.TARGET, eventlog.seeds, lambda data: [data]),
    "eventlog replay": Command(
        ["eventlog", "replay", "0"], eventlog.TARGET, eventlog.seeds, lambda data: [data]
    ),
    "quote verify": Command(
        ["quote", "verify", "--ak", "0", "--signature", "1", "--attest", "2", "--qualifying", "00"],
        tpm.TARGET,
        quotes,
        lambda data: workshop.cut(data[1:], 3),
    ),
    "certs show": Command(
        ["certs", "show", "0"], certificates.TARGET, certificates.seeds, lambda data: [data]
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("as_json", [False, True], ids=["words", "json"])
def test_nearly_right_files_are_shown_or_refused(
    name: str, as_json: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A person looks at artefacts that somebody hostile may have made."""
    command = COMMANDS[name]
    chance = random.Random(name)
    seeds = [seed for seed in command.seeds() if len(seed) <= command.target.bound.fuzzed]
    codes = set()
    for index in range(TRIES):
        data = chance.choice(seeds)
        if index:
            data = mutated(command.target, data, chance)
        (tmp_path / str(index)).mkdir()
        files = []
        for number, part in enumerate(command.parts(data)):
            files.append(tmp_path / str(index) / str(number))
            files[-1].write_bytes(part)
        words = [str(files[int(word)]) if word.isdigit() and word != "00" else word for word in command.words]
        words = [str(tmp_path / str(index)) if word == "." else word for word in words]
        code = main([*words, "--json"] if as_json else words)
        shown = capsys.readouterr()
        assert code in {0, 1, 2}, shown
        for stream in (shown.out, shown.err):
            assert all(line.isprintable() for line in stream.splitlines()), ascii(stream)
            assert "Traceback" not in stream
        if as_json and code != 2:
            assert isinstance(json.loads(shown.out), dict)
        codes.add(code)
    assert len(codes) > 1 or name in {"snp verify", "quote verify"}


def mutated(target: Target, data: bytes, chance: random.Random) -> bytes:
    """Mutate an input as the fuzzers do, but for its first byte where that chooses."""
    assert target.mutate is not None

    def bytewise(part: bytes, limit: int) -> bytes:
        changed = bytearray(part[:limit])
        at = chance.randint(0, len(changed))
        changed[at : at + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
        return bytes(changed[:limit])

    changed = target.mutate(data, target.bound.fuzzed, chance, bytewise)
    return changed if target is eventlog.TARGET or target is certificates.TARGET else data[:1] + changed[1:]


@given(
    st.dictionaries(
        st.sampled_from(["sha1", "sha256", "SHA384", "sha-512"]),
        st.dictionaries(st.integers(0, 23), st.binary(min_size=64, max_size=64), min_size=1, max_size=4),
        min_size=1,
    )
)
def test_pcr_values_that_were_written_are_those_that_are_read(banks: dict[str, dict[int, bytes]]) -> None:
    """By bank, under any of the names that people write."""
    names = {name: name.lower().replace("-", "") for name in banks}
    cut = {
        name: {index: value[: DIGEST_SIZES[names[name]]] for index, value in values.items()}
        for name, values in banks.items()
    }
    raw = json.dumps(
        {name: {str(i): value.hex() for i, value in values.items()} for name, values in cut.items()}
    )
    assert pcr_values.parse(raw.encode()) == {names[name]: values for name, values in cut.items()}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("00" * 32),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["sha256", "0", "1", "24", "00", "٣", ""]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.binary(max_size=100) | json_values.map(lambda value: json.dumps(value).encode()))
def test_whatever_is_no_set_of_pcr_values_is_refused(raw: bytes) -> None:
    """A file that somebody wrote by hand is either values of PCRs that exist, or not at all."""
    try:
        banks = pcr_values.parse(raw)
    except Malformed as error:
        refused = error
    else:
        assert banks
        for bank, values in banks.items():
            assert values
            assert all(len(value) == DIGEST_SIZES[bank] for value in values.values())
            assert set(values) <= set(range(24))
        return
    assert refused.code == "pcrs.layout"
    assert refused.todo


@given(st.integers(), st.integers(0, 60))
def test_a_changed_document_of_pcr_values_is_read_or_refused(seed: int, most: int) -> None:
    """Values are added, doubled, renamed, cut."""
    chance = random.Random(seed)
    raw = json.dumps({"sha256": {str(index): "ab" * 32 for index in range(3)}}).encode()
    for _ in range(most % 4):
        raw = documents.mutate_document(raw, 4096, chance, lambda data, limit: data[:-1][:limit])
    try:
        pcr_values.parse(raw)
    except Malformed as error:
        refused = str(error)
    else:
        return
    assert len(refused) < 1000


@given(
    st.binary(max_size=120)
    | st.builds(lambda body: b"-----BEGIN PUBLIC KEY-----\n" + body, st.binary(max_size=80))
    | st.builds(
        lambda body: b"-----BEGIN CERTIFICATE-----\n" + body + b"\n-----END CERTIFICATE-----\n",
        st.sampled_from([b"", b"MIIB", b"MAMCAQA="]),
    )
    | st.builds(lambda body: b"\x30" + bytes([len(body)]) + body, st.binary(max_size=60))
)
def test_whatever_is_no_key_is_refused(raw: bytes) -> None:
    """PEM, DER and TPM structures have many ways to be none."""
    with pytest.raises(Malformed) as caught:
        parse_ak(raw)
    assert caught.value.code == "ak.layout"
