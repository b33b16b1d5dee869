"""What a verifier counts, in Prometheus's text form. No label carries anything that a guest chose."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest


class Metrics:
    """Counters of one verifier process."""

    def __init__(self) -> None:
        """Start at zero, in a registry of its own."""
        self.registry = CollectorRegistry()
        self._replies = Counter(
            "kagimori_replies",
            "Signed replies by request path and status.",
            ["path", "status"],
            registry=self.registry,
        )
        self._unavailable = Counter(
            "kagimori_unavailable",
            "Requests answered with 503, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self._decisions = Counter(
            "kagimori_decisions",
            "Judged evidence by purpose and decision.",
            ["purpose", "decision"],
            registry=self.registry,
        )
        self._confirms = Counter(
            "kagimori_confirms", "Verified confirmations by outcome.", ["outcome"], registry=self.registry
        )
        self._seconds = Histogram(
            "kagimori_request_seconds", "Time to answer, by request path.", ["path"], registry=self.registry
        )

    def replied(self, path: str, status: int) -> None:
        """Count a signed reply."""
        self._replies.labels(path, str(status)).inc()

    def unavailable(self, reason: str) -> None:
        """Count a request that got no answer: ``store``, ``busy`` or ``rate``."""
        self._unavailable.labels(reason).inc()

    def decided(self, purpose: str, decision: str) -> None:
        """Count a decision that the ledger has."""
        self._decisions.labels(purpose, decision).inc()

    def confirmed(self, outcome: str) -> None:
        """Count a Confirm that the ledger has."""
        self._confirms.labels(outcome).inc()

    def took(self, path: str, seconds: float) -> None:
        """Record how long an answer took."""
        self._seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """Give all of it in Prometheus's text form."""
        return generate_latest(self.registry)
