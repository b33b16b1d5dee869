"""A Confirm that the boot could not deliver is kept, and sent again by the booted system until it is taken.

"Released" is not "opened" to a verifier until then (PROTOCOL.md section 5). What is kept is no secret: it travels in the
clear, and says one thing about one session that is over.

Import budget: ``msgspec``, that of ``exchange``.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import Meta, Struct

from kagimori_agent import exchange
from kagimori_agent.attempt import signed_no
from kagimori_agent.budget import Backoff, Budget
from kagimori_protocol import messages
from kagimori_protocol.errors import NetworkError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kagimori_agent.exchange import Endpoint

PATH: Final = Path("/run/kagimori/confirm")
MAX_BYTES: Final = 64 << 10
ATTEMPT_S: Final = 30.0
CONNECT_S: Final = 10.0
BACKOFF_MIN_S: Final = 1.0
BACKOFF_MAX_S: Final = 300.0


class Kept(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A Confirm as it is to be sent, and to whom."""

    name: str
    urls: list[str]
    keys: list[Annotated[bytes, Meta(min_length=32, max_length=32)]]
    ca_file: str | None
    body: bytes


def keep(endpoint: Endpoint, body: bytes, path: Path, *, make_place: bool = False) -> bool:
    """Keep a Confirm for the booted system; tell whether there is a place for it, which the boot's scripts make.

    ``make_place`` makes it where no script has, in a system whose boot had no agent: none of them takes the directory alone
    for a boot of the agent's, and its unit, started there, sends what it finds.
    """
    kept = Kept(
        name=endpoint.name,
        urls=list(endpoint.urls),
        keys=list(endpoint.keys),
        ca_file=None if endpoint.ca_file is None else str(endpoint.ca_file),
        body=body,
    )
    unfinished = path.with_name(f".{path.name}.new")
    try:
        if make_place:
            path.parent.mkdir(mode=0o700, exist_ok=True)
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(msgspec.json.encode(kept))
        unfinished.replace(path)
    except OSError:
        return False
    return True


def resend(
    say: Callable[[str], None], path: Path, *, sleep: Callable[[float], None] = time.sleep
) -> str | None:
    """Send what was kept until it is taken, and remove it; gives the verifier's name, or None if nothing is kept.

    Raises UsageError if what is there was not kept by us, and Refused or PeerError if the verifier's signed reply is
    no: that will not change, so it is removed then, too.
    """
    kept = _load(path)
    if kept is None:
        return None
    ca_file = None if kept.ca_file is None else Path(kept.ca_file)
    endpoint = exchange.Endpoint(kept.name, tuple(kept.urls), tuple(kept.keys), ca_file)
    backoff = Backoff(BACKOFF_MIN_S, BACKOFF_MAX_S)
    while True:
        try:
            reply = exchange.post(
                endpoint,
                messages.PATH_CONFIRM,
                kept.body,
                attempt_s=ATTEMPT_S,
                connect_s=CONNECT_S,
                budget=Budget(math.inf),
            )
        except NetworkError as error:
            wait_s = backoff.next_s()
            say(f"{error.what} The confirmation is sent again in {wait_s:.0f} s.")
            sleep(wait_s)
            continue
        path.unlink(missing_ok=True)
        message = messages.decode_confirm_reply(reply.body)
        if not isinstance(message, messages.Receipt):
            raise signed_no(endpoint, message)
        return endpoint.name


def _load(path: Path) -> Kept | None:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise _strange(path, f"more than {MAX_BYTES} bytes")
        return msgspec.json.decode(content, type=Kept)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _strange(path, str(error.strerror)) from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _strange(path, str(error)) from error


def _strange(path: Path, found: str) -> UsageError:
    return UsageError(
        "There is no confirmation that the agent has kept.",
        code="confirm.kept",
        expected=f"{path}, as `kagimori-agent unlock` writes it",
        found=found,
        todo="Remove the file: the verifier keeps the session as released, and not as opened.",
    )
