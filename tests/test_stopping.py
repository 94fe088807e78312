"""Stopping the command: what each signal does, and whose request is answered."""

import math
import os
import re
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing
from functools import partial
from pathlib import Path

import pytest
import trio
from process import Process, Start, activated, changed, file_limit, receive_all, start_each, tool
from streams import read_all
from trio.testing import MockClock

from trio_server.account import Account
from trio_server.command import signals
from trio_server.command.signals import ONE_STOP, STOP_SIGNALS
from trio_server.responder import REPLY
from trio_server.shutdown import Shutdown

# The first thing that the command does after it has set its signals is to read its options.
BLOCKED_WHILE_IT_STARTS = """
import argparse, time

def wait(*_, **__):
    print("reading", flush=True)
    time.sleep(60)

argparse.ArgumentParser.parse_args = wait
"""

# Let signals arrive just when Trio closes the socket through which they wake it up.
STORM_AT_THE_END = """
import os, signal
set_wakeup_fd = signal.set_wakeup_fd

def set_in_a_storm(descriptor, **settings):
    if descriptor == -1:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        print("storm")
    return set_wakeup_fd(descriptor, **settings)

signal.set_wakeup_fd = set_in_a_storm
"""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Close what a test has opened."""
    with ExitStack() as stack:
        yield stack


class Release:
    """Code for a responder that answers when the test says so."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "release"
        self.settings = changed(f"""
import os, trio, trio_server.command
hello_world = trio_server.command.hello_world

async def wait(request, *, delay):
    while not os.path.exists({str(self._file)!r}):
        await trio.sleep(0.01)
    return await hello_world(request, delay=0)

trio_server.command.hello_world = wait
""")

    def now(self) -> None:
        self._file.touch()


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return Release(tmp_path)


def send(process: Process, stack: ExitStack, number: int = 1) -> list[socket.socket]:
    """Send requests; return the clients when the server has received all."""
    clients = [stack.enter_context(process.connect()) for _ in range(number)]
    for client in clients:
        client.sendall(b"hi\n")
    process.wait_for_status(f"INFO {number} open, {number} in flight")
    return clients


def test_each_stop_signal_lets_requests_finish_and_disconnects_a_silent_client(
    start: Start, stack: ExitStack, pool: ThreadPoolExecutor, release: Release
) -> None:
    at_once = [*([one] for one in STOP_SIGNALS), [signal.SIGINT, signal.SIGTERM]]
    options = ("--max-concurrent=1", "--client-timeout=60")
    processes = start_each(start, len(at_once), *options, **release.settings)
    # Of the two requests to each process, one waits for the other.
    clients = list(pool.map(partial(send, stack=stack, number=2), processes))
    for process, received, signums in zip(processes, clients, at_once, strict=True):
        process.freeze()
        received.append(stack.enter_context(process.connect()))  # into the accept queue
        for signum in signums:
            process.kill(signum)
        process.thaw()
    for process in processes:
        process.wait_for_log(": shutting down")
    release.now()
    for process, [*requests, silent], signums in zip(processes, clients, at_once, strict=True):
        # Of two signals at once, two threads may handle one each, in any order.
        names = "|".join(one.name for one in signums)
        assert re.search(f"INFO ({names}): shutting down", process.stderr)
        for client in requests:
            assert receive_all(client) == REPLY
            client.close()
        assert receive_all(silent) == b""
        assert process.wait() == 0
        assert (
            "another Ctrl-C or SIGTERM, at least half a second later, stops immediately"
            in process.stderr
        )
        assert "stopping immediately" not in process.stderr
        assert "INFO stopped: 2 answered, 1 sent nothing, " in process.stderr


def assert_one_is_cut_off(process: Process, client: socket.socket) -> None:
    assert process.wait() == 1
    assert receive_all(client) == b""
    assert re.search(r" cut off after \d+\.\d{3} s: 3 bytes in, 0 out, hi\n", process.stderr)
    assert "1 cut off, 0 failed" in process.log[-1]
    assert "Traceback" not in process.stderr


def test_the_second_signal_stops_at_once_and_is_a_failure_only_if_it_cuts_off_a_request(
    start: Start, stack: ExitStack, pool: ThreadPoolExecutor
) -> None:
    *busy, idle = processes = start_each(start, 3, "--delay=60")
    silent = stack.enter_context(idle.connect())
    clients = list(pool.map(partial(send, stack=stack), busy))
    idle.wait_for_status("INFO 1 open, 0 in flight")
    for process, first in zip(processes, STOP_SIGNALS, strict=True):
        process.kill(first)
    for process in processes:
        process.wait_for_log("shutting down")
    idle.freeze()  # By now, the silent client has less than a second.
    time.sleep(ONE_STOP)
    for process, second in zip(processes, (signal.SIGINT, *STOP_SIGNALS[:2]), strict=True):
        process.kill(second)
    idle.thaw()
    for process, [client] in zip(busy, clients, strict=True):
        assert_one_is_cut_off(process, client)
        assert "stopping immediately" in process.stderr
    assert idle.wait() == 0
    assert receive_all(silent) == b""


def test_the_end_of_the_grace_period_cuts_off_what_is_in_flight(
    serve: Start, stack: ExitStack
) -> None:
    process = serve("--delay=60", "--grace-period=0.2")
    [client] = send(process, stack)
    begun = time.monotonic()
    process.kill(signal.SIGTERM)
    assert_one_is_cut_off(process, client)
    assert time.monotonic() >= begun + 0.2


@pytest.mark.parametrize(
    ("seconds_between", "grace_period"), [(0, 30), (ONE_STOP - 0.01, 30), (ONE_STOP, ONE_STOP)]
)
@pytest.mark.parametrize("second", STOP_SIGNALS)
async def test_two_signals_within_half_a_second_are_one_stop(
    seconds_between: float, grace_period: float, second: int, autojump_clock: MockClock
) -> None:
    async def two_signals() -> AsyncIterator[int]:
        yield signal.SIGINT
        await trio.sleep(seconds_between)
        yield second

    shutdown, begun = Shutdown(), trio.current_time()
    async with aclosing(two_signals()) as received:  # type: ignore[type-var]
        await signals.handle(received, shutdown, Account(), trio.CapacityLimiter(math.inf), 30)
    assert shutdown.grace_ends == begun + grace_period


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(
    start: Start, pool: ThreadPoolExecutor
) -> None:
    def is_ignored(process: Process, signum: signal.Signals) -> None:
        process.wait_for_banner()
        process.kill(signum)
        process.wait_for_status("INFO 0 open")  # so it still runs

    processes = []
    for signum in STOP_SIGNALS:
        ignoring = ("sh", "-c", f'trap "" {signum.name[3:]}; exec "$@"', "sh")
        processes.append(start("--host=127.0.0.1", "--port=0", prefix=ignoring))
    list(pool.map(is_ignored, processes, STOP_SIGNALS))
    for process, signum in zip(processes, STOP_SIGNALS, strict=True):
        process.kill(signal.SIGTERM if signum != signal.SIGTERM else signal.SIGINT)
    for process, signum in zip(processes, STOP_SIGNALS, strict=True):
        assert process.wait() == 0
        assert f"{signum.name}: shutting down" not in process.stderr


def wait_until_it_reads_its_options(process: Process) -> None:
    process.wait_until(lambda: process.stdout == "reading\n")


def test_a_signal_before_the_server_is_ready_ends_it_with_its_number(start: Start) -> None:
    processes = [start(**changed(BLOCKED_WHILE_IT_STARTS)) for _ in STOP_SIGNALS]
    for process, signum in zip(processes, STOP_SIGNALS, strict=True):
        wait_until_it_reads_its_options(process)
        process.kill(signal.SIGUSR1)  # There is no status yet, and this ends nothing.
        process.kill(signum)
    for process, signum in zip(processes, STOP_SIGNALS, strict=True):
        assert process.wait() == 128 + signum
        assert process.stderr == ""


def test_process_1_of_a_container_can_be_stopped_before_it_is_ready(start: Start) -> None:
    namespaces = (tool("unshare"), "--map-root-user", "--pid", "--fork", "--kill-child")
    if subprocess.run([*namespaces, "true"], check=False).returncode != 0:
        (pytest.fail if os.geteuid() == 0 else pytest.skip)("this user may make no namespaces")
    as_process_1 = {**changed(BLOCKED_WHILE_IT_STARTS), "prefix": namespaces}
    process = start(**as_process_1)
    wait_until_it_reads_its_options(process)
    pid = process.popen.pid
    [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(child), signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM


def test_signals_that_arrive_while_trio_ends_are_ignored(start: Start) -> None:
    process = start("--host=127.0.0.1", "--port=0", **changed(STORM_AT_THE_END))
    process.wait_for_banner()
    assert process.stop() == 0
    assert process.stdout.endswith("storm\n")
    assert "Exception ignored" not in process.stderr
    assert "Traceback" not in process.stderr


def test_signals_without_end_leave_exit_status_0_and_no_traceback(start: Start) -> None:
    processes = start_each(start, 3, "--delay=0")
    while running := [process for process in processes if process.popen.poll() is None]:
        for process in running:
            process.kill(signal.SIGTERM)
            process.kill(signal.SIGINT)
        time.sleep(0.0001)  # or the processes only handle signals
    for process in processes:
        assert process.wait() == 0
        assert "Exception ignored" not in process.stderr
        assert "Traceback" not in process.stderr


async def test_more_clients_in_the_accept_queue_than_files_are_all_answered(
    serve: Start,
) -> None:
    # There are three times as many clients as files.
    process = serve("--delay=0.1", prefix=file_limit(40))
    process.freeze()
    clients = [await trio.open_tcp_stream("127.0.0.1", process.port) for _ in range(120)]
    replies: Counter[bytes] = Counter()

    async def ask(client: trio.SocketStream) -> None:
        async with client:
            await client.send_all(b"hi\n")
            replies[await read_all(client)] += 1

    process.kill(signal.SIGTERM)
    process.thaw()
    async with trio.open_nursery() as nursery:
        for client in clients:
            nursery.start_soon(ask, client)
    assert replies == {REPLY: 120}
    assert process.wait() == 0
    assert "120 answered, 0 sent nothing, " in process.stderr


def test_clients_of_an_inherited_socket_are_left_to_the_next_process(
    start: Start, stack: ExitStack, release: Release
) -> None:
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    start_on_socket = partial(activated, start, listener.fileno(), **release.settings)
    first = start_on_socket()
    first.wait_for_banner()
    [in_flight] = send(first, stack)
    first.kill(signal.SIGTERM)
    first.wait_for_log("shutting down")
    later = stack.enter_context(first.connect())
    later.sendall(b"hi\n")
    second = start_on_socket()
    release.now()
    assert receive_all(in_flight) == REPLY
    in_flight.close()
    assert receive_all(later) == REPLY
    later.close()
    assert first.wait() == 0
    assert "stopped: 1 answered, 0 sent nothing, " in first.stderr
    assert second.stop() == 0
    assert "stopped: 1 answered, 0 sent nothing, " in second.stderr
