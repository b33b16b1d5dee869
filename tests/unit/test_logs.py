"""Logs are JSON lines on stderr, and no bytes are in them, whoever logs."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import structlog

from kagimori_verifier import logs


@pytest.fixture(autouse=True)
def _afterwards() -> Iterator[None]:
    """Put logging back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


def test_each_line_is_an_object_whoever_wrote_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Ours and a library's, with quotes, newlines and a traceback in them."""
    logs.to_stderr()
    structlog.get_logger("kagimori").info("replied", status=200)
    library = logging.getLogger("uvicorn.error")
    library.warning('a "quoted"\nwarning %s', "here")
    try:
        raise ValueError("of a library")
    except ValueError:
        library.exception("failed")
    library.info("not worth a line")
    out, err = capsys.readouterr()
    assert out == ""
    lines = [json.loads(line) for line in err.splitlines()]
    assert [line["event"] for line in lines] == ["replied", 'a "quoted"\nwarning here', "failed"]
    assert [line["level"] for line in lines] == ["info", "warning", "error"]
    assert lines[1]["logger"] == "uvicorn.error"
    assert "ValueError: of a library" in lines[2]["exception"]
    assert all(line["timestamp"].endswith("Z") for line in lines)


def test_bytes_are_never_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody logs a key; should somebody do, it is not in the log."""
    logs.to_stderr()
    structlog.get_logger("kagimori").info("mistake", key=b"\x01secret", deep={"keys": [b"\x01secret"]})
    (line,) = capsys.readouterr().err.splitlines()
    assert "secret" not in line
    assert json.loads(line)["key"] == "<bytes>"


def test_lines_follow_a_stderr_that_was_replaced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A logger that was used before holds on to no stream that may be closed by now."""
    logs.to_stderr()
    logger = structlog.get_logger("kagimori")
    logger.info("first")
    with io.StringIO() as other, monkeypatch.context() as replaced:
        replaced.setattr("sys.stderr", other)
        logger.info("second")
        logging.getLogger("uvicorn.error").warning("third")
        assert [json.loads(line)["event"] for line in other.getvalue().splitlines()] == ["second", "third"]
    logger.info("fourth")
    assert "fourth" in capsys.readouterr().err


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EFBIG, errno.EPIPE, errno.EIO])
def test_a_line_that_cannot_be_written_stops_nobody(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk behind stderr is full, or its reader has gone: a guest still gets its answer."""

    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(error, os.strerror(error))

        def flush(self) -> None:
            raise OSError(error, os.strerror(error))

    logs.to_stderr()
    with monkeypatch.context() as replaced:
        replaced.setattr("sys.stderr", Broken())
        structlog.get_logger("kagimori").warning("refused", code="session.fresh")
        logging.getLogger("uvicorn.error").warning("a library's")


@pytest.mark.parametrize("to_stderr", [False, True])
def test_the_tss_writes_no_line_of_its_own_about_what_guests_send(to_stderr: bool) -> None:
    """It would log each structure that it refuses, past JSON and past our bounds, for whoever sends evidence."""
    program = (
        "from kagimori_protocol import tpm; from kagimori_protocol.errors import Malformed; from kagimori_verifier import logs\n"
        f"{'logs.to_stderr()' if to_stderr else 'pass'}\n"
        "try: tpm.selected_pcrs(bytes([255]) * 60)\n"
        "except Malformed: pass\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TSS2_LOG"}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
    assert (b"TPML_PCR_SELECTION" in ran.stderr) != to_stderr  # without our word it does
