"""What the fields and bits of an attestation report mean, in a few words each.

Source: AMD 56860 (SEV-SNP Firmware ABI), tables "ATTESTATION_REPORT Structure", "Guest Policy Structure",
"PLATFORM_INFO" and "TCB_VERSION Structure".
"""

from __future__ import annotations

from typing import Final

FIELDS: Final = {
    "guest_svn": "version number of the guest, from its ID block",
    "vmpl": "privilege level that asked for the report; 0 is the highest",
    "family_id": "family of the guest, from its ID block",
    "image_id": "image of the guest, from its ID block",
    "report_data": "64 bytes that whoever asked for the report chose",
    "measurement": "launch digest: what the guest's memory held at its start",
    "host_data": "32 bytes that the host chose at launch",
    "id_key_digest": "SHA-384 of the key that signed the ID block; zero without one",
    "author_key_digest": "SHA-384 of the key that signed the ID key; zero without one",
    "report_id": "random name of this guest, for as long as it runs",
    "report_id_ma": "the same of its migration agent; all ones without one",
    "chip_id": "the chip; zero where the host masks it",
    "launch_mit_vector": "mitigations in force when the guest was launched",
    "current_mit_vector": "mitigations in force now",
}

POLICY: Final = {
    "SMT": "simultaneous multithreading is allowed",
    "RESERVED_MUST_BE_ONE": "no meaning; must be set",
    "MIGRATE_MA": "a migration agent may be associated with the guest",
    "DEBUG": "the host may read and change the guest's memory",
    "SINGLE_SOCKET": "the guest may run on one socket only",
    "CXL_ALLOW": "CXL devices and memory are allowed",
    "MEM_AES_256_XTS": "memory must be encrypted with AES-256-XTS",
    "RAPL_DIS": "power measurement (RAPL) must be disabled",
    "CIPHERTEXT_HIDING_DRAM": "ciphertext in memory must be hidden from the host",
    "PAGE_SWAP_DISABLE": "the host may not move or swap the guest's pages",
}

PLATFORM: Final = {
    "SMT_EN": "simultaneous multithreading is on",
    "TSME_EN": "all memory is encrypted (transparent SME)",
    "ECC_EN": "memory has error correction",
    "RAPL_DIS": "power measurement (RAPL) is disabled",
    "CIPHERTEXT_HIDING_DRAM_EN": "ciphertext in memory is hidden from the host",
    "ALIAS_CHECK_COMPLETE": "since the last reset, no two addresses were found to name the same memory",
    "IOMMU_WRITE_SAFE": "writes by devices are kept from the guest's memory; reserved before Turin",
    "TIO_EN": "trusted I/O (SEV-TIO) is on",
}

KEY_INFO: Final = {
    "AUTHOR_KEY_EN": "the ID key was signed by an author key",
    "MASK_CHIP_KEY": "the platform signs with no chip key: the signature is empty",
}

SIGNING_KEY: Final = {
    "vcek": "VCEK, the chip's own key",
    "vlek": "VLEK, a key that AMD lent to a cloud provider",
    "none": "none: the report is not signed",
}

TCB: Final = {
    "fmc": "first mutable code",
    "boot_loader": "boot loader of the secure processor",
    "tee": "operating system of the secure processor",
    "snp": "SNP firmware",
    "microcode": "microcode of all cores",
}

TCB_VERSIONS: Final = {
    "reported_tcb": "what the signing key was derived for",
    "committed_tcb": "what the platform cannot go back behind",
    "current_tcb": "what runs now",
    "launch_tcb": "what ran when the guest was launched",
}
