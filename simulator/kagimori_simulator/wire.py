"""The host's hands on the wire: record what an agent sent, change it, send it again."""

from __future__ import annotations

from typing import Any

import msgspec
import requests

from kagimori_protocol import messages
from kagimori_protocol.messages import Answer, ChallengeReply

_TIMEOUT_S = 10


class Wire:
    """Talks to one verifier without any key: whoever sits on the network can do this."""

    def __init__(self, url: str) -> None:
        """Remember where the verifier is."""
        self._url = url

    def post(self, path: str, body: bytes) -> bytes:
        """Send a body, return the reply's; signatures are not this attacker's concern."""
        return requests.post(self._url + path, data=body, timeout=_TIMEOUT_S).content

    def challenge(self, hello: bytes) -> tuple[bytes, ChallengeReply]:
        """Ask for a challenge with a recorded Hello."""
        body = self.post(messages.PATH_CHALLENGE, hello)
        return body, messages.decode_challenge_reply(body)

    def release(self, evidence: bytes) -> Answer:
        """Send evidence."""
        return messages.decode_answer(self.post(messages.PATH_RELEASE, evidence))

    def replay(self, hello: bytes, evidence: bytes, *, fresh: bool, **changes: Any) -> Answer:  # noqa: ANN401 - fields of Evidence
        """Send recorded evidence again, with a ``fresh`` challenge in place of the recorded one, or with ``changes``."""
        recorded = messages.decode(messages.Evidence, evidence)
        if fresh:
            body, _ = self.challenge(hello)
            key = recorded.challenges[0].key
            changes = {"challenges": [messages.SignedChallenge(key=key, challenge=body)], **changes}
        return self.release(messages.encode(msgspec.structs.replace(recorded, **changes)))
