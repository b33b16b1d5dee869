"""An owner's appraisal policy for a group of VMs: what a profile holds, as data.

Every list names what is allowed or demanded; what is not named is refused. Flag names are AMD's
(kagimori_protocol.snp), ``bit N`` for those that have no name yet.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from kagimori_protocol.errors import OperatorError
from kagimori_protocol.snp import TcbVersion
from kagimori_verifier.roots import PRODUCTS

BootWay = Literal["grub", "uki", "direct"]
Door = Literal[
    "credentials",
    "resume",
    "gpt-auto",
    "rescue-shell",
    "emergency",
    "panic",
    "break",
    "init",
    "debug-shell",
    "units",
    "crash-dump",
    "debugger",
    "acpi-tables",
    "reading",
    "command-line",
]
"""What a command line may leave open (``command_line``); the last is one whose text nobody knows."""
DOORS: Final[tuple[Door, ...]] = get_args(Door)

_FIRMWARE: Final = frozenset({0, 1, 2, 3, 4, 5, 7})

GOVERNED_PCRS: Final[dict[BootWay, frozenset[int]]] = {
    "grub": _FIRMWARE | {8, 9, 14},
    "uki": _FIRMWARE | {9, 11, 12, 13},
    "direct": _FIRMWARE | {9},
}
"""The least that each boot way governs. A policy may add to it, never take away."""

VM_OWNED_PCRS: Final[dict[BootWay, frozenset[int]]] = {
    "grub": frozenset({8, 9}),
    "uki": frozenset({4, 9, 11, 12, 13}),
    "direct": frozenset({9}),
}
"""PCRs that cover an initramfs or a command line: their values belong to one VM, never to a shared profile.

A shared value would let one VM boot with another's vm_id. In a UKI the initramfs is part of the image that
PCR 4 has.
"""

NEVER_ALLOWED: Final = frozenset({"DEBUG"})
"""The host may read and write the memory of a guest that permits debugging; no policy can want that."""

Spl = Annotated[int, Meta(ge=0, le=255)]
PcrIndex = Annotated[int, Meta(ge=0, le=23)]
CapPcr = Annotated[int, Meta(ge=8, le=15)]
"""One that the firmware leaves at zero; from 16 on, a guest can reset them and so undo the cap (TCG PC Client Platform
Firmware Profile, PCR usage). agent.toml has the same bounds."""
Bits = Annotated[int, Meta(ge=0)]
CommandLine = Annotated[str, Meta(min_length=1, max_length=4096, pattern=r"\A[^\x00-\x1f\x7f]*\Z")]


class TcbFloor(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The lowest acceptable security version numbers; ``fmc`` on Turin only."""

    boot_loader: Spl
    tee: Spl
    snp: Spl
    microcode: Spl
    fmc: Spl | None = None

    def as_tcb(self) -> TcbVersion:
        """Give the floor in the same terms as what it is compared with."""
        return TcbVersion(self.fmc, self.boot_loader, self.tee, self.snp, self.microcode)


class Policy(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a VM of this profile must show."""

    boot_way: BootWay
    tcb_floors: dict[str, TcbFloor]
    """By product line; a product without a floor is refused, so this is the list of products too."""
    signers: Annotated[list[Literal["vcek", "vlek"]], Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: ["vcek"]
    )
    csp_ids: list[str] = msgspec.field(default_factory=list)
    """Cloud providers whose VLEK is accepted, as the certificate names them."""
    any_chip: bool = False
    """Accept every chip that AMD's root vouches for; otherwise a VM names the CHIP_IDs it may run on."""
    guest_policy_allowed: list[str] = msgspec.field(
        default_factory=lambda: [
            "RESERVED_MUST_BE_ONE",
            "SMT",
            "SINGLE_SOCKET",
            "MEM_AES_256_XTS",
            "RAPL_DIS",
            "CIPHERTEXT_HIDING_DRAM",
            "PAGE_SWAP_DISABLE",
        ]
    )
    guest_policy_required: list[str] = msgspec.field(default_factory=list)
    platform_allowed: list[str] = msgspec.field(
        default_factory=lambda: [
            "SMT_EN",
            "TSME_EN",
            "ECC_EN",
            "RAPL_DIS",
            "CIPHERTEXT_HIDING_DRAM_EN",
            "ALIAS_CHECK_COMPLETE",
            "IOMMU_WRITE_SAFE",
        ]
    )
    platform_required: list[str] = msgspec.field(default_factory=list)
    launch_mitigations: Bits = 0
    """Bits that LAUNCH_MIT_VECTOR must have; reports before version 5 have none."""
    current_mitigations: Bits = 0
    revocation: Literal["required", "if-present"] = "required"
    extra_pcrs: list[PcrIndex] = msgspec.field(default_factory=list)
    cap_pcr: CapPcr = 15
    command_lines: Annotated[list[CommandLine], Meta(max_length=64)] = msgspec.field(default_factory=list)
    """Texts of command lines, for boot ways whose log holds nothing but their digest; without QEMU's ``initrd=initrd``."""
    accepted_doors: list[Door] = msgspec.field(default_factory=list)
    """What a command line may leave open; all other doors must be closed."""

    @property
    def governed_pcrs(self) -> tuple[int, ...]:
        """PCRs that must be explained, in order; the cap is not among them."""
        return tuple(sorted(GOVERNED_PCRS[self.boot_way] | set(self.extra_pcrs)))

    @property
    def quoted_pcrs(self) -> tuple[int, ...]:
        """PCRs that must be quoted: the governed ones and the cap."""
        return tuple(sorted({*self.governed_pcrs, self.cap_pcr}))


_DECODER: Final = msgspec.json.Decoder(Policy)
"""Made by whoever imports this, since two threads that made it at once would die of it (kagimori_protocol.messages)."""


def parse_policy(text: str | bytes) -> Policy:
    """Read a policy from JSON. Raises OperatorError, naming what is wrong."""
    try:
        policy = _DECODER.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _wrong("the fields of docs/policy.md", str(error)) from error
    return check_policy(policy)


def check_policy(policy: Policy) -> Policy:
    """Return a policy that makes sense, or raise OperatorError."""
    unknown = sorted(set(policy.tcb_floors) - set(PRODUCTS))
    if unknown or not policy.tcb_floors:
        raise _wrong(f"a TCB floor for one or more of {', '.join(PRODUCTS)}", ", ".join(unknown) or "none")
    for product, floor in policy.tcb_floors.items():
        if (product == "Turin") != (floor.fmc is not None):
            raise _wrong("fmc in Turin's floor and in no other", f"{product}: {floor.as_tcb()}")
    if never := sorted(NEVER_ALLOWED & {*policy.guest_policy_allowed, *policy.guest_policy_required}):
        raise _wrong("no policy that lets the host debug the guest", ", ".join(never))
    if policy.cap_pcr in policy.governed_pcrs:
        raise _wrong("a cap PCR that the boot does not use", f"PCR {policy.cap_pcr}")
    if "vlek" in policy.signers and not policy.csp_ids:
        raise _wrong("csp_ids beside the signer vlek: whose VLEK it may be", "none")
    return policy


def _wrong(expected: str, found: str) -> OperatorError:
    return OperatorError(
        "An appraisal policy makes no sense.",
        code="policy.invalid",
        expected=expected,
        found=found,
        todo="Correct the profile: `kagimori-verifier profile show NAME` prints it.",
    )
