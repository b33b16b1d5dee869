"""The load generator: a process of its own that lets many VMs attest at once, and counts.

    python -m bench.load DIRECTORY < job (JSON) > result (JSON)

One attestation is challenge, release and confirm(opened), each over a connection of its own as kagimori-agent makes
them. EKs, HPKE keys and machines are made before the clock starts, one a thread; AKs, reports, quotes and opened answers
are made as the clock runs, here, never in the verifier's processes. A thread is one host with one chip, and takes its
VMs by chance.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import random
import socket
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from bench.guest import Attempt, SoftwareTpm
from bench.worlds import World

from kagimori_protocol.messages import PATH_CHALLENGE, PATH_CONFIRM, PATH_RELEASE
from kagimori_protocol.sealing import ResponseKey

TPMS: Final = 4
TIMEOUT_S: Final = 60
MOST_S: Final = 45
"""How long a measurement is drawn out while no attestation has ended in it: a busy machine, or a tiny measurement."""
_TICKS: Final = os.sysconf("SC_CLK_TCK")


class Job(NamedTuple):
    """What to do: ask ``ports`` in turn with ``threads`` VMs at once, ``warm_s`` uncounted, then ``seconds`` counted."""

    ports: list[int]
    pids: list[int]
    public_key: str
    threads: int
    warm_s: float
    seconds: float
    keep_alive: bool


@dataclass
class Tally:
    """What one thread has seen: when each attestation ended, and how long each request took."""

    ended: list[float] = field(default_factory=list)
    took: dict[str, list[float]] = field(default_factory=dict)


class Line:
    """HTTP/1.1 without a library, so that the generator costs little: a connection per request, or one for all."""

    def __init__(self, port: int, *, keep_alive: bool) -> None:
        """Connect at the first request."""
        self._port = port
        self._keep_alive = keep_alive
        self._socket: socket.socket | None = None

    def post(self, path: str, body: bytes) -> bytes:
        """Post and give the body of a reply with status 200; raises ValueError for any other."""
        connection = self._socket or socket.create_connection(("127.0.0.1", self._port), TIMEOUT_S)
        kept = "keep-alive" if self._keep_alive else "close"
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nAccept: application/json\r\n"
            f"Accept-Encoding: identity\r\nConnection: {kept}\r\nContent-Type: application/json\r\n"
            f"User-Agent: kagimori-bench\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        received = b""
        while b"\r\n\r\n" not in received:
            received += _some(connection)
        headers, _, content = received.partition(b"\r\n\r\n")
        lines = headers.decode().lower().split("\r\n")
        size = next(int(line.partition(":")[2]) for line in lines if line.startswith("content-length:"))
        while len(content) < size:
            content += _some(connection)
        if self._keep_alive:
            self._socket = connection
        else:
            connection.close()
        if " 200 " not in lines[0] + " ":
            raise ValueError(lines[0] + content.decode(errors="replace"))
        return content


def _some(connection: socket.socket) -> bytes:
    part = connection.recv(1 << 16)
    if not part:
        raise ConnectionError
    return part


def cpu_s(pid: int) -> float:
    """Give the processor seconds that a process has used, in user and in system mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


class Generator:
    """Threads that attest until told to stop."""

    def __init__(self, world: World, job: Job) -> None:
        """Make keys and Hellos ahead."""
        self._world = world
        self._job = job
        self._stop = threading.Event()
        self._tpms = [SoftwareTpm() for _ in range(TPMS)] if world.kind == "svsm-vtpm" else [None]
        self._machines = [world.machine() for _ in range(job.threads)]
        for machine in self._machines:
            machine.vek()
        self._keys = [ResponseKey([os.urandom(64)]) for _ in range(job.threads)]
        self._tallies = [Tally() for _ in range(job.threads)]
        self._failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def _count(self, started: float) -> None:
        """Wait until the time is over and something was counted, or until it is clear that nothing will be."""
        time.sleep(self._job.seconds)
        while (
            time.monotonic() < started + MOST_S and self._failures.empty() and not self._ended_since(started)
        ):
            time.sleep(0.1)

    def _ended_since(self, started: float) -> int:
        return sum(at >= started for tally in self._tallies for at in tally.ended)

    def run(self) -> dict[str, Any]:
        """Attest; gives what was counted."""
        threads = [threading.Thread(target=self._one, args=(number,)) for number in range(self._job.threads)]
        for thread in threads:
            thread.start()
        time.sleep(self._job.warm_s)
        started, own = time.monotonic(), time.process_time()
        before = [cpu_s(pid) for pid in self._job.pids]
        self._count(started)
        ended, own = time.monotonic(), time.process_time() - own
        used = [cpu_s(pid) - then for pid, then in zip(self._job.pids, before, strict=True)]
        self._stop.set()
        for thread in threads:
            thread.join()
        if not self._failures.empty():
            raise self._failures.get()
        done = sum(started <= at < ended for tally in self._tallies for at in tally.ended)
        return {
            "attestations": done,
            "seconds": ended - started,
            "verifier_cpu_s": used,
            "generator_cpu_s": own,
            "median_ms": {
                path: statistics.median(
                    itertools.chain.from_iterable(t.took.get(path, []) for t in self._tallies)
                )
                * 1000
                for path in (PATH_CHALLENGE, PATH_RELEASE, PATH_CONFIRM)
            },
        }

    def _one(self, number: int) -> None:
        try:
            chance = random.Random(number)
            port = self._job.ports[number % len(self._job.ports)]
            line = Line(port, keep_alive=self._job.keep_alive)
            while not self._stop.is_set():
                self._attest(chance, number, line)
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            self._failures.put(error)

    def _attest(self, chance: random.Random, number: int, line: Line) -> None:
        vm = chance.choice(self._world.asking)
        tally, key = self._tallies[number], bytes.fromhex(self._job.public_key)
        attempt = Attempt(vm, self._tpms[number % len(self._tpms)], self._keys[number])
        machine = self._world.on(self._machines[number], vm)

        def ask(path: str, body: bytes) -> bytes:
            then = time.monotonic()
            reply = line.post(path, body)
            tally.took.setdefault(path, []).append(time.monotonic() - then)
            return reply

        challenge = ask(PATH_CHALLENGE, attempt.hello)
        evidence = attempt.evidence(machine, key, challenge)
        ask(PATH_CONFIRM, attempt.confirm(ask(PATH_RELEASE, evidence)))
        tally.ended.append(time.monotonic())


def main() -> None:
    """Read a job, do it, print what was counted."""
    world = World.load(Path(sys.argv[1]))
    job = Job(**json.load(sys.stdin))
    json.dump(Generator(world, job).run(), sys.stdout)


if __name__ == "__main__":
    main()
