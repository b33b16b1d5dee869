"""A virtual TPM: a real swtpm on a UNIX socket, into which a measured boot can be played.

It behaves like COCONUT's vTPM: fresh seeds, so a fresh EK, at every start (give it a ``state`` directory to keep them,
which is how a clone is made). swtpm serves one client at a time: close what is open before the next one comes.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_CAP, TPM2_SU
from tpm2_pytss.ESAPI import ESAPI
from tpm2_pytss.TCTILdr import TCTILdr
from tpm2_pytss.types import (
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPML_DIGEST_VALUES,
    TPML_PCR_SELECTION,
    TPMS_PCR_SELECTION,
    TPMT_HA,
    TPMT_PUBLIC,
    TPMU_HA,
)

from kagimori_protocol.errors import HardwareError, ImageError, UsageError
from kagimori_protocol.tpm import EK_TEMPLATE_L1
from kagimori_simulator.event_log import BANKS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kagimori_simulator.event_log import MeasuredBoot

EVENT_LOG_PATH: Final = Path("tpm0") / "binary_bios_measurements"
"""Where the first TPM's log lies below securityfs, and below the directory given to ``Vtpm.start``."""

_READY_S: Final = 10.0
_POLL_S: Final = 0.005
_STOP_S: Final = 5.0
_BANK_NAMES: Final = {number: name for name, number in BANKS.items()}


@dataclass
class Vtpm:
    """A running swtpm. Make one with ``start``."""

    directory: Path
    socket_path: Path
    startup_locality: int
    process: subprocess.Popen[bytes] = field(repr=False)

    @classmethod
    @contextlib.contextmanager
    def start(
        cls, directory: Path, *, state: Path | None = None, startup_locality: int | None = None
    ) -> Iterator[Vtpm]:
        """Start a TPM and send TPM2_Startup; stop it whatever happens, also when this process dies.

        ``directory`` gets the event log. ``state`` keeps seeds and NV in that directory, and finds them there; without it
        they are made afresh and thrown away. Raises ImageError if swtpm is missing, HardwareError if it does not come up.
        """
        directory.mkdir(parents=True, exist_ok=True)
        # The socket has a short path of its own: sun_path takes 107 bytes, and test directories are longer.
        with tempfile.TemporaryDirectory(prefix="kagimori-vtpm-") as private:
            socket_path = Path(private) / "tpm"
            state_directory = state or Path(private) / "state"
            state_directory.mkdir(parents=True, exist_ok=True)
            log = Path(private) / "log"
            process = _spawn(socket_path, state_directory, log)
            try:
                _wait_until_ready(process, socket_path, log)
                vtpm = cls(directory, socket_path, startup_locality or 0, process)
                vtpm._startup()
                yield vtpm
            finally:
                _stop(process)

    @property
    def tcti(self) -> str:
        """How a TSS reaches this TPM."""
        return f"swtpm:path={self.socket_path}"

    @property
    def event_log_path(self) -> Path:
        """Where ``play`` writes the firmware's log."""
        return self.directory / EVENT_LOG_PATH

    @contextlib.contextmanager
    def connection(self) -> Iterator[ESAPI]:
        """Open the TPM as a client does; close it soon."""
        with ESAPI(self.tcti) as esapi:
            yield esapi

    def banks(self) -> tuple[str, ...]:
        """Name the active PCR banks, in the TPM's order."""
        with self.connection() as esapi:
            return _active_banks(esapi)

    def play(self, boot: MeasuredBoot) -> Path:
        """Extend every event of a boot into every active bank and write the log; returns the log's path.

        Raises UsageError if the boot says that another locality started the TPM.
        """
        if (boot.startup_locality or 0) != self.startup_locality:
            raise UsageError(
                "A boot and its TPM disagree on the startup locality.",
                expected=str(boot.startup_locality or 0),
                found=str(self.startup_locality),
                todo="Give Vtpm.start the same startup_locality as the boot's firmware.",
            )
        with self.connection() as esapi:
            banks = _active_banks(esapi)
            for event in boot.events:
                if event.extends:
                    _extend(esapi, event.pcr, {bank: event.digest(bank) for bank in banks})
        self.write_event_log(boot.event_log(banks))
        return self.event_log_path

    def write_event_log(self, log: bytes) -> None:
        """Put a log where securityfs would show it, whatever it says."""
        self.event_log_path.parent.mkdir(parents=True, exist_ok=True)
        self.event_log_path.write_bytes(log)

    def extend(self, pcr: int, digest: bytes) -> None:
        """Extend one PCR of the SHA-256 bank with a digest of 32 bytes, and log nothing."""
        with self.connection() as esapi:
            _extend(esapi, pcr, {"sha256": digest})

    def pcr(self, index: int, bank: str = "sha256") -> bytes:
        """Read one PCR."""
        bits = (1 << index).to_bytes(3, "little")
        chosen = TPMS_PCR_SELECTION(hash=TPM2_ALG(BANKS[bank]), sizeofSelect=3, pcrSelect=bits)
        with self.connection() as esapi:
            _, _, digests = esapi.pcr_read(TPML_PCR_SELECTION([chosen]))
            return bytes(digests[0])

    def ek_public(self) -> bytes:
        """Make the EK of template L-1, as every caller would get it, and give its TPMT_PUBLIC (314 bytes)."""
        template, _ = TPMT_PUBLIC.unmarshal(EK_TEMPLATE_L1)
        with self.connection() as esapi:
            handle, public, *_ = esapi.create_primary(
                TPM2B_SENSITIVE_CREATE(), TPM2B_PUBLIC(publicArea=template), ESYS_TR.RH_ENDORSEMENT
            )
            esapi.flush_context(handle)
            return bytes(public.publicArea.marshal())

    def _startup(self) -> None:
        with TCTILdr("swtpm", f"path={self.socket_path}") as tcti:
            tcti.set_locality(self.startup_locality)
            with ESAPI(tcti) as esapi:
                esapi.startup(TPM2_SU.CLEAR)
            tcti.set_locality(0)


def _spawn(socket_path: Path, state: Path, log: Path) -> subprocess.Popen[bytes]:
    """Run swtpm below setpriv, which makes the kernel kill it when this process dies."""
    programs = {name: shutil.which(name) for name in ("swtpm", "setpriv")}
    missing = [name for name, path in programs.items() if path is None]
    if missing:
        raise ImageError(
            f"The simulator needs {' and '.join(missing)}.",
            code="simulator.swtpm",
            todo="apt-get install swtpm util-linux",
        )
    command = [
        *("setpriv", "--pdeathsig", "KILL", "--", "swtpm", "socket", "--tpm2"),
        *("--server", f"type=unixio,path={socket_path}"),
        *("--ctrl", f"type=unixio,path={socket_path}.ctrl"),
        *("--tpmstate", f"dir={state}", "--flags", "not-need-init", "--log", f"file={log}"),
    ]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        close_fds=True,
    )


def _wait_until_ready(process: subprocess.Popen[bytes], socket_path: Path, log: Path) -> None:
    """Return as soon as both sockets take connections: the TCTI needs the one for data and the one for control."""
    deadline = time.monotonic() + _READY_S
    waiting = [str(socket_path), f"{socket_path}.ctrl"]
    while waiting:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(waiting[0])
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise HardwareError(
                        "swtpm did not come up.",
                        code="simulator.swtpm",
                        expected=f"it listens within {_READY_S:.0f} s",
                        found=log.read_text() if log.exists() else "no log",
                    ) from None
                time.sleep(_POLL_S)
            else:
                waiting.pop(0)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _active_banks(esapi: ESAPI) -> tuple[str, ...]:
    _, capability = esapi.get_capability(TPM2_CAP.PCRS, 0, len(BANKS) + 1)
    return tuple(
        _BANK_NAMES[int(bank.hash)] for bank in capability.data.assignedPCR if any(bytes(bank.pcrSelect))
    )


def _extend(esapi: ESAPI, pcr: int, digests: Mapping[str, bytes]) -> None:
    values: list[Any] = []
    for bank, digest in digests.items():
        values.append(TPMT_HA(hashAlg=TPM2_ALG(BANKS[bank]), digest=TPMU_HA(**{bank: digest})))
    esapi.pcr_extend(ESYS_TR(pcr), TPML_DIGEST_VALUES(values))
