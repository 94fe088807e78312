"""What the README promises under its heading "What is promised", on real sockets."""

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import trio
from process import Process, Start, hammering, receive_all, request, tool
from streams import read_all

from trio_server import Outcome, Server
from trio_server.connection import CLOSING_TIME
from trio_server.responder import REPLY

SLACK = 0.9  # seconds; a busy machine is late

# Runs the rest of the command line as a process manager does: with the socket whose descriptor
# comes first on that line as descriptor 3, and the variables of sd_listen_fds(3).
ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.fixture(autouse=True)
def many_files() -> None:
    """Let this process open as many files as the tests need for their clients."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))


def activated(start: Start, descriptor: int, *options: str) -> Process:
    activate = (sys.executable, "-c", ACTIVATE, str(descriptor))
    return start("--port", "0", *options, prefix=activate, pass_fds=[descriptor])


def descriptors(process: Process) -> int:
    return len(list(Path(f"/proc/{process.popen.pid}/fd").iterdir()))


def resident_pages(process: Process) -> int:
    return int(Path(f"/proc/{process.popen.pid}/statm").read_text().split()[1])


def test_last_call_answers_500_clients_in_the_listen_queue(serve: Start) -> None:
    process = serve("--delay", "0.2")
    process.kill(signal.SIGSTOP)
    clients = [process.connect() for _ in range(500)]
    for client in clients:
        client.sendall(b"hi\n")
    process.kill(signal.SIGTERM)
    process.kill(signal.SIGCONT)
    for client in clients:
        with client:
            assert receive_all(client) == REPLY
    assert process.wait() == 0
    assert "500 answered, " in process.stderr


def test_five_shutdowns_under_load_answer_all_they_let_in(serve: Start) -> None:
    for _ in range(5):
        process = serve("--delay", "0.05")
        with hammering(("127.0.0.1", process.port), clients=50) as results:
            time.sleep(0.5)
            assert process.stop() == 0
        assert results["answered"] > 100
        refused = [result for result in results if result.startswith("ConnectionRefusedError")]
        assert set(results) <= {"answered", *refused}


def test_ten_restarts_under_load_lose_nothing(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listener:
        address = listener.getsockname()

        def start_next() -> Process:
            process = activated(start, listener.fileno(), "--delay", "0.1")
            process.wait_for_banner()
            return process

        process = start_next()
        assert "serving on inherited sockets" in process.stderr
        assert process.addresses == [address]
        with hammering(address, clients=50) as results:
            for _ in range(10):
                successor = start_next()
                assert process.stop() == 0
                process = successor
                time.sleep(0.2)
        assert process.stop() == 0
    assert set(results) == {"answered"}
    assert results.total() > 1000


@pytest.mark.parametrize("kind", ["file", "datagram", "not listening", "unix"])
def test_an_inherited_descriptor_of_the_wrong_kind(
    kind: str, start: Start, tmp_path: Path
) -> None:
    with (
        (tmp_path / "file").open("w") as file,
        socket.socket(type=socket.SOCK_DGRAM) as datagram,
        socket.socket() as plain,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        unix.bind(str(tmp_path / "socket"))
        unix.listen()
        descriptor = {
            "file": file.fileno(),
            "datagram": datagram.fileno(),
            "not listening": plain.fileno(),
            "unix": unix.fileno(),
        }[kind]
        process = activated(start, descriptor)
        assert process.wait() == 1
    assert process.stdout == ""
    assert process.stderr == (
        "trio-server: inherited descriptor 3 is not a listening TCP socket: "
        "pass one, as with ListenStream= in a systemd socket unit\n"
    )


@pytest.mark.parametrize("number", ["one", "-1"])
def test_a_number_of_inherited_sockets_that_is_none(number: str, start: Start) -> None:
    set_pid = ("sh", "-c", 'export LISTEN_PID=$$; exec "$@"', "sh")
    process = start(prefix=set_pid, env={**os.environ, "LISTEN_FDS": number})
    assert process.wait() == 1
    assert process.stderr == (
        f"trio-server: LISTEN_FDS={number} is not a number of sockets: unset it\n"
    )


def test_sockets_for_another_process_are_not_for_us(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        variables = {**os.environ, "LISTEN_PID": "1", "LISTEN_FDS": "1"}
        process = start("--host", "127.0.0.1", "--port", "0", env=variables)
        process.wait_for_banner()
        assert process.addresses != [listener.getsockname()]
    assert "inherited" not in process.stderr


def test_inherited_sockets_are_not_passed_on(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = activated(start, listener.fileno())
        process.wait_for_banner()
    flags = re.search(r"flags:\s*(\d+)", Path(f"/proc/{process.popen.pid}/fdinfo/3").read_text())
    assert flags
    assert int(flags[1], 8) & os.O_CLOEXEC

    variables = """
import os
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0", "LISTEN_FDNAMES": ""}
import trio_server.__main__ as command
assert command.inherited_sockets() == []
print([name for name in os.environ if name.startswith("LISTEN_")])
"""
    assert subprocess.check_output([sys.executable, "-c", variables]) == b"[]\n"


def test_systemd_starts_it_on_the_first_connection_and_loses_nothing(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    activate = (tool("systemd-socket-activate"), "-l", f"127.0.0.1:{address[1]}")
    process = start("--delay", "0.1", prefix=activate)
    process.wait_for_log("Listening on")
    assert process.stdout == ""
    with hammering(address, clients=50) as results:
        process.wait_for_banner()
        time.sleep(1)
    assert process.stop() == 0
    assert set(results) == {"answered"}
    assert results.total() > 100


async def test_1000_clients_at_once_with_a_limit_of_256_files(serve: Start) -> None:
    limited = ("sh", "-c", 'ulimit -n 256; exec "$@"', "sh")
    process = serve("--delay", "0.2", prefix=limited)
    before = descriptors(process)
    started = time.monotonic()
    results: Counter[bytes] = Counter()

    async def one_client() -> None:
        async with await trio.open_tcp_stream("127.0.0.1", process.port) as client:
            await client.send_all(b"hi\n")
            results[await read_all(client)] += 1

    async with trio.open_nursery() as nursery:
        for _ in range(1000):
            nursery.start_soon(one_client)
    assert results == {REPLY: 1000}
    seconds = time.monotonic() - started

    process.wait_until(lambda: descriptors(process) == before)
    complaints = re.findall("accept returned EMFILE", process.stderr)
    assert 1 <= len(complaints) <= seconds + 1
    assert "Traceback" not in process.stderr
    assert process.stop() == 0


def test_the_file_limit_is_raised_and_said(serve: Start) -> None:
    lowered = ("sh", "-c", 'ulimit -S -n 100; exec "$@"', "sh")
    process = serve("--log-level", "debug", prefix=lowered)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert f"limit of open files: was 100, is {hard}\n" in process.stderr
    limits = Path(f"/proc/{process.popen.pid}/limits").read_text()
    assert re.search(rf"Max open files\s+{hard}\s+{hard}\s", limits)


def test_1000_hostile_clients_do_not_slow_a_good_one(serve: Start) -> None:
    process = serve("--delay", "0.5", "--client-timeout", "2")
    before = descriptors(process)
    hostile = Path(__file__).with_name("hostile.py")
    with subprocess.Popen([sys.executable, hostile, str(process.port), "12", "200"]) as mob:
        process.wait_until(lambda: descriptors(process) > before + 500)
        times = []
        until = time.monotonic() + 10
        while time.monotonic() < until:
            started = time.monotonic()
            assert request(("127.0.0.1", process.port)) == "answered"
            times.append(time.monotonic() - started)
        assert mob.poll() is None
        assert mob.wait(20) == 0
    assert max(times) < 0.5 + 1
    process.wait_until(lambda: descriptors(process) == before)
    assert "Traceback" not in process.stderr
    # Nothing is left to wait for: no connection's task is alive.
    assert process.stop(seconds=1) == 0
    ended = re.findall(r" \d+ bytes in, ", process.stderr)
    totals = re.findall(r"stopped: .*", process.stderr)
    assert len(ended) == sum(map(int, re.findall(r"\d+", totals[0])))


def test_50000_connections_leave_descriptors_and_memory_flat(serve: Start) -> None:
    process = serve("--delay", "0")
    before = descriptors(process)

    def serve_half() -> int:
        report = subprocess.run(
            [tool("ab"), "-q", "-n", "25000", "-c", "50", process.url],
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
        assert b"Complete requests:      25000\n" in report
        assert b"Failed requests:        0\n" in report
        process.wait_until(lambda: descriptors(process) == before)
        return resident_pages(process)

    first, second = serve_half(), serve_half()
    assert second <= first * 1.02


BIG = 10_000_000  # bytes: more than the kernel's buffers take


async def faulty(request: bytes) -> bytes:
    match request:
        case b"raise":
            raise ValueError("boom")
        case b"raise group":
            raise ExceptionGroup("boom", [ValueError(), OSError()])
        case b"nothing":
            return None  # type: ignore[return-value]
        case b"big":
            return bytes(BIG)
        case b"never":
            await trio.sleep_forever()
    await trio.sleep(0.2)
    return REPLY


async def connect(port: int, request: bytes = b"") -> trio.SocketStream:
    client = await trio.open_tcp_stream("127.0.0.1", port)
    if request:
        await client.send_all(request)
    return client


async def read_slowly(client: trio.SocketStream) -> int:
    received = 0
    async for chunk in client:
        received += len(chunk)
        await trio.sleep(0.005)
    return received


async def test_neighbours_do_not_notice_faulty_responders() -> None:
    tasks_before = trio.lowlevel.current_statistics().tasks_living
    server = Server(faulty)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(server.serve_tcp, 0, "127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        faults = (b"raise", b"raise group", b"nothing", b"never")
        clients = [await connect(port, fault) for fault in faults]
        slow_reads = []

        async def read_big() -> None:
            async with await connect(port, b"big") as client:
                slow_reads.append(await read_slowly(client))

        nursery.start_soon(read_big)
        for _ in range(10):
            started = trio.current_time()
            async with await connect(port, b"hi") as client:
                assert await read_all(client) == REPLY
            assert trio.current_time() - started < 0.2 + SLACK
        for client in clients[:3]:
            assert await read_all(client) == b""
        while not slow_reads:
            await trio.sleep(0.01)
        assert slow_reads == [BIG]

        started = trio.current_time()
        server.shut_down(0.3)
    assert trio.current_time() - started < 0.3 + SLACK
    for client in clients:
        await client.aclose()
    assert server.outcomes == {Outcome.ANSWERED: 11, Outcome.FAILED: 3, Outcome.CUT_OFF: 1}
    assert trio.lowlevel.current_statistics().tasks_living == tasks_before


async def test_shutdown_with_a_connection_in_every_state() -> None:
    async def respond(request: bytes) -> bytes:
        if request == b"work":
            await trio.sleep(1.5)
        return bytes(BIG) if request == b"big" else REPLY

    server = Server(respond, max_connections=4)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(server.serve_tcp, 0, "127.0.0.1")
        port = listeners[0].socket.getsockname()[1]

        silent = await connect(port)
        in_flight = await connect(port, b"work")
        replying = await connect(port, b"big")
        closing = await connect(port, b"quick")
        assert await read_all(closing) == REPLY
        waiting = await connect(port, b"work")
        waiting_silent = await connect(port)
        with trio.fail_after(1):  # until all are accepted, and three requests received
            while server.in_flight < 3 or len(server._connections) < 6:  # noqa: SLF001
                await trio.sleep(0.01)

        started = trio.current_time()
        server.shut_down(3.5)

        async def expect(client: trio.SocketStream, reply: bytes, earliest: float) -> None:
            assert await read_all(client) == reply
            assert earliest <= trio.current_time() - started < earliest + SLACK

        async with trio.open_nursery() as clients:
            clients.start_soon(expect, silent, b"", CLOSING_TIME)
            clients.start_soon(expect, waiting_silent, b"", CLOSING_TIME)
            clients.start_soon(expect, in_flight, REPLY, 1.4)
            clients.start_soon(expect, waiting, REPLY, CLOSING_TIME + 1.5)
    assert 3.5 <= trio.current_time() - started < 3.5 + SLACK  # the slow reader is cut off
    assert server.outcomes == {Outcome.ANSWERED: 3, Outcome.TIMED_OUT: 2, Outcome.CUT_OFF: 1}
    for client in (silent, in_flight, replying, closing, waiting, waiting_silent):
        await client.aclose()


def test_a_signal_with_a_connection_in_every_state(serve: Start) -> None:
    process = serve("--delay", "1.5", "--max-connections", "3", "--log-level", "debug")

    def connected(text: bytes) -> socket.socket:
        client = process.connect()
        client.sendall(text)
        return client

    with (
        connected(b"closes last") as closing,
        connected(b"hi") as in_flight,
        process.connect() as silent,
        connected(b"waits") as waiting,
        process.connect() as waiting_silent,
    ):
        assert closing.recv(1000) == REPLY
        process.wait_for_log("sent 5 bytes")
        started = time.monotonic()
        process.kill(signal.SIGTERM)
        for client, reply in (
            (in_flight, REPLY),
            (silent, b""),
            (waiting_silent, b""),
            (waiting, REPLY),
        ):
            assert receive_all(client) == reply
        in_flight.close()
        waiting.close()
        assert process.wait() == 0
        assert time.monotonic() - started < 1 + 1.5 + SLACK
    assert "3 answered, 0 sent nothing, 0 went away, 2 timed out, 0 cut off" in process.stderr
