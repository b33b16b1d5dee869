"""The verifier over HTTP: what it answers to whoever asks, and that only a signed reply is an answer."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import requests
from tests.worlds import DIRECT, VM, Owner

from kagimori_protocol import messages, signature
from kagimori_simulator.amd import AmdRoot
from kagimori_verifier.service import Reply, Service
from kagimori_verifier.store import sqlite

pytestmark = pytest.mark.slow  # the quick suite has three minutes

WAIT_S = 20
POSTS = (messages.PATH_CHALLENGE, messages.PATH_RELEASE, messages.PATH_CONFIRM)
HELLO = messages.encode(
    messages.Hello(
        version=1,
        vm_id=VM,
        purpose="dry-run",
        kind="snp-direct",
        hpke_public_key=bytes(messages.HPKE_PUBLIC_SIZE),
        volumes=[],
        agent="a test",
    )
)
CONFIRM = messages.encode(messages.Confirm(version=1, session=b"s", outcome="opened", mac=bytes(32)))


def post(owner: Owner, path: str, body: bytes) -> requests.Response:
    """Post bytes, without the proxies of the machine that tests run on."""
    with requests.Session() as session:
        session.trust_env = False
        return session.post(owner.url + path, data=body, timeout=WAIT_S)


def get(owner: Owner, path: str) -> requests.Response:
    """Get a page."""
    with requests.Session() as session:
        session.trust_env = False
        return session.get(owner.url + path, timeout=WAIT_S)


def verified(owner: Owner, body: bytes, reply: requests.Response) -> bytes:
    """Give the body of a reply that is an answer."""
    signature.verify([owner.public_key], reply.headers.get(signature.HEADER), body, reply.content)
    assert reply.headers["content-type"] == "application/json"
    return reply.content


def denied(owner: Owner, body: bytes, reply: requests.Response) -> str:
    """Give the code of a signed denial."""
    return messages.decode(messages.Denial, verified(owner, body, reply)).code


def assert_away(reply: requests.Response, status: int) -> None:
    """Hold that a reply is no answer, and says when to ask again."""
    assert reply.status_code == status
    assert signature.HEADER not in reply.headers
    assert int(reply.headers["retry-after"]) >= 1


def limited(new_verifier: Path, directory: Path, **limits: int) -> Path:
    """Copy a verifier and change its limits."""
    shutil.copytree(new_verifier, directory)
    path = directory / "verifier.toml"
    text, _, _ = path.read_text().partition("[limits]")
    path.write_text(f"{text}[limits]\n" + "".join(f"{name} = {value}\n" for name, value in limits.items()))
    return directory


@pytest.fixture
def impatient(
    tmp_path: Path, new_verifier: Path, amd: AmdRoot, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Owner]:
    """Give a verifier that waits for a locked database only briefly."""
    monkeypatch.setattr(sqlite, "BUSY_S", 0.1)
    shutil.copytree(new_verifier, tmp_path / "owner")
    with Owner.opened(tmp_path / "owner", amd) as owner, owner.served():
        yield owner


def test_a_hello_of_an_enrolled_vm_gets_a_signed_challenge_and_nothing_is_stored(owner: Owner) -> None:
    """Each asks anew; no reply is like another, and the ledger stays empty."""
    owner.enrol_profile("direct", "direct", "snp-direct", DIRECT)
    owner.enrol_vm(VM, "direct")
    replies = [post(owner, messages.PATH_CHALLENGE, HELLO) for _ in range(2)]
    challenges = [messages.decode(messages.Challenge, verified(owner, HELLO, reply)) for reply in replies]
    assert [reply.status_code for reply in replies] == [200, 200]
    assert challenges[0].nonce != challenges[1].nonce
    assert owner.ledger() == ()
    assert owner.refusals() == ()


def test_a_vm_that_is_not_enrolled_is_told_so_and_no_more(owner: Owner) -> None:
    """Unknown and disabled look the same from outside; the owner sees which."""
    unknown = post(owner, messages.PATH_CHALLENGE, HELLO)
    owner.enrol_profile("direct", "direct", "snp-direct", DIRECT)
    owner.enrol_vm(VM, "direct")
    owner.change_vm(VM, enabled=False)
    disabled = post(owner, messages.PATH_CHALLENGE, HELLO)
    assert unknown.status_code == disabled.status_code == 403
    assert verified(owner, HELLO, unknown) == verified(owner, HELLO, disabled)
    assert denied(owner, HELLO, unknown) == "unknown-vm"
    assert [(row.vm_id, row.code) for row in owner.refusals()] == [(VM, "vm.enabled")] * 2


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"{}", id="an empty object"),
        pytest.param(b"not JSON", id="no JSON"),
        pytest.param(b"\xff\x00", id="no UTF-8"),
        pytest.param(b"[" * 50_000, id="lists in lists"),
        pytest.param(HELLO + b"\n", id="trailing bytes"),
    ],
)
def test_bytes_that_are_no_message_are_denied_with_a_signature(owner: Owner, path: str, body: bytes) -> None:
    """The agent learns from its own verifier that something changes its messages."""
    reply = post(owner, path, body)
    assert reply.status_code == 400
    assert denied(owner, body, reply) == "malformed"


@pytest.mark.parametrize("path", POSTS)
def test_another_version_gets_a_signed_list_of_those_spoken(owner: Owner, path: str) -> None:
    """So an agent can say who has to update; nobody negotiates inside a version."""
    body = b'{"type":"hello","version":2,"anything":"else"}'
    reply = post(owner, path, body)
    spoken = messages.decode(messages.VersionsSpoken, verified(owner, body, reply))
    assert reply.status_code == 400
    assert spoken.versions == [1]


def test_a_signature_covers_this_request_and_no_other(owner: Owner) -> None:
    """A reply cannot be moved to another question."""
    reply = post(owner, messages.PATH_CHALLENGE, b"{}")
    with pytest.raises(Exception, match="does not verify"):
        verified(owner, b"{ }", reply)


def test_a_confirm_of_nothing_is_denied(owner: Owner) -> None:
    """And kept for the owner's eyes."""
    reply = post(owner, messages.PATH_CONFIRM, CONFIRM)
    assert reply.status_code == 403
    assert denied(owner, CONFIRM, reply) == "not-authentic"
    assert owner.refusals()[0].code == "confirm.session"


@pytest.mark.parametrize("path", POSTS)
def test_only_post_is_answered_where_messages_go(owner: Owner, path: str) -> None:
    """A GET is refused by HTTP's own means, and is no answer."""
    reply = get(owner, path)
    assert reply.status_code == 405
    assert signature.HEADER not in reply.headers


def test_what_does_not_exist_is_not_found(owner: Owner) -> None:
    """No page but the six."""
    for path in ("/", "/v1/", "/v2/challenge", "/docs", "/openapi.json"):
        assert get(owner, path).status_code == 404


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_larger_than_any_message_is_not_read_to_its_end(owner: Owner, chunked: bool) -> None:
    """413, with or without an announced length."""
    body = b"x" * (messages.MAX_BODY + 1)
    with requests.Session() as session:
        session.trust_env = False
        data = iter([body]) if chunked else body
        reply = session.post(owner.url + messages.PATH_RELEASE, data=data, timeout=WAIT_S)
    assert reply.status_code == 413
    assert signature.HEADER not in reply.headers


def test_the_largest_body_is_still_judged(owner: Owner) -> None:
    """The bound is the protocol's."""
    body = b"x" * messages.MAX_BODY
    assert denied(owner, body, post(owner, messages.PATH_RELEASE, body)) == "malformed"


def test_a_source_that_asks_too_often_waits_as_long_as_it_is_told(
    tmp_path: Path, new_verifier: Path, amd: AmdRoot
) -> None:
    """429 without a signature: to an agent the verifier is away."""
    directory = limited(
        new_verifier, tmp_path / "owner", requests_per_minute_and_source=1, burst_per_source=2
    )
    with Owner.opened(directory, amd) as owner, owner.served():
        assert [post(owner, messages.PATH_CHALLENGE, b"{}").status_code for _ in range(2)] == [400, 400]
        reply = post(owner, messages.PATH_CHALLENGE, b"{}")
        assert_away(reply, 429)
        assert int(reply.headers["retry-after"]) > 50
        assert get(owner, "/healthz").status_code == 200


def test_a_verifier_that_is_busy_says_so_at_once(
    tmp_path: Path, new_verifier: Path, amd: AmdRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond its places for answers it makes nobody wait: 503, and ask again."""
    working, go_on = threading.Event(), threading.Event()
    challenge = Service.challenge

    def slow(self: Service, request: bytes, source: str, pinned: str) -> Reply:
        working.set()
        go_on.wait(WAIT_S)
        return challenge(self, request, source, pinned)

    monkeypatch.setattr(Service, "challenge", slow)
    directory = limited(new_verifier, tmp_path / "owner", concurrent_requests=1)
    with Owner.opened(directory, amd) as owner, owner.served():
        first: list[int] = []
        thread = threading.Thread(
            target=lambda: first.append(post(owner, messages.PATH_CHALLENGE, b"{}").status_code)
        )
        thread.start()
        assert working.wait(WAIT_S)
        try:
            assert_away(post(owner, messages.PATH_CONFIRM, CONFIRM), 503)
        finally:
            go_on.set()
            thread.join(WAIT_S)
        assert first == [400]
        assert post(owner, messages.PATH_CONFIRM, CONFIRM).status_code == 403
        assert 'kagimori_unavailable_total{reason="busy"} 1.0' in get(owner, "/metrics").text


def test_a_locked_database_is_no_answer(impatient: Owner) -> None:
    """503 without a signature; when the lock is gone the same request is answered."""
    with sqlite3.connect(impatient.directory / "verifier.db", isolation_level=None) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        reply = post(impatient, messages.PATH_CONFIRM, CONFIRM)
        assert_away(reply, 503)
        assert reply.text == "store.locked\n"
        holder.execute("ROLLBACK")
    holder.close()
    assert post(impatient, messages.PATH_CONFIRM, CONFIRM).status_code == 403


def test_a_denial_needs_no_database(impatient: Owner) -> None:
    """What cannot be read is refused whether or not the refusal can be kept."""
    with sqlite3.connect(impatient.directory / "verifier.db", isolation_level=None) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        assert denied(impatient, b"{}", post(impatient, messages.PATH_CHALLENGE, b"{}")) == "malformed"
        holder.execute("ROLLBACK")
    holder.close()
    assert impatient.refusals() == ()


def test_a_verifier_whose_database_is_gone_lives_but_is_not_ready(owner: Owner) -> None:
    """Healthz is about the process, readyz about what it needs; no question gets an answer."""
    assert (get(owner, "/healthz").text, get(owner, "/readyz").text) == ("alive\n", "ready\n")
    (owner.directory / "verifier.db").unlink()
    assert get(owner, "/healthz").status_code == 200
    assert_away(get(owner, "/readyz"), 503)
    assert_away(post(owner, messages.PATH_CHALLENGE, HELLO), 503)
    assert_away(post(owner, messages.PATH_CONFIRM, CONFIRM), 503)
    assert not (owner.directory / "verifier.db").exists()


def test_metrics_count_what_happened_and_carry_nothing_that_a_guest_chose(owner: Owner) -> None:
    """No label has a VM's name, a session or a code from outside."""
    post(owner, messages.PATH_CHALLENGE, HELLO)
    post(owner, messages.PATH_CONFIRM, CONFIRM)
    reply = get(owner, "/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'kagimori_replies_total{path="challenge",status="403"} 1.0' in reply.text
    assert 'kagimori_replies_total{path="confirm",status="403"} 1.0' in reply.text
    assert VM not in reply.text


def serving(directory: Path, *options: str) -> subprocess.Popen[str]:
    """Start `serve` as its own process."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "kagimori_verifier", "--config", str(directory / "verifier.toml")),
            *("serve", *options),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_answers_and_ends_cleanly_when_told(office: Owner, number: signal.Signals) -> None:
    """Exit code 0, no traceback, and every line of its log is JSON."""
    with serving(office.directory, "--json") as process:
        assert process.stdout is not None
        listening = json.loads(process.stdout.readline())
        assert listening["pid"] == process.pid
        office.url = listening["url"]
        assert denied(office, b"{}", post(office, messages.PATH_CHALLENGE, b"{}")) == "malformed"
        process.send_signal(number)
        out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, err
    assert out == ""
    lines = [json.loads(line) for line in err.splitlines()]
    assert "refused" in {line.get("event") for line in lines}


def test_serve_ends_even_if_it_is_told_at_once(office: Owner) -> None:
    """A signal between the bound socket and the first request is not lost."""
    with serving(office.directory, "--json") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=WAIT_S)
    assert process.returncode == 0


def test_serve_names_a_port_that_is_in_use(office: Owner) -> None:
    """Exit code 3, what was found, and what to do; with --json one value on stdout."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        path = office.directory / "verifier.toml"
        path.write_text(path.read_text().replace('"127.0.0.1:0"', f'"127.0.0.1:{port}"'))
        with serving(office.directory, "--json") as process:
            out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 3
    error = json.loads(out)["error"]
    assert error["code"] == "serve.bind"
    assert str(port) in error["what"]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("change", "code"),
    [
        pytest.param(("127.0.0.1:0", "no.such.name.invalid:0"), "serve.bind", id="a name that is none"),
        pytest.param(("127.0.0.1:0", "a..b:0"), "serve.bind", id="an empty label"),
        pytest.param(("127.0.0.1:0", "192.0.2.1:0"), "serve.bind", id="another machine's address"),
        pytest.param(
            ("[kek]", '[tls]\ncertificate = "c.pem"\nkey = "k.pem"\n[kek]'),
            "serve.tls",
            id="TLS without files",
        ),
        pytest.param(('path = "kek"', 'path = "other"'), "kek.read", id="no KEK"),
    ],
)
def test_serve_names_what_keeps_it_from_serving(
    office: Owner, capsys: pytest.CaptureFixture[str], change: tuple[str, str], code: str
) -> None:
    """In process: nothing is served, so no signal handler stays."""
    from kagimori_verifier.cli import main

    path = office.directory / "verifier.toml"
    path.write_text(path.read_text().replace(*change))
    before = signal.getsignal(signal.SIGTERM)
    assert main(["--config", str(path), "serve", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["code"] == code
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_database_of_another_kek_is_not_served(office: Owner, capsys: pytest.CaptureFixture[str]) -> None:
    """Found before a guest asks, not when a key has to be unwrapped."""
    from kagimori_verifier.cli import main

    (office.directory / "kek").write_bytes(os.urandom(32))
    assert main(["--config", str(office.directory / "verifier.toml"), "--json", "serve"]) == 3
    assert msgspec.json.decode(capsys.readouterr().out)["error"]["code"] == "kek.other"
