"""The log: no line is lost, and a reader that has stopped reading delays nothing."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from process import (
    Process,
    Start,
    changed,
    file_limit,
    free_port,
    receive_all,
    request,
    tool,
)

from trio_server.command import log as log_module
from trio_server.command.log import GATHERING_TIME, Log, OncePerSecond

# A responder that logs a line, and ends the whole server.
FAILING = """
import logging
import trio_server.command

class Bug(BaseException):
    pass

async def fail(request, *, delay):
    logging.getLogger("trio_server").info("the last line before the end")
    raise {}

trio_server.command.hello_world = fail
"""


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect each text that is written at once."""
    texts: list[str] = []
    monkeypatch.setattr(log_module, "write_all", lambda _, text: texts.append(text))
    return texts


@pytest.fixture
def unread() -> Iterator[int]:
    """Open a pipe that is full, and that no program reads."""
    reader, writer = os.pipe()
    fill(writer)
    yield writer
    os.close(reader)
    os.close(writer)


def fill(descriptor: int) -> None:
    """Leave no room in a pipe, and leave it blocking."""
    os.set_blocking(descriptor, False)
    with suppress(BlockingIOError):
        while True:
            os.write(descriptor, b"x")
    os.set_blocking(descriptor, True)


def record_of(text: str) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": text, "levelno": logging.INFO, "levelname": "INFO"})


def without_times(written: list[str]) -> list[str]:
    """Return the lines that were written, without their times and levels."""
    return [re.sub(r"^[\d-]{10} [\d:]{8} \w+ ", "", one) for one in "".join(written).splitlines()]


def wait_until(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.005)


def end_within_5_seconds(process: Process) -> int:
    """Wait for the end, for which the log may need a second. Return the exit status."""
    return process.wait(5)


def test_no_line_is_lost_however_the_process_ends(start: Start) -> None:
    start_on_free_port = partial(start, "--host=127.0.0.1", "--port=0")
    errors = ("SystemExit(3)", "Bug('of the responder')", "KeyboardInterrupt")
    failing = [start_on_free_port(**changed(FAILING.format(error))) for error in errors]
    stopped, stopped_twice = start_on_free_port("--delay=0"), start_on_free_port("--delay=60")
    for process in (*failing, stopped, stopped_twice):
        process.wait_for_banner()
    failed_start = start("--host=127.0.0.1", f"--port={stopped.port}")
    last_lines = ("SystemExit: 3", "Bug: of the responder", "KeyboardInterrupt")
    for process, last_line in zip(failing, last_lines, strict=True):
        with process.connect() as client:
            client.sendall(b"hi\n")
            assert receive_all(client) == b""
        assert end_within_5_seconds(process) == 1
        assert "INFO the last line before the end" in process.stderr
        assert " cut off after " in process.stderr
        assert "CRITICAL the server has failed" in process.stderr
        assert last_line in process.stderr  # of the traceback
    assert failed_start.wait() == 1
    assert " is already in use" in failed_start.stderr
    with stopped_twice.connect() as client:
        client.sendall(b"hi\n")
        stopped_twice.wait_for_status("1 in flight")
        stopped_twice.kill(signal.SIGTERM)
        stopped_twice.wait_for_log("SIGTERM: shutting down")
        time.sleep(0.5)
        assert stopped_twice.stop() == 1
    assert " cut off after " in stopped_twice.stderr
    assert "INFO stopped: 0 answered, " in stopped_twice.log[-1]
    assert request(stopped.addresses[0]) == "answered"
    assert stopped.stop() == 0
    assert len(stopped.log) == 3
    assert "INFO stopped: 1 answered, " in stopped.log[-1]


def test_a_reader_that_has_stopped_reading_cannot_delay_the_end(start: Start, unread: int) -> None:
    crashing = start(
        "--host=127.0.0.1", "--port=0", stderr=unread, **changed(FAILING.format("SystemExit(3)"))
    )
    stopped = start("--host=127.0.0.1", "--port=0", "--delay=0", stderr=unread)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        failed_start = start("--host=127.0.0.1", f"--port={port}", stderr=unread)
        crashing.wait_for_banner()
        stopped.wait_for_banner()
        request(crashing.addresses[0])
        assert [request(stopped.addresses[0]) for _ in range(20)] == ["answered"] * 20
        stopped.kill(signal.SIGTERM)
        assert end_within_5_seconds(failed_start) == 1
    assert end_within_5_seconds(crashing) == 1
    assert end_within_5_seconds(stopped) == 0


def test_after_a_pause_the_reader_gets_the_lines_and_the_number_of_dropped_ones(
    serve: Start, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    stderr = os.open(fifo, os.O_RDWR)
    small = changed("import trio_server.command.log as log\nlog.BUFFER_SIZE = 100\n")
    process = serve("--delay", "0", stderr=stderr, **small)
    ab(process, 1500)  # A pipe holds 700 lines, about.
    text = ""
    while "were dropped" not in text:
        text += os.read(stderr, 1 << 20).decode()
    assert process.stop() == 0
    text += os.read(stderr, 1 << 20).decode()
    os.close(stderr)
    dropped = sum(map(int, re.findall(r"WARNING (\d+) lines of this log were dropped", text)))
    # Each line is there or counted: 1,500 clients, and two lines for the end.
    assert len(re.findall(r" answered in |SIGTERM: |stopped: ", text)) + dropped == 1502


def ab(process: Process, requests: int) -> None:
    """Send requests from 20 clients at a time."""
    command = [tool("ab"), "-q", "-n", str(requests), "-c", "20", process.url]
    report = subprocess.check_output(command, text=True, timeout=60)
    assert f"Complete requests:      {requests}\n" in report
    assert "Failed requests:        0\n" in report


def test_a_log_that_cannot_be_written_does_not_end_the_server(start: Start) -> None:
    processes = [
        start(
            *("--host=127.0.0.1", "--port=0", "--delay=0"),
            prefix=("sh", "-c", f'exec "$@" {redirected}', "sh"),
        )
        for redirected in ("2>/dev/full", "2>&-")
    ]
    for process in processes:
        process.wait_for_banner()
        assert [request(process.addresses[0]) for _ in range(20)] == ["answered"] * 20
        process.kill(signal.SIGTERM)
    assert [process.wait() for process in processes] == [0, 0]


def test_a_non_blocking_stderr_gets_each_line(serve: Start) -> None:
    reader, writer = os.pipe()
    process = serve("--delay", "0", stderr=writer)
    os.set_blocking(writer, False)
    ab(process, 1000)  # A pipe holds 700 lines, about.
    with ThreadPoolExecutor(1) as pool, os.fdopen(reader, encoding="ascii") as log:
        lines = pool.submit(log.readlines)
        assert process.stop() == 0
        os.close(writer)
        assert sum(" answered in " in line for line in lines.result()) == 1000
        for line in lines.result():
            assert re.match(r"\d{4}-\d\d-\d\d [\d:]{8} INFO .*\n", line)


def switches(process: Process) -> int:
    """Return how often the threads of a process have waited for something."""
    tasks = Path(f"/proc/{process.popen.pid}/task").iterdir()
    texts = [(task / "status").read_text() for task in tasks]
    return sum(int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0]) for text in texts)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts them here")
def test_an_idle_server_does_not_wake_up(serve: Start) -> None:
    process = serve("--delay=0")
    assert request(process.addresses[0]) == "answered"
    process.wait_for_log("answered")
    time.sleep(0.3)  # The last line is written, and the handler has ended.
    before = switches(process)
    time.sleep(0.5)
    assert switches(process) - before <= 2


def test_in_the_journal_each_line_has_its_priority_and_no_time(
    start: Start, tmp_path: Path
) -> None:
    options = ("--host=127.0.0.1", "--port=0")
    other = start(*options, env={**os.environ, "JOURNAL_STREAM": "1:2"})
    with (tmp_path / "journal").open("wb") as journal:
        stat = os.fstat(journal.fileno())
        environment = {**os.environ, "JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino}"}
        process = start(*options, stderr=journal, env=environment)
        for one in (process, other):
            one.wait_for_banner()
            assert one.stop() == 0
    lines = (tmp_path / "journal").read_text().splitlines()
    assert [line[:9] for line in lines] == ["<6>SIGTER", "<6>stoppe"]
    assert re.match(r"[\d-]{10} [\d:]{8} INFO SIGTERM", other.stderr)


def test_each_line_of_a_traceback_has_the_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{stderr.st_dev}:{stderr.st_ino}")
    boom = ValueError("boom")
    exc_info = (ValueError, boom, None)
    record = logging.makeLogRecord({"msg": "failed", "levelname": "ERROR", "exc_info": exc_info})
    log = Log()
    lines = log.format(record).splitlines()
    log.close()
    assert lines[0] == "<3>failed"
    assert lines[-1] == "<3>ValueError: boom"
    assert all(line.startswith("<3>") for line in lines)


def test_the_time_of_a_line_is_formatted_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    formatted = []

    def count(second: float) -> time.struct_time:
        formatted.append(second)
        return time.gmtime(second)

    monkeypatch.setattr("time.localtime", count)
    log = Log()
    shown = []
    for created in (1000.0, 1000.4, 1000.99, 1001.0, 1001.5, 1060.0):
        record = record_of("a line")
        record.created = created
        shown.append(log.format(record))
    log.close()
    assert shown == [
        *["1970-01-01 00:16:40 INFO a line\n"] * 3,
        *["1970-01-01 00:16:41 INFO a line\n"] * 2,
        "1970-01-01 00:17:40 INFO a line\n",
    ]
    assert formatted == [1000, 1001, 1060]


def test_one_failed_accept_a_second_is_logged_without_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    once = OncePerSecond()
    record = logging.makeLogRecord({"exc_info": (ValueError, ValueError(), None)})
    passed = []
    for _ in range(25):
        passed.append(once.filter(record))
        now += 0.1
    assert passed.count(True) == 3
    assert record.exc_info is None


def test_at_the_limit_of_open_files_clients_wait_and_one_line_a_second_says_so(
    serve: Start,
) -> None:
    process = serve("--delay=0.4", prefix=file_limit(20))
    begun = time.monotonic()
    with ThreadPoolExecutor(20) as pool:
        assert set(pool.map(request, process.addresses * 20)) == {"answered"}
    assert process.stop() == 0
    lines = [line for line in process.log if "open files" in line]
    assert 1 <= len(lines) <= time.monotonic() - begun + 1
    assert "Traceback" not in process.stderr
    assert "20 answered, " in process.log[-1]


def test_lines_that_follow_each_other_closely_are_written_at_once(written: list[str]) -> None:
    log = Log()
    lines = [f"line {number}" for number in range(7)]
    for line in lines:
        log.handle(record_of(line))
        time.sleep(0.002)
    log.close()
    assert without_times(written) == lines
    assert len(written) <= 3


def test_with_a_full_buffer_lines_are_dropped_and_counted(
    written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "BUFFER_SIZE", 3)
    monkeypatch.setattr(logging.root, "level", logging.ERROR)  # The number is logged anyway.
    log = Log()
    reading = threading.Event()

    def write(_: int, text: str) -> None:
        assert reading.wait(10)
        written.append(text)

    monkeypatch.setattr(log_module, "write_all", write)
    log.handle(record_of("line 0"))
    wait_until(log._lines.empty)  # noqa: SLF001
    time.sleep(2 * GATHERING_TIME)  # The thread waits for its reader now.
    for number in range(1, 11):
        log.handle(record_of(f"line {number}"))
    reading.set()
    wait_until(lambda: written and "dropped" in written[-1])
    log.close()
    *lines, count = without_times(written)
    assert lines == ["line 0", "line 1", "line 2", "line 3"]
    assert count.startswith("7 lines of this log were dropped")


def test_without_a_thread_a_line_is_written_at_once_or_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    log = Log()
    readable, written = True, list[str]()
    monkeypatch.setattr("select.select", lambda *_: ([], [2] if readable else [], []))

    def write(_: int, data: bytes) -> int:
        written.append(data.decode())
        return len(data)

    monkeypatch.setattr("os.write", write)
    log.handle(record_of("one"))
    assert without_times(written) == ["one"]
    readable = False
    log.handle(record_of("the reader has stopped reading"))
    log.close()
    assert without_times(written) == ["one"]


def test_text_is_written_whole_although_another_program_fills_the_pipe_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = []
    full = iter((True, False, True, False, False))

    def write(_: int, data: bytes) -> int:
        if next(full):
            raise BlockingIOError
        written.append(data[:3])
        return len(data[:3])

    monkeypatch.setattr("select.select", lambda *_: ([], [2], []))
    monkeypatch.setattr("os.write", write)
    log_module.write_all(2, "12345678")
    assert b"".join(written) == b"12345678"


def test_a_reader_of_stdout_that_has_stopped_reading_delays_neither_serving_nor_stopping(
    start: Start,
) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while os.write(writing, b"x"):
            pass
    os.set_blocking(writing, True)
    port = free_port("127.0.0.1")
    process = start("--host=127.0.0.1", f"--port={port}", "--delay=0", stdout=writing)
    process.wait_until(lambda: request(("127.0.0.1", port)) == "answered")
    assert process.stop() == 0
    os.close(reading)
    os.close(writing)
