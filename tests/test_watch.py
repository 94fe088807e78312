"""The live view: what it draws, and that it leaves the terminal as it was."""

import fcntl
import itertools
import logging
import math
import os
import pty
import re
import signal
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio
from process import Process, Start, changed, request, tool

from trio_server.account import Account, Exchange, Outcome
from trio_server.command.watch import ENTER, LEAVE, View, frame
from trio_server.shutdown import Shutdown

URL = "http://127.0.0.1:1729"
WIDE = (80, 24)


@pytest.fixture
def view() -> View:
    return View(Account(), Shutdown(), 4, URL)


def add(view: View, port: int, request: bytes = b"", received_at: float = math.nan) -> Exchange:
    """Add a connection that was made at second 0, and perhaps has a request in flight."""
    peer = f"127.0.0.1:{port}"
    exchange = Exchange(peer, request, accepted_at=0.0, received_at=received_at)
    view.account.open[exchange] = None
    return exchange


def answer(exchange: Exchange, answered_at: float) -> None:
    exchange.outcome, exchange.answered_at = Outcome.ANSWERED, answered_at


def end(view: View, exchange: Exchange, outcome: Outcome) -> None:
    exchange.outcome = outcome
    del view.account.open[exchange]
    view.account.ended.append(exchange)
    view.account.outcomes[outcome] += 1


def warn(view: View, text: str) -> None:
    view.warnings.handle(logging.makeLogRecord({"msg": text, "levelno": logging.WARNING}))


async def test_each_state_of_a_connection_is_shown_and_the_oldest_comes_first(view: View) -> None:
    answered = add(view, 1, b"GET / HTTP/1.1\r\n", 0)
    answer(answered, 4.001)
    end(view, answered, Outcome.ANSWERED)
    end(view, add(view, 2, b"GET / HTTP/1.1\r\n", 0), Outcome.WENT_AWAY)
    add(view, 3, b"GET / HTTP/1.1\r\n", 10.1)
    add(view, 4, b"POST /form HTTP/1.1\r\n", 12)
    add(view, 5)
    answer(add(view, 6, b"hi", 7), 11.002)
    add(view, 7, b"late", 2)

    assert view.draw(90, 24, now=13) == [
        "trio_server on http://127.0.0.1:1729 · 3 in flight · 2 idle · 1 answered · 1 went away",
        "127.0.0.1:3            GET / HTTP/1.1    ██████████████▌░░░░░  2.9 s",
        "127.0.0.1:4            POST /form HTTP/  █████░░░░░░░░░░░░░░░  1.0 s",
        "127.0.0.1:5                              connected, has sent nothing for 13 s",
        "127.0.0.1:6            hi                4.002 s",
        "127.0.0.1:7            late              ████████████████████  11.0 s",
        "── answered ──",
        "127.0.0.1:1            GET / HTTP/1.1    4.001 s",
    ]


def test_in_40_columns_the_request_and_the_bar_shrink(view: View) -> None:
    add(view, 34674, b"GET / HTTP/1.1\r\n", 10.1)
    add(view, 34702)
    assert view.draw(40, 24, now=13) == [
        "1 in flight · 1 idle",
        "127.0.0.1:34674        GET /    2.9 s",
        "127.0.0.1:34702               connected",
    ]


def test_without_clients_there_is_one_line(view: View) -> None:
    expected = ["trio_server on http://127.0.0.1:1729 · 0 in flight · 0 idle"]
    assert view.draw(*WIDE, now=0) == expected


async def test_connections_that_do_not_fit_are_counted(view: View) -> None:
    for port in range(10_000):
        add(view, port, b"GET / HTTP/1.1\r\n", 0)
    for port in range(50):
        answered = add(view, port, b"GET / HTTP/1.1\r\n", 0)
        answer(answered, 4.0)
        end(view, answered, Outcome.ANSWERED)
    lines = view.draw(*WIDE, now=1)
    assert lines[16:18] == ["… and 9,985 more", "── answered ──"]
    assert all("█████░░░░░░░░░░░░░░░" in line for line in lines[1:16])
    assert view.draw(60, 24, now=1)[1].endswith("  ██░░░░░░░  1.0 s")
    warn(view, "a warning")
    for columns, rows in itertools.product((1, 10, 40, 60, 80, 200), (1, 2, 3, 10, 24, 60)):
        lines = view.draw(columns, rows, now=1)
        assert len(lines) == rows
        assert max(map(len, lines)) <= columns - 1


@pytest.mark.parametrize(
    "request_", [b"\x1b[2J\x1b]0;title\x07", bytes(range(256)), b"\xc2\x9b2J"]
)
def test_a_request_cannot_move_the_cursor(view: View, request_: bytes) -> None:
    add(view, 1, request_, 0)
    [_, line] = view.draw(*WIDE, now=1)
    assert line.isprintable()
    assert re.sub("[█▌░…]", "", line).isascii()


async def test_a_shutdown_is_shown_with_the_seconds_that_are_left(
    view: View, autojump_clock: object
) -> None:
    now = trio.current_time()
    view.shutdown.begin(30)
    shown = view.draw(100, 24, now + 2)[0]
    assert shown.startswith("trio_server on http://127.0.0.1:1729 · shutting down, 28 s left · ")
    assert "· shutting down, 0 s left ·" in view.draw(100, 24, now + 31)[0]
    narrow = view.draw(60, 24, now)  # There is no room for the URL.
    assert narrow == ["shutting down, 30 s left · 0 in flight · 0 idle"]


def test_the_last_three_warnings_are_shown(view: View) -> None:
    for number in range(200):
        warn(view, f"{number} \x1b[2J\x9b2J")
    shown = [f"! {number} \\x1b[2J\\x9b2J" for number in (197, 198, 199)]
    assert view.draw(*WIDE, now=0)[1:] == shown


def test_with_a_delay_of_zero_the_bar_is_full(view: View) -> None:
    view = View(view.account, view.shutdown, 0, URL)
    add(view, 1, b"hi", 0)
    assert "█" * 20 in view.draw(*WIDE, now=1)[1]


def test_there_is_no_colour_and_no_unicode_where_they_are_unwanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("locale.getencoding", lambda: "UTF-8")
    assert frame(["·", "█▌░…─"]) == "\x1b[H·\x1b[K\r\n█▌░…─\x1b[J"
    monkeypatch.setattr("locale.getencoding", lambda: "ANSI_X3.4-1968")
    assert frame(["·", "█▌░…─"]) == "\x1b[H|\x1b[K\r\n#=.~-\x1b[J"
    monkeypatch.delenv("NO_COLOR")
    assert "\x1b[32m#=\x1b[m." in frame(["·", "█▌░…"])


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect each text that the view writes."""
    texts: list[str] = []

    async def write(_: object, _descriptor: int, text: str, **__: object) -> None:
        await trio.lowlevel.checkpoint()
        texts.append(text)

    monkeypatch.setattr("trio.to_thread.run_sync", write)
    return texts


async def test_it_draws_ten_times_a_second_and_restores_the_terminal_when_it_is_cancelled(
    view: View, autojump_clock: object, written: list[str]
) -> None:
    with trio.move_on_after(0.95):
        await view.show()
    assert written[0] == ENTER
    assert written[-1] == LEAVE
    assert len(written) == 12


async def test_a_view_that_fails_restores_the_terminal_and_does_not_end_the_server(
    view: View,
    autojump_clock: object,
    written: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> list[str]:
        raise ValueError("cannot draw")

    monkeypatch.setattr(view, "draw", fail)
    await view.show()
    assert written == [ENTER, LEAVE]
    assert "ValueError: cannot draw" in caplog.text


async def test_a_view_that_gets_no_thread_does_not_end_the_server(
    view: View, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    handlers = logging.root.handlers
    monkeypatch.setattr(trio.to_thread, "run_sync", fail)
    await view.show()
    assert logging.root.handlers is handlers


async def test_the_terminal_is_restored_last_although_a_write_before_is_slow(
    view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []

    def write(_: int, text: str) -> None:
        time.sleep(0.1 if text == ENTER else 0)
        texts.append(text)

    monkeypatch.setattr("trio_server.command.watch.write_all", write)
    with trio.move_on_after(0.01):
        await view.show()
    assert texts == [ENTER, LEAVE]


async def test_a_terminal_that_accepts_nothing_delays_the_end_by_a_second(
    view: View, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def write(*_: object, **__: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr("trio.to_thread.run_sync", write)
    begun = trio.current_time()
    with trio.move_on_after(5):
        await view.show()
    assert trio.current_time() - begun == 6


class Terminal:
    """A pseudo-terminal, and the text that a program has written to it."""

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(columns, rows)
        self.before = termios.tcgetattr(self.slave)
        self._drawn = b""

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)

    @property
    def text(self) -> str:
        return self._drawn.decode(errors="replace")

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def read(self) -> None:
        """Read what was written up to now."""
        os.set_blocking(self.master, False)
        try:
            while data := os.read(self.master, 65536):
                self._drawn += data
        except BlockingIOError:
            pass

    @property
    def screen(self) -> list[str]:
        """The lines of the last complete frame. There are none when the view has ended."""
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
def terminals() -> Iterator[list[Terminal]]:
    terminals = [Terminal() for _ in range(5)]
    yield terminals
    for terminal in terminals:
        terminal.close()


@pytest.fixture
def terminal(terminals: list[Terminal]) -> Terminal:
    return terminals[0]


def start_in(terminal: Terminal, start: Start, *options: str, **settings: Any) -> Process:
    """Start the command as a shell would, in the terminal; the log goes to a file."""
    listen = ("--host", "127.0.0.1", "--port", "0")
    ends = {"stdin": terminal.slave, "stdout": terminal.slave}
    # pytest exports the size of its own terminal, because it imports `readline`.
    in_terminal = (tool("setsid"), "--ctty", "env", "--unset=LINES", "--unset=COLUMNS")
    settings = {"prefix": in_terminal, **ends, **settings}
    return start("--watch", *listen, *options, **settings)


def address(terminal: Terminal) -> tuple[str, int]:
    terminal.wait_for(lambda screen: screen)
    found = re.search(r"Listening on http://127.0.0.1:(\d+) ", terminal.text)
    assert found
    return "127.0.0.1", int(found[1])


def wait_for_lines(terminal: Terminal, number: int) -> list[str]:
    return terminal.wait_for(lambda screen: len(screen) == number)


def client(server: tuple[str, int]) -> threading.Thread:
    thread = threading.Thread(target=request, args=(server,))
    thread.start()
    return thread


# A responder that fails for some requests.
FAILING = """
import trio_server.command
hello_world = trio_server.command.hello_world

async def fail_sometimes(request, *, delay):
    if request.startswith(b"fail"):
        raise ValueError("of the responder")
    return await hello_world(request, delay=delay)

trio_server.command.hello_world = fail_sometimes
"""


def test_clients_warnings_and_the_shutdown_are_shown_and_the_terminal_is_restored(
    terminal: Terminal, start: Start
) -> None:
    process = start_in(terminal, start, "--delay=2.5", stderr=terminal.slave, **changed(FAILING))
    server = address(terminal)
    clients = []
    for number in range(3):
        clients.append(client(server))
        wait_for_lines(terminal, number + 2)
    title, *rows = terminal.wait_for(lambda screen: "▌" in screen[3] or "█" in screen[3])
    assert title.endswith(f"{server[1]} · 3 in flight · 0 idle")
    lengths = [row.count("█") for row in rows]
    assert sorted(lengths, reverse=True) == lengths  # The oldest comes first.
    assert all(re.search(r"GET / HTTP/1.1 +█*▌?░* +\d\.\d s$", row) for row in rows)

    terminal.resize(70, 3)
    narrow = wait_for_lines(terminal, 3)
    assert narrow[2] == "… and 2 more"
    terminal.resize(80, 24)
    assert request(server, b"fail\n") == "got b''"
    terminal.wait_for(lambda screen: any(re.search("^! .*failed", line) for line in screen))

    terminal.type(b"\x03")
    terminal.wait_for(lambda screen: screen and "shutting down" in screen[0])
    assert process.wait() == 1  # A responder has failed.
    for thread in clients:
        thread.join()
    assert terminal.screen == []
    assert terminal.text.count(ENTER) == terminal.text.count(LEAVE) == 1
    assert termios.tcgetattr(terminal.slave) == terminal.before
    shown, _, after = terminal.text.rpartition(LEAVE)
    assert " INFO " not in shown
    assert "Traceback" not in shown
    assert "ValueError: of the responder" in after
    assert "stopped: 3 answered" in after


def test_each_end_restores_the_terminal(terminals: list[Terminal], start: Start) -> None:
    *two_signals, one_signal, crashing = terminals
    processes = [start_in(one, start, "--delay=60") for one in (*two_signals, one_signal)]
    failing = changed(FAILING.replace("ValueError", "SystemExit"))
    processes.append(start_in(crashing, start, **failing))
    clients = [client(address(terminal)) for terminal in two_signals]
    for terminal, process, signum in zip(
        two_signals, processes, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), strict=False
    ):
        wait_for_lines(terminal, 2)
        process.kill(signum)
        terminal.wait_for(lambda screen: screen and "shutting down" in screen[0])
    time.sleep(0.5)
    for process in processes[:3]:
        process.kill(signal.SIGTERM)
    address(one_signal)
    processes[3].kill(signal.SIGTERM)
    request(address(crashing), b"fail")
    assert [process.wait() for process in processes] == [1, 1, 1, 0, 1]
    for thread in clients:
        thread.join()
    for terminal in terminals:
        assert terminal.screen == []
        assert terminal.text.endswith(LEAVE)
        assert termios.tcgetattr(terminal.slave) == terminal.before


def test_a_terminal_that_is_closed_or_has_stopped_does_not_stop_the_server(
    terminal: Terminal, start: Start
) -> None:
    process = start_in(terminal, start, "--delay=0")
    server = address(terminal)
    terminal.type(b"\x13")  # Ctrl-S
    time.sleep(0.3)
    assert [request(server) for _ in range(20)] == ["answered"] * 20
    closed = Terminal()
    other = start_in(closed, start, "--delay=0")
    assert request(address(closed)) == "answered"
    closed.close()  # which sends SIGHUP
    assert process.stop(seconds=5) == 0
    assert other.wait(5) == 0
    assert "SIGHUP: shutting down" in other.stderr
    assert "the view failed" not in other.stderr


def test_where_stdout_is_no_terminal_the_view_is_a_usage_error(start: Start) -> None:
    process = start("--watch")
    assert process.wait() == 2
    assert process.stderr.endswith(
        "error: --watch needs a terminal: leave it out when stdout is redirected\n"
    )
