"""Real verifier processes, each on the processor that it is told, and the load generator against them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench.load import Job
from bench.worlds import ROOT, World

from kagimori_verifier import app

WAIT_S: Final = 60


@dataclass(frozen=True)
class Served:
    """A verifier process: where it listens."""

    pid: int
    port: int


@dataclass(frozen=True)
class Measured:
    """What a run of the generator gave. Times in seconds of processor or of clock, as they are named."""

    attestations: int
    seconds: float
    verifier_cpu_s: float
    generator_cpu_s: float
    median_ms: dict[str, float]

    @property
    def per_second(self) -> float:
        """Attestations by the clock."""
        return self.attestations / self.seconds

    @property
    def cpu_ms(self) -> float:
        """Processor milliseconds of all verifier processes for one attestation."""
        return self.verifier_cpu_s / self.attestations * 1000

    @property
    def busy(self) -> float:
        """How many processors the verifier processes used."""
        return self.verifier_cpu_s / self.seconds

    @property
    def generator(self) -> float:
        """How many processors the generator used."""
        return self.generator_cpu_s / self.seconds


@contextlib.contextmanager
def served(world: World, cpus: Sequence[int]) -> Iterator[list[Served]]:
    """Run one `kagimori-verifier serve` on each of ``cpus``, all on one database, each with its own settings."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(_one(world, name, cpu))
            for cpu, name in zip(cpus, ("verifier.toml", "second.toml"), strict=False)
        ]


@contextlib.contextmanager
def _one(world: World, settings: str, cpu: int) -> Iterator[Served]:
    config = str(world.directory / settings)
    command = ["taskset", "-c", str(cpu), sys.executable, "-m", "kagimori_verifier", "--config", config]
    with (
        (world.directory / f"{settings}.log").open("ab") as log,
        subprocess.Popen(
            [*command, "serve", "--json"], stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None  # noqa: S101 - a pipe was asked for
            listening = json.loads(process.stdout.readline())
            yield Served(listening["pid"], int(listening["url"].rpartition(":")[2]))
        finally:
            process.terminate()
            process.wait(WAIT_S)


def attest(  # noqa: PLR0913 - a job, by name
    world: World,
    verifiers: Sequence[Served],
    *,
    cpus: str,
    threads: int,
    seconds: float,
    warm_s: float = 1.0,
    keep_alive: bool = False,
) -> Measured:
    """Let VMs attest against running verifiers; the generator runs on ``cpus`` (a list for taskset)."""
    job = Job(
        ports=[one.port for one in verifiers],
        pids=[one.pid for one in verifiers],
        public_key=_public_key(world),
        threads=threads,
        warm_s=warm_s,
        seconds=seconds,
        keep_alive=keep_alive,
    )
    done = subprocess.run(
        ["taskset", "-c", cpus, sys.executable, "-m", "bench.load", str(world.directory)],
        input=json.dumps(job._asdict()),
        stdout=subprocess.PIPE,
        check=True,
        cwd=ROOT,
        text=True,
        timeout=seconds + warm_s + WAIT_S,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    if not result["attestations"]:
        raise RuntimeError(f"no attestation ended in {seconds} s")
    return Measured(**result | {"verifier_cpu_s": sum(result["verifier_cpu_s"])})


def _public_key(world: World) -> str:
    verifier = app.open_verifier(world.settings())
    try:
        return verifier.keys.current.hex()
    finally:
        verifier.close()
