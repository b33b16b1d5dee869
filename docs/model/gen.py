#!/usr/bin/env python3
"""Makes the ProVerif models: the design (kagimori.pv) and its variants, each with one check or more dropped.

::

    gen.py write            write kagimori.pv anew; a test holds that this changes nothing
    gen.py run [NAME ...]   run these variants, or all, with ProVerif (PROVERIF=path), and print the table of results
    gen.py fingerprint      print the SHA-256 of what ProVerif reads of all variants, for correspondence.toml

``model.pv.in`` is the text, with one @HOLE@ for what a switch changes. A variant is a set of switches.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
TEXT: Final = (HERE / "model.pv.in").read_text(encoding="utf-8")
DESIGN: Final = "kagimori"
QUERIES: Final = tuple(re.findall(r"^\(\* QUERY (\w+) :", TEXT, re.MULTILINE))
"""Names of the queries, in the order in which ProVerif gives their results."""

HELLO: Final = ("v", "vm", "p", "kd", "e", "ek", "ak")
"""Hello's fields in the model: version, vm_id, purpose, kind, HPKE key, EK, AK."""
LIMIT_S: Final = 240
AT_ONCE: Final = 2
_VERDICTS: Final = {"is true": "true", "is false": "false", "cannot be proved": "cannot"}


@dataclass(frozen=True, kw_only=True)
class Switches:
    """What the protocol checks, and what the attacker can do; the defaults are the design."""

    vmpl: bool = True  # step 4: VMPL exactly 0
    kind: str = "measurement"  # step 4: what REPORT_DATA means follows from MEASUREMENT, or from the "hint"
    makecred: bool = True  # section 5: S only through MakeCredential(EK, AK name)
    hpke: bool = True  # section 5: the HPKE layer
    t1: str = "full"  # the quote's qualifyingData: full, t0, nonce or none
    drop_t0: tuple[str, ...] = ()  # Hello fields missing from T0
    drop_tok: tuple[str, ...] = ()  # ... from the token
    drop_sig: tuple[str, ...] = ()  # ... from the reply signature
    chal_t0: bool = True  # T0 covers Challenge
    vk_t0: bool = True  # T0 covers the verifier's public key
    sign_ch: bool = True  # Kagimori-Signature is checked on Challenge
    sign_gr: bool = True  # ... and on Sealed
    sig_req: bool = True  # the signature covers SHA-256(request body)
    cap: bool = True  # step 9: the cap PCR is still zero
    ak_attr: bool = True  # step 6: AK restricted, ...
    man_eq: bool = True  # step 5: the manifest equals Hello's EK
    cert: bool = True  # step 3: VCEK chains to ARK
    pcr: bool = True  # step 9: PCRs explained
    attest: bool = False  # an SVSM with the attest service is a reference value
    plain: bool = False  # a plain guest's measurement is one
    single: bool = True  # a session is redeemed once
    tok_sel: bool = True  # the token binds pcr_selection (Challenge), not only nonce and Hello
    confirm: str = "payload"  # the Confirm key comes from the sealed "payload", or from "S"
    clone: bool = True  # the attacker clones vTPM seeds
    root: bool = True  # ... is root in every good VM after the cap
    direct_root: bool = False  # ... is root in a snp-direct guest after its boot
    report_id: bool = False  # step 10: one answer with keys per REPORT_ID
    leak_e: bool = False  # the agent forgot to wipe its HPKE key: root finds it
    leak_vs: bool = False  # the verifier's signing key is known
    leak_vcek: bool = False  # a chip's key is known
    leak_kv: bool = False  # the token key is known
    loose_act: bool = False  # the TPM activates for an object whose private part it does not hold
    dry_leak: bool = True  # a dry-run's HPKE key is not looked after


VARIANTS: Final[dict[str, Switches]] = {
    DESIGN: Switches(),
    "confirm_from_S": Switches(confirm="S"),
    "no_vmpl": Switches(vmpl=False),
    "kind_from_hint": Switches(kind="hint"),
    "kind_from_hint_direct_root": Switches(kind="hint", direct_root=True, report_id=True),
    "no_makecred": Switches(makecred=False),
    "t1_nonce_only": Switches(t1="nonce"),
    "t1_nonce_only_sig_without_request": Switches(t1="nonce", sig_req=False),
    "t1_nonce_only_unsigned": Switches(t1="nonce", sign_ch=False, sign_gr=False),
    "t1_none": Switches(t1="none"),
    "t1_t0_only": Switches(t1="t0"),
    "hpke_not_in_T0": Switches(drop_t0=("e",)),
    "hpke_not_in_transcript": Switches(drop_t0=("e",), drop_tok=("e",)),
    "unsigned": Switches(sign_ch=False, sign_gr=False),
    "unsigned_challenge": Switches(sign_ch=False),
    "unsigned_grant": Switches(sign_gr=False),
    "sig_without_request": Switches(sig_req=False),
    "no_cap": Switches(cap=False),
    "purpose_not_in_T0": Switches(drop_t0=("p",)),
    "purpose_not_in_transcript": Switches(drop_t0=("p",), drop_tok=("p",)),
    "vmid_not_in_T0": Switches(drop_t0=("vm",)),
    "vmid_not_in_transcript": Switches(drop_t0=("vm",), drop_tok=("vm",)),
    "attest_allowed": Switches(attest=True),
    "plain_registered": Switches(plain=True),
    "not_single_use": Switches(single=False),
    "not_single_use_confirm_from_S": Switches(single=False, confirm="S"),
    "no_hpke": Switches(hpke=False),
    "no_hpke_clone_only": Switches(hpke=False, root=False),
    "no_hpke_no_clone_no_root": Switches(hpke=False, root=False, clone=False),
    "token_without_selection": Switches(tok_sel=False),
    "no_ak_attributes": Switches(ak_attr=False),
    "manifest_not_compared": Switches(man_eq=False),
    "no_pcr": Switches(pcr=False),
    "direct_root": Switches(direct_root=True),
    "direct_root_report_id": Switches(direct_root=True, report_id=True),
    "hpke_key_not_wiped": Switches(leak_e=True),
    "verifier_key_leaked": Switches(leak_vs=True),
    "token_key_leaked": Switches(leak_kv=True),
    "chip_key_leaked": Switches(leak_vcek=True),
    "public_only_activation": Switches(loose_act=True),
    "challenge_not_in_T0": Switches(chal_t0=False),
    "verifier_key_not_in_T0": Switches(vk_t0=False),
}


def model(switches: Switches) -> str:
    """Fill every hole of the text; raises ValueError if one is left."""
    text = TEXT
    holes = _transcript(switches) | _verifier(switches) | _answer(switches) | _attacker(switches)
    for _ in range(3):  # what fills a hole may have holes of its own
        for name, filling in holes.items():
            text = text.replace(f"@{name}@", filling)
    if left := re.findall(r"@[A-Z0-9]+@", text):
        raise ValueError(f"holes without a filling: {left}")
    return text


def _transcript(switches: Switches) -> dict[str, str]:
    """Fill in T0, T1, the token and the signatures: what they cover, and who checks them."""
    t1 = {"full": "h((LT1, t0, h(rep), h(man)))", "t0": "h((LT1, t0))", "nonce": "h((LT1, n))", "none": "LT1"}
    return {
        "DROPS": _drops(switches),
        "HT0": _hash_without(switches.drop_t0),
        "HTOK": _hash_without(switches.drop_tok),
        "HSIG": _hash_without(switches.drop_sig) if switches.sig_req else "NOREQ",
        "HREQ": "h(x)" if switches.sig_req else "NOREQ",
        "T0": "LT0, HelloT0(hello)" + ", h(ch)" * switches.chal_t0 + ", pk(VS)" * switches.vk_t0,
        "T1": t1[switches.t1],
        "CHECKCH": "let (=LCH, =HelloSig(hello), =ch) = checksign(sg, pk(VS)) in"
        if switches.sign_ch
        else "(* DROPPED: Challenge signature *)",
        "CHECKGR": "let (=LGR, =ReqSig(ev), =gr) = checksign(sg2, pk(VS)) in"
        if switches.sign_gr
        else "(* DROPPED: Grant signature *)",
        "TOKMAKE": f"seal((LTOK, n, HelloTok(hello){', SELALL' * switches.tok_sel}), KV)",
        "TOKOPEN": "let (=LTOK, =n, =HelloTok(hello2), =sel) = unseal(tok, KV) in"
        if switches.tok_sel
        else "let (=LTOK, =n, =HelloTok(hello2)) = unseal(tok, KV) in   (* DROPPED: selection not in the token *)",
        "REPL": "" if switches.single else "! (* DROPPED: a session may be redeemed again and again *)",
    }


def _hash_without(fields: tuple[str, ...]) -> str:
    return f"h(drop_{'_'.join(fields)}(x))" if fields else "h(x)"


def _drops(switches: Switches) -> str:
    """Declare a destructor for each set of fields that some hash leaves out."""
    dropped = {switches.drop_t0, switches.drop_tok, switches.drop_sig} - {()}
    typed = ": bitstring, ".join(HELLO)
    return "".join(
        f"reduc forall {typed}: bitstring; drop_{'_'.join(fields)}(({', '.join(HELLO)})) = "
        f"({', '.join(field for field in HELLO if field not in fields)}).\n"
        for fields in sorted(dropped)
    )


def _verifier(switches: Switches) -> dict[str, str]:
    """Fill in the verifier's checks of section 6."""
    svsm = ["m = MSVSM", *["m = MATTEST"] * switches.attest, *["m = MPLAIN"] * switches.plain]
    if switches.kind == "measurement":
        if_svsm, if_direct = f"if {' || '.join(svsm)} then", "if m = MDIRECT then"
    else:
        if_svsm = "if (m = MSVSM || m = MDIRECT) && hint = SVSM then"
        if_direct = "if (m = MSVSM || m = MDIRECT) && hint = DIRECT then"
    if not switches.pcr:
        pcr = "(* DROPPED: PCR values not appraised *)"
    elif not switches.tok_sel:
        pcr = "if vals = pcrvals(sel, GOOD, ZERO) then"
    elif switches.cap:
        pcr = "if vals = (GOOD, ZERO) then"
    else:
        pcr = "let (=GOOD, anycap: bitstring) = vals in   (* DROPPED: cap PCR may hold anything *)"
    return {
        "CERT": "let (=LCERT, vcek: bitstring) = checksign(cert, pk(ARK)) in"
        if switches.cert
        else "let vcek: bitstring = getpk(cert) in",
        "VMPL": "if vl = VMPL0 then" if switches.vmpl else "(* DROPPED: VMPL check *)",
        "IFSVSM": if_svsm,
        "IFDIRECT": if_direct,
        "MANEQ": "if man = ekp then"
        if switches.man_eq
        else "(* DROPPED: manifest need not equal the EK of Hello *)",
        "AKATTR": "let (=TAK, akpk: bitstring, =RESTRICTED) = akp in"
        if switches.ak_attr
        else "let (=TAK, akpk: bitstring, anyattr: bitstring) = akp in",
        "PCR": pcr,
        "RIDCHECK": "event GrantedTo(rid, th);" if switches.report_id else "",
        "RESTR": (
            "(* AMENDMENT: one Grant per REPORT_ID (one per launch), kept in the shared database *)\n"
            "restriction r: bitstring, a: bitstring, b: bitstring; "
            "event(GrantedTo(r, a)) && event(GrantedTo(r, b)) ==> a = b.\n"
        )
        * switches.report_id,
    }


def _answer(switches: Switches) -> dict[str, str]:
    """Fill in both layers of the answer, how the agent opens them, and the Confirm key."""
    payload = "(LPAY, diskkey(vm), cs)"
    opened = (
        "let inner = hopen(sealed, e, th) in"
        if switches.hpke
        else "let inner = sealed in   (* DROPPED: HPKE layer *)"
    )
    taken = "let (=LPAY, dk: bitstring, cs: bitstring) = "
    if switches.makecred:
        layers = {
            "CRED": f"mkcred(s, {'ekp' if switches.man_eq else 'man'}, akp)",
            "INNER": f"aead({payload}, kdf(s, th, LKEK), th)",
            "AGOPEN": f"let s = activate(cred, ek, akp) in\n  {opened}\n"
            f"  {taken}adec(inner, kdf(s, th, LKEK), th) in",
            "NEWCS": "new cs: bitstring;" if switches.confirm == "payload" else "let cs = NONE in",
        }
    else:
        # Without the credential S has to travel in the payload, as it does for kinds without a TPM.
        layers = {
            "CRED": "NONE",
            "INNER": payload,
            "AGOPEN": f"{opened}\n  {taken}inner in\n  let s = cs in   (* DROPPED: MakeCredential *)",
            "NEWCS": "let cs = s in",
        }
    return layers | {
        "CKEY": f"kdf({'s' if switches.confirm == 'S' else 'cs'}, th, LCONF)",
        "SEAL": "hpke(inner, epk, th)" if switches.hpke else "inner",
    }


def _attacker(switches: Switches) -> dict[str, str]:
    """Fill in what the attacker holds and may ask for."""
    leaks = [
        *["out(c, VS);"] * switches.leak_vs,
        *["out(c, KV);"] * switches.leak_kv,
        *["in(c, y: bitstring); out(c, chipkey(y));"] * switches.leak_vcek,
    ]
    activate_any = "!(in(c, (cr: bitstring, nm: bitstring)); out(c, activate(cr, ek, nm)))"
    activate_own = " | ".join(
        f"!(in(c, cr: bitstring); out(c, activate(cr, ek, {name})))" for name in ("akp", "ukp")
    )
    return {
        "LEAKS": " ".join(leaks),
        "ROOTE": "| out(c, e)   (* the agent did not wipe its HPKE key: root finds it *)" * switches.leak_e,
        "ROOT": "| TpmRoot(who, chip, GOOD, CAPPED)" * switches.root,
        "CLONE": "!(in(c, (who: bitstring, chip: bitstring)); TpmRoot(who, chip, BAD, ZERO))"
        if switches.clone
        else "!(in(c, chip: bitstring); new who: bitstring; TpmRoot(who, chip, BAD, ZERO))",
        # Without clones the good VMs have seeds of their own.
        "WHO": "in(c, (id: bitstring, who: bitstring, chip: bitstring));"
        if switches.clone
        else "in(c, (id: bitstring, chip: bitstring)); new who: bitstring;",
        "DROOT": "event DirectBooted(id);\n"
        "  (* anything that runs after the boot may ask the AMD-SP for reports with free REPORT_DATA: "
        "there is no PCR to cap *)\n"
        "  !(in(c, x: bitstring); out(c, report(chip, MDIRECT, VMPL0, x, rid)))"
        if switches.direct_root
        else "0",
        "ACT": activate_any if switches.loose_act else activate_own,
        "DRYLEAK": "| (if purp = DRYRUN then out(c, e))     "
        "(* a dry-run never yields a key, so nobody looks after its HPKE key *)" * switches.dry_leak,
    }


def bare(text: str) -> str:
    """Leave out what ProVerif does not read: comments, which may be nested, and how blanks are set."""
    kept, depth = [], 0
    for part in re.split(r"(\(\*|\*\))", text):
        if part == "(*":
            depth += 1
        elif part == "*)":
            depth -= 1
        elif depth == 0:
            kept.append(part)
    return " ".join("".join(kept).split())


def fingerprint() -> str:
    """Give the SHA-256, in hex, of what ProVerif reads of all variants."""
    texts = [f"{name}\n{bare(model(switches))}" for name, switches in VARIANTS.items()]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def results(output: str) -> dict[str, str]:
    """Read ProVerif's output: for each query ``true``, ``false`` or ``cannot``.

    Raises ValueError unless there is one result for each query: a run that broke off says nothing.
    """
    lines = [line for line in re.findall(r"^RESULT (.*)$", output, re.MULTILINE) if not line.startswith("(")]
    told = [
        match[1] for line in lines if (match := re.search(r" (is true|is false|cannot be proved)\b", line))
    ]
    if len(told) != len(QUERIES):
        raise ValueError(f"{len(told)} results for {len(QUERIES)} queries: {output[-500:]}")
    return {query: _VERDICTS[one] for query, one in zip(QUERIES, told, strict=True)}


def run(names: Iterable[str], proverif: str = "proverif") -> dict[str, dict[str, str]]:
    """Run variants, two at a time, and give their results by name. Raises ValueError or subprocess's errors."""
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(AT_ONCE) as threads:

        def one(name: str) -> dict[str, str]:
            path = Path(directory) / f"{name}.pv"
            path.write_text(model(VARIANTS[name]), encoding="utf-8")
            done = subprocess.run(
                [proverif, str(path)], capture_output=True, text=True, timeout=LIMIT_S, check=True
            )
            return results(done.stdout)

        chosen = list(names)
        return dict(zip(chosen, threads.map(one, chosen), strict=True))


def table(given: Mapping[str, Mapping[str, str]]) -> str:
    """Write results as the table of README.md has them."""
    rows = [["variant", *QUERIES], ["---"] * (len(QUERIES) + 1)]
    rows += [[name, *result.values()] for name, result in given.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(arguments: list[str]) -> None:
    """Run one command."""
    if arguments == ["write"]:
        (HERE / f"{DESIGN}.pv").write_text(model(VARIANTS[DESIGN]), encoding="utf-8")
    elif arguments == ["fingerprint"]:
        sys.stdout.write(f"{fingerprint()}\n")
    elif arguments[:1] == ["run"] and set(arguments[1:]) <= set(VARIANTS):
        sys.stdout.write(table(run(arguments[1:] or VARIANTS, os.environ.get("PROVERIF", "proverif"))))
    else:
        sys.exit(f"{__doc__}\nvariants: {' '.join(VARIANTS)}")


if __name__ == "__main__":
    main(sys.argv[1:])
