"""Every recorded artefact goes through the commands: what is genuine holds, what is not is refused for its reason.

The index beside the artefacts says what each is. An entry of a kind that this file does not know fails, so that
nothing is recorded and then never looked at.
"""

from __future__ import annotations

import hashlib
import json
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from tests.evidence import DIRECTORY, ENTRIES, Case, azure_ak

from kagimori_protocol import certificate_table

AZURE_REPORT: Final = 0x20
REPORT_SIZE = 1184
BAD_LOGS: Final = {
    # what it is: exit code, and the reason that must be named
    "keylime-empty.bin": (2, "file.empty: expected a TCG event log, found 0 bytes"),
    "short_no_action.bin": (
        1,
        "eventlog.events: expected at least one event that extends a PCR, found 0 of 1",
    ),
}
BAD_REPORTS: Final = {"v2-5aa38e05.bin": "snp/milan-v2-vcek-bdb449fd/vcek.der"}
"""Changed reports, and the certificate that the report was endorsed by before somebody changed it."""


CAS: Final = DIRECTORY / "amd-ca"


def _verify(report: Path, vek: Path, ca: Path) -> tuple[str | Path, ...]:
    return "snp", "verify", report, "--vek", vek, "--ca", ca


def _ca(product: str) -> Path:
    return DIRECTORY / "amd-ca" / {"Bergamo": "genoa", "Siena": "genoa"}.get(product, product.lower())


def _report(case: Case) -> None:
    """A report with its certificate holds; a changed one does not, though its certificate is the right one."""
    shown = case.run("snp", "show", case.path)
    assert shown.code == 0
    fields = case.entry["fields"]
    assert shown.json["policy"] == int(fields["policy"], 16)
    assert shown.json["platform_info"] == int(fields["platform_info"], 16)
    for name in (
        "measurement",
        "report_data",
        "host_data",
        "chip_id",
        "reported_tcb",
        "committed_tcb",
        "launch_tcb",
    ):
        assert shown.json[name] == fields[name]
    if case.path.name in BAD_REPORTS:
        vek = DIRECTORY / BAD_REPORTS[case.path.name]
        case.fails("report.signature: ", *_verify(case.path, vek, _ca("Milan")))
        return
    vek = DIRECTORY / case.entry.get("endorsed_by", f"{Path(case.entry['file']).parent}/vcek.der")
    if case.path.name == "veraison-genoa-outblob.bin":
        (vek,) = [
            case.written("vcek", entry.payload)
            for entry in certificate_table.parse(
                (case.path.parent / "veraison-genoa-auxblob.bin").read_bytes()
            )
            if entry.guid == certificate_table.VCEK
        ]
    told = case.holds(*_verify(case.path, vek, CAS))
    assert told["product"] == case.entry.get("product", told["product"]).replace("Bergamo_Siena", "Genoa")
    assert told["root"] == f"AMD's ARK-{told['product']}"


def _vek(case: Case) -> None:
    """The certificate works as PEM too, and for no report but its own."""
    pem = ssl.DER_cert_to_PEM_cert(case.path.read_bytes()).encode()
    report = case.path.parent / ("snp_report.bin" if "azure" in str(case.entry["file"]) else "report.bin")
    vek = case.written("vek.pem", b"Bag Attributes: none\n" + pem)
    product = case.holds(*_verify(report, vek, CAS))["product"]
    other = (
        "milan-v3-vcek-40a2778d"
        if case.path.parent.name != "milan-v3-vcek-40a2778d"
        else "milan-v3-vcek-14fd2b6e"
    )
    # Kind, product, TCB version or chip, whichever differs first.
    case.fails("endorsement.", *_verify(DIRECTORY / "snp" / other / "report.bin", vek, CAS))
    wrong = "turin" if product == "Milan" else "milan"
    case.fails("endorsement.chain: ", *_verify(report, vek, DIRECTORY / "amd-ca" / wrong))


def _bad_vek(case: Case) -> None:
    """AMD's intermediate did not sign it, whatever report it is shown with."""
    for report in sorted(DIRECTORY.glob("snp/milan-*-vcek-*/report.bin")):
        told = case.fails("endorsement.chain: ", *_verify(report, case.path, _ca("Milan")))
        assert "does not verify" in told["reasons"][0]


def _ca_certificate(case: Case) -> None:
    """A report of its line holds with it, as PEM and among strangers' files, and without it does not."""
    product = case.entry["product"]
    role = case.path.stem
    kind = "vlek" if role == "asvk" else "vcek"
    ca = case.tmp / "ca"
    ca.mkdir()
    for path in _ca(product).glob("*.der"):
        pem = ssl.DER_cert_to_PEM_cert(path.read_bytes()).encode()
        (ca / f"{path.stem}.anything").write_bytes(pem)
    (ca / "README").write_text("not a certificate")
    (ca / "stranger.crt").write_bytes((DIRECTORY / "gce-tpm/ca/gcp_ek_ak_ca_root.crt").read_bytes())
    found = sorted(DIRECTORY.glob(f"snp/{product.lower()}-*-{kind}-*"))
    for pair in found:
        words = _verify(pair / "report.bin", pair / f"{kind}.der", ca)
        assert len(case.holds(*words)["notes"]) >= 2
    (ca / f"{role}.anything").unlink()
    for pair in found:
        words = _verify(pair / "report.bin", pair / f"{kind}.der", ca)
        case.fails("endorsement.root: " if role == "ark" else "endorsement.chain: ", *words)
    assert found or role == "asvk", "no report of this line was recorded"


def _table(case: Case) -> None:
    """Each entry is shown as the index has it, and its certificates verify the report beside it."""
    shown = case.run("certs", "show", case.path)
    assert shown.code == 0
    assert [(row["guid"], row["bytes"], row["encoding"]) for row in shown.json["entries"]] == [
        (entry["guid_big_endian"], entry["length"], entry["encoding"]) for entry in case.entry["entries"]
    ]
    for entry in certificate_table.parse(case.path.read_bytes()):
        case.written(entry.name, entry.payload)
    report = case.path.parent / "veraison-genoa-outblob.bin"
    case.holds(*_verify(report, case.tmp / "VCEK", case.tmp))


def _log(case: Case) -> None:
    """A log replays to its TPM's values; of those that are broken, each is refused for what is wrong with it."""
    if case.path.name in BAD_LOGS:
        code, reason = BAD_LOGS[case.path.name]
        case.fails(reason, "eventlog", "replay", case.path, code=code)
        return
    shown = case.run("eventlog", "show", case.path)
    assert shown.code == 0
    about = case.entry["log"]
    assert set(shown.json["banks"]) <= set(about["banks"])  # firmware may list banks that it does not fill
    assert len(shown.json["events"]) == about["events"]
    assert shown.json["startup_locality"] == (about["startup_locality"] or 0)
    for name, count in about["event_types"].items():
        assert sum(event["type_name"] == name for event in shown.json["events"]) == count
    extended = {event["pcr"] for event in shown.json["events"] if event["type_name"] != "EV_NO_ACTION"}
    told = case.holds("eventlog", "replay", case.path)
    assert set(told["banks"]) == set(shown.json["banks"])
    assert all(set(values) == set(map(str, extended)) for values in told["banks"].values())
    if case.path.name == "ebs_event_missing_sha1.bin":
        # Nothing in the log itself is wrong: only the TPM knows that two events are missing at its end.
        _pcr_5_of_a_tpm_that_measured_more(case, told)
    if case.path.parent.name.startswith("gce-cos"):
        for bank in about["banks"]:
            case.holds("eventlog", "replay", case.path, "--pcrs", case.path.parent / f"pcrs_{bank}.json")
    if "expected_pcrs" in case.entry:
        case.holds("eventlog", "replay", case.path, "--pcrs", DIRECTORY / case.entry["expected_pcrs"])


def _pcr_5_of_a_tpm_that_measured_more(case: Case, told: Any) -> None:  # noqa: ANN401 - whatever JSON can hold
    value = bytes.fromhex(told["banks"]["sha1"]["5"])
    for text in (b"Exit Boot Services Invocation", b"Exit Boot Services Returned with Success"):
        value = hashlib.sha1(
            value + hashlib.sha1(text, usedforsecurity=False).digest(), usedforsecurity=False
        ).digest()
    pcrs = case.written("pcrs.json", json.dumps(told["banks"]["sha1"] | {"5": value.hex()}).encode())
    refused = case.fails(
        "eventlog.replay: expected PCR 5 (sha1) ", "eventlog", "replay", case.path, "--pcrs", pcrs
    )
    (reason,) = refused["reasons"]
    assert "ExitBootServices" in reason


def _pcrs(case: Case) -> None:
    """Each value counts: with any one changed, log or quote do not hold, and the PCR is named."""
    values = json.loads(case.path.read_bytes())
    if case.path.name.endswith(".bin.pcrs.json"):
        log = case.path.with_name(case.path.name.removesuffix(".pcrs.json"))
        case.holds("eventlog", "replay", log, "--pcrs", case.path)
        for bank, pcrs in values.items():
            for pcr, digest in pcrs.items():
                changed = values | {bank: pcrs | {pcr: _other(digest)}}
                path = case.written("changed.json", json.dumps(changed).encode())
                told = case.fails(
                    f"eventlog.replay: expected PCR {pcr} ({bank}) ",
                    "eventlog",
                    "replay",
                    log,
                    "--pcrs",
                    path,
                )
                assert len(told["reasons"]) == 1
        return
    bank = case.path.stem.removeprefix("pcrs_")
    quote = next(
        entry
        for entry in ENTRIES
        if Path(entry["file"]).parent == Path(case.entry["file"]).parent
        and Path(entry["file"]).name in ("quote.msg", f"quote_{bank}.msg")
    )
    words = _quote_words(Case(quote, case.tmp, case.capsys))
    case.holds(*words, "--pcrs", case.path)
    for pcr, digest in values.items():
        path = case.written("changed.json", json.dumps(values | {pcr: _other(digest)}).encode())
        case.fails("quote.pcr-values: ", *words, "--pcrs", path)
        path = case.written(
            "absent.json", json.dumps({key: value for key, value in values.items() if key != pcr}).encode()
        )
        told = case.fails("quote.pcr-values: ", *words, "--pcrs", path)
        assert f"without PCR {pcr} ({bank})" in told["reasons"][0]


def _other(digest: str) -> str:
    return f"{int(digest[0], 16) ^ 1:x}{digest[1:]}"


def _quote_words(case: Case) -> tuple[str | Path, ...]:
    """Give the words that verify a quote with what lies beside it."""
    directory = case.path.parent
    if directory.name == "keylime-emulator":
        signature, ak, nonce = directory / "quotesig.out", directory / "ak.pub", KEYLIME_NONCE
    else:
        signature, nonce = case.path.with_suffix(".sig"), case.entry["nonce"]
        hcl = directory / "hcl_report.bin"
        ak = (
            case.written("ak.pem", azure_ak(hcl.read_bytes()))
            if hcl.exists()
            else directory / "ak.tpmt_public"
        )
    return (
        "quote",
        "verify",
        "--attest",
        case.path,
        "--signature",
        signature,
        "--ak",
        ak,
        "--qualifying",
        nonce,
    )


KEYLIME_NONCE: Final = "db1db298db6d60e6385b7231743e9c3056a18003"
"""extraData of the emulator's quote, of which only the quote itself was recorded."""


def _quote(case: Case) -> None:
    """The quote holds for its own challenge and no other, and says which PCRs it covers."""
    words = _quote_words(case)
    told = case.holds(*words)
    names = {4: "sha1", 11: "sha256", 12: "sha384"}
    assert told["quote"]["pcr_selection"] == [
        {"bank": names[bank], "pcrs": pcrs} for bank, pcrs in case.entry["pcr_select"]
    ]
    case.fails("quote.qualifying-data: ", *words[:-1], "00" + str(words[-1]))


def _signature(case: Case) -> None:
    """A signature with its last bit changed signs nothing."""
    (quote,) = (entry for entry in ENTRIES if DIRECTORY / entry["file"] == case.path.with_suffix(".msg"))
    words = list(_quote_words(Case(quote, case.tmp, case.capsys)))
    raw = case.path.read_bytes()
    words[words.index("--signature") + 1] = case.written("changed.sig", raw[:-1] + bytes([raw[-1] ^ 1]))
    case.fails("quote.signature: ", *words)


def _ak(case: Case) -> None:
    """The AK signed the quotes beside it, none of another TPM, and its attributes are told."""
    directory = case.path.parent
    quotes = ("quote", "verify", "--attest", directory / "quote_sha256.msg", "--qualifying", "9009")
    told = case.holds(*quotes, "--signature", directory / "quote_sha256.sig", "--ak", case.path)
    assert set(told["ak"]["attributes"]) >= {
        "restricted",
        "sign",
        "fixedTPM",
        "fixedParent",
        "sensitiveDataOrigin",
    }
    case.fails("quote.signature: ", *quotes, "--signature", directory / "quote_sha1.sig", "--ak", case.path)


def _hcl(case: Case) -> None:
    """A report inside another container is not taken out in silence; cut out, it is the one that is recorded."""
    vek, ca = case.path.parent / "vcek.der", DIRECTORY / "amd-ca"
    told = case.fails("report.size: ", "snp", "verify", case.path, "--vek", vek, "--ca", ca, code=2)
    assert "from offset 32" in told["error"]["todo"]
    inner = case.written("inner", case.path.read_bytes()[AZURE_REPORT : AZURE_REPORT + REPORT_SIZE])
    case.holds(*_verify(inner, vek, ca))


def _stranger(case: Case) -> None:
    """It is nothing that a command reads, and each says so."""
    for words in (("snp", "show"), ("eventlog", "replay"), ("eventlog", "show"), ("certs", "show")):
        done = case.run(*words, case.path)
        assert (done.code, done.json["verified"]) == (2, False)
    _no_ak(case)


def _no_ak(case: Case) -> None:
    directory = DIRECTORY / "gce-tpm" / "gce-cos-85-nonce9009"
    quote = ("--attest", directory / "quote_sha256.msg", "--signature", directory / "quote_sha256.sig")
    done = case.run("quote", "verify", *quote, "--ak", case.path, "--qualifying", "9009")
    assert (done.code, done.json["verified"]) in ((1, False), (2, False))
    assert any(told.startswith(("ak.", "quote.signature")) for told in done.json["reasons"])


def _root_of_another(case: Case) -> None:
    """A CA that is not AMD's may lie in the directory, and vouches for nobody."""
    pair = DIRECTORY / "snp" / "milan-v3-vcek-40a2778d"
    words = ("snp", "verify", pair / "report.bin", "--vek", pair / "vcek.der", "--ca")
    ca = case.tmp / "ca"
    ca.mkdir()
    (ca / "root").write_bytes(case.path.read_bytes())
    case.fails("endorsement.root: ", *words, ca)
    for path in _ca("Milan").glob("*.der"):
        (ca / path.name).write_bytes(path.read_bytes())
    case.holds(*words, ca)


def _sample(case: Case) -> None:
    """An emulator's files: its quote holds with the AK in two forms; EKs sign nothing."""
    directory = case.path.parent
    quote = Case(
        next(e for e in ENTRIES if e["file"].endswith("keylime-emulator/quote.out")), case.tmp, case.capsys
    )
    words = list(_quote_words(quote))
    at = words.index("--ak") + 1
    match case.path.name:
        case "ak.pub":
            assert case.holds(*words)["ak"]["form"] == "TPM2B_PUBLIC"
            bare = case.written("ak", case.path.read_bytes()[2:])
            assert case.holds(*words[:at], bare, *words[at + 1 :])["ak"]["form"] == "TPMT_PUBLIC"
        case "akpub.pem":
            told = case.holds(*words[:at], case.path, *words[at + 1 :])
            assert told["ak"]["attributes"] is None
            assert any("no attributes" in note for note in told["notes"])
        case "ak.name":
            assert case.holds(*words)["ak"]["name"] == case.path.read_bytes().hex()
        case "ek.pub":
            case.fails("ak.attributes: ", *words[:at], case.path, *words[at + 1 :])
        case "ekpub.pem":
            case.fails("quote.signature: ", *words[:at], case.path, *words[at + 1 :])
        case "quote.out":
            _quote(case)
        case "quotesig.out":
            raw = case.path.read_bytes()
            at = words.index("--signature") + 1
            words[at] = case.written("changed.sig", raw[:-1] + bytes([raw[-1] ^ 1]))
            case.fails("quote.signature: ", *words)
        case "quotepcr.out":
            # tpm2_quote writes a C structure: 132 bytes of selection, then digests, each after its 16-bit size.
            raw = case.path.read_bytes()
            digests = [
                raw[i + 2 : i + 34].hex() for i in range(len(raw) - 34) if raw[i : i + 2] == b"\x20\x00"
            ]
            values = dict(zip(("15", "16", "22"), digests, strict=False))
            case.holds(*words, "--pcrs", case.written("pcrs.json", json.dumps({"sha256": values}).encode()))
        case _:
            assert case.path == directory / "mkcred.out", "an unknown sample"
            _stranger(case)  # a credential, which only its TPM can open: no command takes one


BY_KIND: Final[dict[str, Callable[[Case], None]]] = {
    "snp-report": _report,
    "snp-report (configfs-tsm outblob)": _report,
    "vcek-cert": _vek,
    "vlek-cert": _vek,
    "vek-cert-known-bad": _bad_vek,
    "amd-ca-cert": _ca_certificate,
    "snp-cert-table (configfs-tsm auxblob)": _table,
    "tcg-event-log": _log,
    "expected-pcrs": _pcrs,
    "pcr-values": _pcrs,
    "tpm-quote-tpms-attest": _quote,
    "tpm-quote-tpmt-signature": _signature,
    "tpm-quote-raw-rsa-sig (bare 256 bytes, no TPMT header)": _signature,
    "tpm-ak-public": _ak,
    "tpm-sample": _sample,
    "ek-template-TPMT_PUBLIC": _no_ak,
    "azure-hcl-report": _hcl,
    "gcp-tpm-ca-cert": _root_of_another,
    "gcp-tpm-ak-ek-cert": _no_ak,
    "go-tpm-tools-attestation-proto": _stranger,
}


def test_every_recorded_artefact_is_of_a_kind_that_is_tried(vectors: Path) -> None:
    """Whoever records something of a new kind says here what a command makes of it."""
    assert vectors == DIRECTORY
    assert ENTRIES
    assert {entry["kind"] for entry in ENTRIES} == set(BY_KIND)


def test_every_file_is_in_the_index(vectors: Path) -> None:
    """A file that the index does not name would never be tried."""
    named = {entry["file"] for entry in ENTRIES} | {"INDEX.json", "README.md", "amd-ca/FINGERPRINTS.md"}
    there = {path.relative_to(vectors).as_posix() for path in vectors.rglob("*") if path.is_file()}
    assert there == named


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry["file"] for entry in ENTRIES])
def test_through_the_commands(
    entry: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What its kind says, above."""
    BY_KIND[entry["kind"]](Case(entry, tmp_path, capsys))
