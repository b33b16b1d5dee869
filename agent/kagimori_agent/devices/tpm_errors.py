"""What a TSS2 return code means here, and what to do about it.

Source: TPM 2.0 Library part 2, section 6.6 (response codes); TCG TSS 2.0 Overview, section 3 (layers in bits
23:16). Import budget: the error tree.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from kagimori_protocol.errors import HardwareError, ImageError, KagimoriError

_LAYERS: Final[dict[int, str]] = {
    0: "TPM",
    6: "feature API",
    7: "ESAPI",
    8: "system API",
    9: "marshalling",
    10: "TCTI",
    11: "resource manager",
    12: "resource manager's TPM",
    13: "policy",
}
_TPM_LAYERS: Final = frozenset({0, 11, 12})
"""Layers that pass a TPM's codes on: Linux's resource manager answers as 11 for a command it refuses."""
_TCTI: Final = 10
_TCTI_NOT_SUPPORTED: Final = 0x15

_FORMAT_ONE: Final = 0x080
_FORMAT_ONE_MASK: Final = 0x0BF
"""Format-one codes carry the number of a handle, parameter or session in their other bits."""


class _Meaning(NamedTuple):
    code: str
    todo: str


_FULL: Final = _Meaning(
    "tpm.full",
    "Use /dev/tpmrm, or flush what others left loaded (tpm2_flushcontext -t, -l, -s), or start the VM again.",
)
_PASSWORD: Final = _Meaning(
    "tpm.password",
    "The endorsement hierarchy must have an empty password, as after manufacture or TPM2_Clear.",
)

_MEANINGS: Final[dict[int, _Meaning]] = {
    0x084: _Meaning(
        "tpm.value", "The TPM does not know the algorithm or value: RSA 2048 and ECC P-256 are needed."
    ),
    0x085: _Meaning("tpm.hierarchy", "Firmware must leave the endorsement hierarchy enabled."),
    0x08E: _PASSWORD,
    0x0A2: _PASSWORD,
    0x09F: _Meaning(
        "tpm.credential", "It was made for another EK or AK: begin a new attempt with fresh keys."
    ),
    0x0A6: _Meaning("tpm.curve", "Use a vTPM with ECC P-256."),
    0x100: _Meaning(
        "tpm.not-started", "Firmware or the driver has to send TPM2_Startup; start the VM again."
    ),
    0x101: _Meaning("tpm.failure-mode", "The TPM's self test failed: start the VM again."),
    0x12F: _Meaning(
        "tpm.no-authorisation", "The key is loaded without its private part: make both keys in this TPM."
    ),
    0x143: _Meaning("tpm.command", "Use a vTPM with all commands of the TPM 2.0 Library."),
    0x902: _FULL,
    0x903: _FULL,
    0x905: _FULL,
    0x906: _FULL,
    0x907: _Meaning("tpm.locality", "Choose a PCR that locality 0 may extend, such as 15."),
    0x921: _Meaning("tpm.lockout", "Too many wrong passwords were tried: wait, or start the VM again."),
}
_TCTI_MEANING: Final = _Meaning(
    "tpm.connection", "See that the device exists, may be opened by this user, and no other program holds it."
)
_UNKNOWN: Final = _Meaning("tpm.rc", "Start the VM again; if it stays, look the code up with tpm2_rc_decode.")


def explain(rc: int, text: str, command: str, tpm: str) -> KagimoriError:
    """Turn the return code of ``command`` into an error; ``text`` is the TSS's own words for it.

    The result is a HardwareError, but an ImageError if the TSS's library for this kind of connection is
    missing.
    """
    number = int(rc) & 0xFFFFFFFF
    layer, code = number >> 16 & 0xFF, number & 0xFFFF
    found = f"0x{number:08x} from the {_LAYERS.get(layer, f'layer {layer}')}: {text}"
    expected = f"{command} succeeds"
    if layer == _TCTI and code == _TCTI_NOT_SUPPORTED:
        return ImageError(
            f"The TSS has no library to reach {tpm} with.",
            code="tpm.no-tcti",
            expected=expected,
            found=found,
            todo="Put libtss2-tcti-device.so.0 into the initramfs (Kagimori's hook does); check the TCTI.",
        )
    meaning = _UNKNOWN
    if layer in _TPM_LAYERS:
        meaning = _MEANINGS.get(code & _FORMAT_ONE_MASK if code & _FORMAT_ONE else code, _UNKNOWN)
    elif layer == _TCTI:
        meaning = _TCTI_MEANING
    return HardwareError(
        f"{command} failed on {tpm}.", code=meaning.code, expected=expected, found=found, todo=meaning.todo
    )
