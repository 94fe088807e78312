import fcntl
import logging
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import trio
from process import Process, Start, file_limit, request, tool

from trio_server import watch
from trio_server.__main__ import announce
from trio_server.account import Outcome
from trio_server.connection import Connection
from trio_server.log import Log
from trio_server.shutdown import Shutdown
from trio_server.watch import ENTER, LEAVE, View, frame

URLS = ["http://127.0.0.1:1729"]
WIDE = (80, 24)


@pytest.fixture
def shutdown(autojump_clock: object) -> Shutdown:
    return Shutdown()


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def view(shutdown: Shutdown, log: Log) -> View:
    return View(shutdown, 4, log)


def add(view: View, port: int, request: bytes = b"", **state: Any) -> Connection:
    """Add a connection that was made at second 0; the clock of these tests stands still there."""
    stream = cast("trio.SocketStream", None)  # No client is waited for here.
    connection = Connection(f"127.0.0.1:{port}", stream, 30, Shutdown(), view, request)
    for name, value in {"accepted_at": 0.0, "bytes_in": len(request), **state}.items():
        setattr(connection, name, value)
    view.begin(connection)
    return connection


def working(view: View, port: int, request: bytes, start: float) -> Connection:
    return add(view, port, request, in_flight=True, received_at=start, started_at=start)


def end(connection: Connection, outcome: Outcome, replied_at: float | None = None) -> None:
    connection.in_flight, connection.closed = False, True
    connection.outcome, connection.replied_at = outcome, replied_at
    connection.connections.end(connection)


async def test_every_state_of_a_connection_is_shown_the_oldest_first(view: View) -> None:
    end(working(view, 1, b"GET / HTTP/1.1\r\n", 0), Outcome.ANSWERED, 4.001)
    end(working(view, 2, b"GET / HTTP/1.1\r\n", 0), Outcome.WENT_AWAY)
    working(view, 3, b"GET / HTTP/1.1\r\n", 10.1)
    working(view, 4, b"POST /form HTTP/1.1\r\n", 12)
    add(view, 5)
    add(view, 6, b"hi", in_flight=True, received_at=9.5)
    add(view, 7, b"hi", received_at=7.0, started_at=7.0, replied_at=11.002)
    working(view, 8, b"late", 2)

    assert view.draw(URLS, (90, 24), now=13) == [
        "trio_server on http://127.0.0.1:1729 · 4 in flight · 2 idle · 1 answered · 1 went away",
        "127.0.0.1:3            GET / HTTP/1.1    ██████████████▌░░░░░  2.9 s",
        "127.0.0.1:4            POST /form HTTP…  █████░░░░░░░░░░░░░░░  1.0 s",
        "127.0.0.1:5                              connected, has sent nothing for 13 s",
        "127.0.0.1:6            hi                waits for a permit, 3.5 s",
        "127.0.0.1:7            hi                4.002 s, has not closed yet",
        "127.0.0.1:8            late              ████████████████████  11.0 s",
        "── answered ──",
        "127.0.0.1:1            GET / HTTP/1.1    4.001 s",
    ]


async def test_with_nobody_there_is_one_line(view: View) -> None:
    expected = ["trio_server on http://127.0.0.1:1729 · 0 in flight · 0 idle"]
    assert view.draw(URLS, WIDE, now=0) == expected


async def test_what_does_not_fit_is_counted(view: View) -> None:
    for port in range(10_000):
        working(view, port, b"GET / HTTP/1.1\r\n", 0)
    for port in range(50):
        end(working(view, port, b"GET / HTTP/1.1\r\n", 0), Outcome.ANSWERED, 4.0)

    lines = view.draw(URLS, WIDE, now=1)
    assert lines[16:18] == ["… and 9,985 more", "── answered ──"]
    assert all("█████░░░░░░░░░░░░░░░" in line for line in lines[1:16])
    assert view.draw(URLS, (60, 24), now=1)[1].endswith("  ██░░░░░░░  1.0 s")
    for columns in (1, 10, 40, 60, 80, 200):
        for rows in (1, 2, 3, 10, 24, 60):
            lines = view.draw(URLS, (columns, rows), now=1)
            assert len(lines) == rows
            assert max(map(len, lines)) <= columns - 1


@pytest.mark.parametrize(
    "request_", [b"\x1b[2J\x1b]0;title\x07", bytes(range(256)), b"\xc2\x9b2J"]
)
async def test_what_a_client_sends_does_no_harm(view: View, request_: bytes) -> None:
    working(view, 1, request_, 0)
    [_, line] = view.draw(URLS, WIDE, now=1)
    assert line.isprintable()
    assert re.sub("[█▌░…]", "", line).isascii()


async def test_a_shutdown_says_how_many_seconds_are_left(view: View, shutdown: Shutdown) -> None:
    shutdown.begin(30)
    assert "· shutting down, 28 s left ·" in view.draw(URLS, (100, 24), trio.current_time() + 2)[0]


async def test_a_shutdown_without_an_end_says_no_seconds(view: View, shutdown: Shutdown) -> None:
    shutdown.begin(math.inf)
    assert "· shutting down · 0 in flight" in view.draw(URLS, WIDE, now=2)[0]


def test_no_colour_and_no_unicode_where_they_are_not_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("locale.getencoding", lambda: "UTF-8")
    assert frame(["·", "█▌░…"]) == "\x1b[H·\x1b[K\r\n█▌░…\x1b[J"
    monkeypatch.setattr("locale.getencoding", lambda: "ANSI_X3.4-1968")
    assert frame(["·", "█▌░…"]) == "\x1b[H|\x1b[K\r\n#=.~\x1b[J"
    monkeypatch.delenv("NO_COLOR")
    assert "\x1b[32m#=\x1b[m." in frame(["·", "█▌░…"])


async def test_what_does_not_fit_beside_the_url_replaces_it(
    view: View, shutdown: Shutdown
) -> None:
    shutdown.begin(30)
    now = trio.current_time()
    title = "shutting down, 30 s left · 0 in flight · 0 idle"
    assert view.draw([*URLS, "http://[::1]:1729"], WIDE, now) == [title]
    assert view.draw(URLS, (100, 24), now + 31) == [
        "trio_server on http://127.0.0.1:1729 · shutting down, 0 s left · 0 in flight · 0 idle"
    ]


async def test_the_last_warnings_are_shown(view: View, log: Log) -> None:
    for number in range(200):
        log.emit(logging.makeLogRecord({"msg": "fine", "levelno": logging.INFO}))
        text = f"{number} \x1b[2J\x9b2J\nTraceback"
        log.emit(logging.makeLogRecord({"msg": text, "levelno": logging.WARNING}))
    shown = [f"! {number} \\x1b[2J\\x9b2J" for number in (197, 198, 199)]
    assert view.draw(URLS, WIDE, now=0)[1:] == shown


async def test_an_exception_restores_the_terminal(
    view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    async def write(_: object, text: str, __: object) -> None:
        await trio.lowlevel.checkpoint()
        written.append(text)

    monkeypatch.setattr(watch, "write", write)

    async def fail() -> None:
        await trio.sleep(0.95)
        raise ValueError("of another task")

    async def show_until_it_fails() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(view.show, URLS)
            nursery.start_soon(fail)

    with pytest.raises(ExceptionGroup):
        await show_until_it_fails()
    assert written[0].startswith(ENTER)
    assert written[-1] == LEAVE
    assert len(written) == 11  # ten a second


async def test_what_is_written_last_comes_last_although_a_write_before_it_is_slow(
    view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bytes] = []

    def write(_: int, data: bytes) -> None:
        time.sleep(0.1 if ENTER.encode() in data else 0)
        written.append(data)

    monkeypatch.setattr("trio_server.log._write", write)
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    with trio.move_on_after(0.01):
        await view.show(URLS)
    assert written[0].startswith(ENTER.encode())
    assert written[1:] == [LEAVE.encode()]


async def test_a_view_that_fails_does_not_end_the_server(
    view: View, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_: list[str]) -> None:
        await trio.lowlevel.checkpoint()
        raise OSError("no more files")

    monkeypatch.setattr(view, "show", fail)
    await announce(view, [])
    assert "the view has ended, and the server goes on" in caplog.text


class Terminal:
    """A pseudo-terminal, and what a program has drawn in it."""

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(columns, rows)
        self.before = termios.tcgetattr(self.slave)
        self._drawn = b""

    @property
    def text(self) -> str:
        return self._drawn.decode(errors="replace")

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def read(self) -> None:
        """Take in what has been drawn up to now."""
        os.set_blocking(self.master, False)
        try:
            while data := os.read(self.master, 65536):
                self._drawn += data
        except BlockingIOError:
            pass

    @property
    def screen(self) -> list[str]:
        """The lines of the last frame that is complete; none when the view is not there."""
        self.read()
        if self.text.rfind(LEAVE) > self.text.rfind(ENTER):
            return []
        frames = [text for text in self.text.split("\x1b[H")[1:] if "\x1b[J" in text]
        shown = frames[-1].partition("\x1b[J")[0] if frames else ""
        plain = re.sub(r"\x1b\[[0-9]*[mK]", "", shown)
        return re.split("\r+\n", plain) if plain else []  # The terminal adds a CR itself.

    def wait_for(self, condition: Callable[[list[str]], object], seconds: float = 10) -> list[str]:
        give_up = time.monotonic() + seconds
        while not condition(screen := self.screen):
            assert time.monotonic() < give_up, self.text[-2000:]
            time.sleep(0.02)
        return screen


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    os.close(terminal.master)
    os.close(terminal.slave)


def start_in(terminal: Terminal, start: Start, *options: str, **settings: Any) -> Process:
    """Start the command as a shell would, in the terminal; the log goes to a file."""
    listen = ("--host", "127.0.0.1", "--port", "0")
    ends = {"stdin": terminal.slave, "stdout": terminal.slave}
    settings = {"prefix": (tool("setsid"), "--ctty"), **ends, **settings}
    return start("--watch", *listen, *options, **settings)


def address(terminal: Terminal) -> tuple[str, int]:
    terminal.wait_for(lambda screen: screen)
    found = re.search(r"Listening on http://127.0.0.1:(\d+) ", terminal.text)
    assert found
    return "127.0.0.1", int(found[1])


def client(server: tuple[str, int]) -> threading.Thread:
    thread = threading.Thread(target=request, args=(server,))
    thread.start()
    return thread


def test_three_clients_are_seen_at_work_and_ctrl_c_shows_the_shutdown(
    terminal: Terminal, start: Start
) -> None:
    process = start_in(terminal, start, "--delay", "2.5")
    server = address(terminal)
    clients = []
    for _ in range(3):
        clients.append(client(server))
        time.sleep(0.2)
    title, *rows = terminal.wait_for(lambda screen: len(screen) == 4)
    assert title.endswith(f"{server[1]} · 3 in flight · 0 idle")
    lengths = [row.count("█") for row in rows]
    assert sorted(lengths, reverse=True) == lengths  # The oldest comes first,
    assert len(set(lengths)) == 3  # and is further on.
    assert all(re.search(r"GET / HTTP/1.1 +█*▌?░* +[0-2]\.\d s$", row) for row in rows)

    terminal.resize(70, 3)
    narrow = terminal.wait_for(lambda screen: len(screen) == 3)
    assert narrow[2] == "… and 2 more"

    terminal.type(b"\x03")
    terminal.wait_for(lambda screen: screen and "shutting down" in screen[0])
    assert process.wait() == 0
    for thread in clients:
        thread.join()
    assert terminal.screen == []
    assert terminal.text.count(ENTER) == terminal.text.count(LEAVE) == 1
    assert termios.tcgetattr(terminal.slave) == terminal.before
    assert "stopped: 3 answered" in process.stderr


def test_where_the_log_is_the_same_terminal_it_does_not_disturb_the_view(
    terminal: Terminal, start: Start
) -> None:
    process = start_in(terminal, start, "--delay", "0", stderr=terminal.slave)
    client(address(terminal)).join()
    terminal.wait_for(lambda screen: "── answered ──" in screen)
    assert process.stop() == 0
    terminal.read()
    view, _, after = terminal.text.rpartition(LEAVE)
    assert "INFO" not in view
    assert after.count("INFO") == after.count("INFO stopped: 1 answered") == 1


def test_two_interrupts_restore_the_terminal(terminal: Terminal, start: Start) -> None:
    process = start_in(terminal, start, "--delay", "60")
    left = client(address(terminal))
    terminal.wait_for(lambda screen: len(screen) == 2)
    terminal.type(b"\x03")
    terminal.wait_for(lambda screen: screen and "shutting down" in screen[0])
    time.sleep(0.6)
    terminal.type(b"\x03")
    assert process.wait() == 1
    left.join()
    assert terminal.screen == []
    assert terminal.text.endswith(LEAVE)


def test_ctrl_z_bg_fg_and_ctrl_backslash_restore_the_terminal(terminal: Terminal) -> None:
    shell = [tool("setsid"), "--ctty", "sh", "-i"]
    ends: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), terminal.slave)
    with subprocess.Popen(shell, **ends, env={**os.environ, "PS1": "$ "}) as popen:
        try:
            command = f"{sys.executable} -m trio_server --watch --delay 0 --port 0"
            terminal.type(f"stty tostop; {command}\n".encode())
            server = address(terminal)
            terminal.type(b"\x1a")
            terminal.wait_for(lambda screen: not screen and "Stopped" in terminal.text)
            terminal.type(b"bg\n")
            time.sleep(0.5)
            assert request(server) == "answered"
            assert not terminal.screen  # The shell has the terminal.
            terminal.type(b"fg\n")
            terminal.wait_for(lambda screen: screen)
            terminal.type(b"\x03")
            terminal.wait_for(lambda screen: not screen and "stopped: 1" in terminal.text)
            terminal.type(f"{command}\n".encode())
            terminal.wait_for(lambda screen: screen)
            terminal.type(b"\x1c")  # Ctrl-\\, which ends it at once
            terminal.wait_for(lambda screen: not screen)
            terminal.type(b"exit\n")
            popen.wait(10)
        finally:
            popen.kill()
    assert terminal.text.count(ENTER) == terminal.text.count(LEAVE) == 3


def test_a_terminal_that_is_held_does_not_stop_the_server(
    terminal: Terminal, start: Start
) -> None:
    process = start_in(terminal, start, "--delay", "0")
    server = address(terminal)
    terminal.type(b"\x13")  # Ctrl-S
    time.sleep(0.3)
    assert [request(server) for _ in range(20)] == ["answered"] * 20
    assert process.stop(seconds=5) == 0
    assert terminal.screen == []
    assert terminal.text.endswith(LEAVE)


def test_where_stdout_is_no_terminal_the_view_is_refused(terminal: Terminal, start: Start) -> None:
    dumb = start_in(terminal, start, env={**os.environ, "TERM": "dumb"})
    piped = start("--watch")
    for process in (dumb, piped):
        assert process.wait() == 2
        assert process.stderr.endswith(
            "error: --watch draws in a terminal: leave it out where stdout is none\n"
        )


def test_warnings_of_a_view_in_the_same_terminal_come_after_it(
    terminal: Terminal, start: Start
) -> None:
    prefix = (*file_limit(40), tool("setsid"), "--ctty")
    process = start_in(
        terminal,
        start,
        "--delay",
        "0.3",
        "--log-level",
        "debug",
        prefix=prefix,
        stderr=terminal.slave,
    )
    server = address(terminal)
    process.freeze()
    with ThreadPoolExecutor(60) as pool:
        clients = [pool.submit(request, server) for _ in range(60)]
        time.sleep(0.2)
        process.thaw()
        assert {one.result() for one in clients} == {"answered"}
    terminal.wait_for(lambda screen: any("! " in line and "EMFILE" in line for line in screen))
    process.kill(signal.SIGUSR1)
    time.sleep(0.2)
    assert process.stop() == 0
    terminal.read()
    view, _, after = terminal.text.rpartition(LEAVE)
    assert "DEBUG" not in view
    assert "since" not in view
    assert "EMFILE" in after
    assert "in flight; since" in after
    assert "stopped: 60 answered" in after


@pytest.mark.parametrize("names", ["2>/dev/tty", "2>/dev/stdout", "2>&1 >/dev/tty"])
def test_other_names_of_the_same_terminal_are_known(
    terminal: Terminal, start: Start, names: str
) -> None:
    prefix = (tool("setsid"), "--ctty", "sh", "-c", f'exec "$@" {names}', "sh")
    process = start_in(terminal, start, "--delay", "0", prefix=prefix)
    client(address(terminal)).join()
    terminal.wait_for(lambda screen: "── answered ──" in screen)
    assert process.stop() == 0
    terminal.read()
    assert "INFO" not in terminal.text.rpartition(LEAVE)[0]
