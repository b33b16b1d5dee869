"""Where the fields of an SEV-SNP attestation report lie. What they mean is in ``snp``.

A module of its own, because a guest that asks for a report looks at two of them, and waits for whatever it imports.

Source: AMD 56860 (SEV-SNP Firmware ABI), table "ATTESTATION_REPORT Structure"; all integers little-endian.
"""

from __future__ import annotations

from typing import Final, NamedTuple

REPORT_SIZE: Final = 0x4A0
SIGNED_SIZE: Final = 0x2A0
"""The signature covers the bytes [0, SIGNED_SIZE)."""

REPORT_DATA_SIZE: Final = 64
MEASUREMENT_SIZE: Final = 48
CHIP_ID_SIZE: Final = 64
TURIN_HWID_SIZE: Final = 8


class Field(NamedTuple):
    """Where a field of the report lies: ``offset`` and ``size`` in bytes."""

    offset: int
    size: int


FIELDS: Final[dict[str, Field]] = {
    "version": Field(0x000, 4),
    "guest_svn": Field(0x004, 4),
    "policy": Field(0x008, 8),
    "family_id": Field(0x010, 16),
    "image_id": Field(0x020, 16),
    "vmpl": Field(0x030, 4),
    "signature_algo": Field(0x034, 4),
    "current_tcb": Field(0x038, 8),
    "platform_info": Field(0x040, 8),
    "key_info": Field(0x048, 4),
    "report_data": Field(0x050, 64),
    "measurement": Field(0x090, 48),
    "host_data": Field(0x0C0, 32),
    "id_key_digest": Field(0x0E0, 48),
    "author_key_digest": Field(0x110, 48),
    "report_id": Field(0x140, 32),
    "report_id_ma": Field(0x160, 32),
    "reported_tcb": Field(0x180, 8),
    "cpuid_fam_id": Field(0x188, 1),
    "cpuid_mod_id": Field(0x189, 1),
    "cpuid_step": Field(0x18A, 1),
    "chip_id": Field(0x1A0, 64),
    "committed_tcb": Field(0x1E0, 8),
    "current_build": Field(0x1E8, 1),
    "current_minor": Field(0x1E9, 1),
    "current_major": Field(0x1EA, 1),
    "committed_build": Field(0x1EC, 1),
    "committed_minor": Field(0x1ED, 1),
    "committed_major": Field(0x1EE, 1),
    "launch_tcb": Field(0x1F0, 8),
    "launch_mit_vector": Field(0x1F8, 8),
    "current_mit_vector": Field(0x200, 8),
    "signature_r": Field(0x2A0, 72),
    "signature_s": Field(0x2E8, 72),
}
"""AMD 56860, table "ATTESTATION_REPORT Structure". What no field covers must be zero."""
