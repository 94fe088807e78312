"""The log: what nobody who stops reading it may do to the server."""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from process import Start, free_port, receive_all, request, tool
from trio.testing import MockClock

from trio_server import log as log_module
from trio_server.account import SHOWN, first_line
from trio_server.log import LAST_SECOND, JournalFormatter, Log, OncePerSecond
from trio_server.responder import REPLY

SLACK = 0.9  # seconds; a busy machine is late


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written, each time: without a thread, as these tests' clock is no real one."""
    texts: list[str] = []

    async def write(_: object, text: str) -> None:
        await trio.lowlevel.checkpoint()
        texts.append(text)

    monkeypatch.setattr(log_module, "write", write)
    return texts


@pytest.fixture
def stalled(tmp_path: Path) -> int:
    """Open a FIFO that nobody reads."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    return os.open(fifo, os.O_RDWR)


def test_a_reader_that_stalls_holds_up_neither_serving_nor_stopping(
    serve: Start, stalled: int
) -> None:
    process = serve("--delay", "0", stderr=stalled)
    report = subprocess.check_output(
        [tool("ab"), "-q", "-n", "5000", "-c", "20", process.url], text=True, timeout=60
    )
    assert "Complete requests:      5000\n" in report
    assert "Failed requests:        0\n" in report
    before = time.monotonic()
    assert process.stop(signal.SIGTERM) == 0
    assert time.monotonic() - before < 1 + LAST_SECOND + SLACK
    os.close(stalled)


def test_a_reader_that_comes_back_gets_the_lines_and_the_number_of_those_that_were_dropped(
    serve: Start, stalled: int
) -> None:
    program = """
import sys, trio_server.log as log, trio_server.__main__ as command
log.BUFFER_SIZE = 100
sys.argv[1:] = sys.argv[4:]
sys.exit(command.main())
"""
    small = (sys.executable, "-c", program)
    process = serve("--delay", "0", stderr=stalled, prefix=small)
    subprocess.check_call(
        [tool("ab"), "-q", "-n", "3000", "-c", "20", process.url], stdout=subprocess.DEVNULL
    )
    text, give_up = "", time.monotonic() + 10
    while "were dropped" not in text and time.monotonic() < give_up:
        text += os.read(stalled, 1 << 20).decode()
    assert process.stop() == 0
    text += os.read(stalled, 1 << 20).decode()
    dropped = sum(map(int, re.findall(r"WARNING (\d+) lines of this log were dropped", text)))
    # Each line is there or counted: 3,000 clients, the shutdown and its end, the counts.
    assert len(re.findall(r" answered in |SIGTERM: |stopped: ", text)) + dropped == 3002
    os.close(stalled)


@pytest.mark.parametrize("stderr", ["/dev/full", "closed"])
def test_a_log_that_cannot_be_written_is_no_reason_to_stop(stderr: str, serve: Start) -> None:
    redirected = "2>&-" if stderr == "closed" else f"2>{stderr}"
    process = serve("--delay", "0", prefix=("sh", "-c", f'exec "$@" {redirected}', "sh"))
    for _ in range(20):
        with process.connect() as client:
            client.sendall(b"hi")
            assert receive_all(client) == REPLY
    assert process.stop() == 0


def test_lines_that_are_left_at_the_end_are_written(serve: Start) -> None:
    process = serve("--delay", "0")
    with process.connect() as client:
        client.sendall(b"hi")
        assert receive_all(client) == REPLY
    assert process.stop() == 0
    *_, last = lines = process.stderr.splitlines()
    assert len(lines) == 3
    assert " INFO stopped: 1 answered, " in last


def test_in_the_journal_each_line_has_its_priority_and_no_time(
    start: Start, tmp_path: Path
) -> None:
    with (tmp_path / "journal").open("wb") as journal:
        stat = os.fstat(journal.fileno())
        process = start(
            "--host=127.0.0.1",
            "--port=0",
            stderr=journal,
            env={**os.environ, "JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino}"},
        )
        process.wait_for_banner()
        assert process.stop() == 0
    lines = (tmp_path / "journal").read_text().splitlines()
    assert [line[:9] for line in lines] == ["<6>SIGTER", "<6>stoppe"]


def test_somebody_elses_journal_is_not_ours(serve: Start) -> None:
    process = serve(env={**os.environ, "JOURNAL_STREAM": "1:2"})
    assert process.stop() == 0
    assert re.match(r"[\d-]{10} [\d:]{8} INFO SIGTERM", process.stderr)


def test_each_line_of_a_traceback_has_the_priority() -> None:
    boom = ValueError("boom")
    exc_info = (ValueError, boom, None)
    record = logging.makeLogRecord({"msg": "failed", "levelname": "ERROR", "exc_info": exc_info})
    lines = JournalFormatter().format(record).splitlines()
    assert lines[0] == "<3>failed"
    assert lines[-1] == "<3>ValueError: boom"
    assert all(line.startswith("<3>") for line in lines)


def test_of_the_complaints_at_the_file_limit_one_a_second_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    shown = OncePerSecond()
    record = logging.makeLogRecord({"exc_info": (ValueError, ValueError(), None)})
    passed = []
    for _ in range(25):
        passed.append(shown.filter(record))
        now += 0.1
    assert passed.count(True) == 3
    assert record.exc_info is None


async def test_what_has_gathered_is_written_at_once(
    nursery: trio.Nursery, autojump_clock: MockClock, written: list[str]
) -> None:
    log = Log()
    nursery.start_soon(log.run)
    for number in range(500):
        log.say(f"line {number}")
    await trio.sleep(1)
    assert written == ["".join(f"line {number}\n" for number in range(500))]
    log.say("the last")
    log.end()
    await trio.sleep(1)
    assert written[1:] == ["the last\n"]


async def test_without_a_thread_lines_are_lost_and_nothing_else(no_threads: None) -> None:
    log = Log()
    log.say("lost")
    log.end()
    await log.run()


def fill(descriptor: int) -> None:
    """Leave no room in a pipe, and leave it blocking."""
    os.set_blocking(descriptor, False)
    with suppress(BlockingIOError):
        while True:
            os.write(descriptor, b"x")
    os.set_blocking(descriptor, True)


def test_a_start_that_fails_ends_although_nobody_reads_why(serve: Start, start: Start) -> None:
    reader, writer = os.pipe()
    fill(writer)
    port = str(serve().port)
    process = start("--host", "127.0.0.1", "--port", port, stderr=writer)
    assert process.wait() == 1
    os.close(reader)
    os.close(writer)


def test_nobody_reads_stdout_and_it_serves_and_stops(start: Start) -> None:
    reader, writer = os.pipe()
    fill(writer)
    port = free_port("127.0.0.1")
    process = start("--host", "127.0.0.1", "--port", str(port), "--delay", "0", stdout=writer)
    process.wait_until(lambda: request(("127.0.0.1", port)) == "answered")
    assert process.stop() == 0
    os.close(reader)
    os.close(writer)


def test_a_stderr_that_somebody_has_made_non_blocking_gets_each_line(serve: Start) -> None:
    reader, writer = os.pipe()
    process = serve("--delay", "0", stderr=writer)
    os.set_blocking(writer, False)
    subprocess.check_call(
        [tool("ab"), "-q", "-n", "2000", "-c", "20", process.url], stdout=subprocess.DEVNULL
    )
    text = ""
    while text.count(" answered in ") < 2000:
        text += os.read(reader, 100_000).decode()
    assert process.stop() == 0
    os.close(writer)
    text += "".join(iter(lambda: os.read(reader, 100_000).decode(), ""))
    os.close(reader)
    assert all(re.match(r"\d{4}-\d\d-\d\d [\d:]{8} INFO ", line) for line in text.splitlines())


async def test_with_a_full_buffer_the_count_and_what_was_asked_for_are_written_all_the_same(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, written: list[str]
) -> None:
    monkeypatch.setattr(log_module, "BUFFER_SIZE", 3)
    log = Log()
    for number in range(10):
        log.handle(logging.makeLogRecord({"msg": f"line {number}", "levelno": 20}))
    log.say("stopped")
    log.fail("trio-server: why")
    log.end()
    await log.run()
    assert "".join(written).splitlines() == [
        *("line 0", "line 1", "line 2", "stopped", "trio-server: why"),
        "7 lines of this log were dropped",
    ]


async def test_while_it_is_held_the_first_warnings_are_kept_and_the_last_ones_known(
    nursery: trio.Nursery, autojump_clock: MockClock, written: list[str]
) -> None:
    log = Log()
    log.held = True
    nursery.start_soon(log.run)
    for number in range(150):
        for level in (logging.INFO, logging.WARNING):
            log.handle(logging.makeLogRecord({"msg": f"line {number}", "levelno": level}))
    await trio.sleep(10)
    assert written == []
    assert list(log.warnings) == ["line 147", "line 148", "line 149"]
    log.end()
    await trio.sleep(1)
    assert "".join(written).splitlines() == [
        *(f"line {number}" for number in range(100)),
        "50 lines of this log were dropped",
    ]


def test_why_it_cannot_start_has_the_priority_of_an_error_in_the_journal() -> None:
    log = Log()
    log.setFormatter(JournalFormatter())
    log.fail("trio-server: why")
    assert list(log._lines) == ["<3>trio-server: why"]  # noqa: SLF001 - written by a thread


@pytest.mark.parametrize(
    ("request_bytes", "shown"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "GET / HTTP/1.1"),
        (b"\r\n\r\nhi\n", "hi"),
        (b"", ""),
        (b"\n", ""),
        (b"\x00\x1b[2J\x7f\x9b\t", r"\x00\x1b[2J\x7f\x9b\t"),
        ("é…".encode(), r"\xc3\xa9\xe2\x80\xa6"),
        (b'it\'s "quoted" \\', r"it\'s \"quoted\" \\"),
        (b"a\rb", r"a\rb"),
        (b"x" * 100, "x" * SHOWN),
        (b"\xff" * 100, r"\xff" * (SHOWN // 4)),
    ],
)
def test_a_request_is_shown_so_that_it_is_harmless(request_bytes: bytes, shown: str) -> None:
    assert first_line(request_bytes) == shown
    assert len(shown) <= SHOWN == 60
