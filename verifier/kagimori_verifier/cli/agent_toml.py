"""The agent.toml of an enrolled VM: everything that its agent has to know, and words about what it may change."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

DEFAULT_CAP: Final = 15


@dataclass(frozen=True, slots=True)
class AgentToml:
    """What a VM's agent is told. ``volumes`` are (UUID, mapping name); ``keys`` standard base64, the current one first."""

    vm_id: str
    kind: str
    verifier: str
    urls: list[str]
    keys: list[str]
    volumes: list[tuple[str, str]]
    cap_pcr: int

    def text(self) -> str:
        """Write it. Every string was checked when it came in, and JSON's strings are TOML's."""
        lines = [
            "# Belongs into the VM's initramfs as /etc/kagimori/agent.toml, and is measured with it.",
            "# Nothing in here is secret. Whoever changes it changes what the VM measures.",
            f"vm_id = {json.dumps(self.vm_id)}",
            f"kind = {json.dumps(self.kind)}          # a hint; the measurement decides",
            "",
            "[[verifiers]]",
            f"name = {json.dumps(self.verifier)}",
            f"urls = {json.dumps(self.urls)}",
            f"keys = {json.dumps(self.keys)}  # these prove that an answer is the verifier's; TLS need not",
            '# ca_file = "/etc/kagimori/ca.pem"   # only if https shall prove something, too',
        ]
        for uuid, name in self.volumes:
            lines += [
                "",
                "[[volumes]]",
                f"uuid = {json.dumps(uuid)}",
                f"name = {json.dumps(name)}          # in /dev/mapper",
            ]
        lines += [
            "",
            "[tpm]",
            'driver = "tpm_svsm"           # the kernel driver of the TPM that speaks for this boot',
            f"cap_pcr = {self.cap_pcr}                # closes the door after the boot",
        ]
        return "\n".join(lines) + "\n"
