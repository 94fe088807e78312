"""What fifteen lines get wrong: each test does the same to them and to this server."""

import fcntl
import itertools
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from process import Process, Start, changed, file_limit, request, tool
from streams import RESET_ON_CLOSE

FIFTEEN_LINES = Path(__file__).with_name("benchmark") / "peers/fifteen_lines.py"


@dataclass
class Server:
    """One of the two servers."""

    process: Process
    port: int
    files: int = 0  # open ones, without a client

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def ask(self, *text: bytes, timeout: float = 10) -> str:
        """Send a request; return "answered" or "lost"."""
        outcome = request(("127.0.0.1", self.port), *text, timeout=timeout)
        return "answered" if outcome == "answered" else "lost"

    def wait_until_accepted(self, number: int) -> None:
        """Wait until it has accepted this many clients: each is an open file."""
        self.process.wait_until(lambda: self.process.descriptors >= self.files + number)

    @property
    def waiting(self) -> int | None:
        """The number of clients in the accept queue, or None if no program listens."""
        # Such a row reads `0: 0100007F:06C1 00000000:0000 0A 00000000:00000002 …`: 2 of them.
        row = rf":{self.port:04X} \S+ 0A \w+:(\w+) "
        found = re.search(row, Path(f"/proc/{self.process.popen.pid}/net/tcp").read_text())
        return int(found[1], 16) if found else None


Servers = Callable[..., tuple[Server, Server]]


@pytest.fixture
def servers(start: Start, tmp_path: Path) -> Iterator[Servers]:
    """Start the fifteen lines, or a variation of them, and this server."""

    def start_both(
        *options: str,
        delay: float = 0.3,
        text: str = FIFTEEN_LINES.read_text(),
        ours: dict[str, Any] | None = None,
        **settings: Any,
    ) -> tuple[Server, Server]:
        (tmp_path / "program.py").write_text(text)
        program = [str(tmp_path / "program.py")]
        # While this socket has the port, no other program gets it. It does not listen.
        reserved = stack.enter_context(socket.socket())
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        one = start(str(port), str(delay), program=program, **settings)
        other = start("--port=0", f"--delay={delay}", *options, **settings, **(ours or {}))
        other.wait_for_banner()
        servers = Server(one, port), Server(other, other.port)
        one.wait_until(lambda: servers[0].waiting is not None)
        for server in servers:
            server.files = server.process.descriptors
        return servers

    with ExitStack() as stack:
        yield start_both


def results(futures: list[Future[str]]) -> list[str]:
    """Return the different results of clients."""
    return sorted({future.result() for future in futures})


def test_the_readme_contains_the_fifteen_lines() -> None:
    lines = [line for line in FIFTEEN_LINES.read_text().splitlines() if line]
    assert len(lines) == 15
    shown = (Path(__file__).parents[1] / "README.md").read_text().split("```python\n")[1]
    assert [line for line in shown.split("\n```")[0].splitlines() if line] == lines


def test_a_client_resets(servers: Servers, pool: ThreadPoolExecutor) -> None:
    def reset_beside_a_good_client(server: Server) -> str:
        good = pool.submit(server.ask)
        with server.connect() as bad:
            server.wait_until_accepted(2)
            bad.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        return good.result()

    fifteen, ours = both = servers()
    assert list(pool.map(reset_beside_a_good_client, both)) == ["lost", "answered"]
    assert fifteen.process.wait() == 1
    assert "BrokenResourceError" in fifteen.process.stderr
    ours.process.wait_for_status("1 answered, 0 sent nothing, 1 went away")
    assert "BrokenResourceError" not in ours.process.stderr


def test_a_client_sends_more_than_the_server_reads(
    servers: Servers, pool: ThreadPoolExecutor
) -> None:
    def send_all_and_then_read(server: Server) -> str:
        return server.ask(b"x" * 40_000_000)

    assert list(pool.map(send_all_and_then_read, servers(delay=0))) == ["lost", "answered"]


def test_a_client_is_silent(servers: Servers) -> None:
    fifteen, ours = servers("--client-timeout", "0.1")
    with fifteen.connect() as client, ours.connect() as other:
        assert other.recv(1) == b""  # The server has closed the connection.
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.recv(1)


def test_the_server_is_stopped_with_a_request_in_flight(
    servers: Servers, pool: ThreadPoolExecutor
) -> None:
    def stop_during_a_request(server: Server, stop: signal.Signals) -> str:
        client = pool.submit(server.ask)
        server.wait_until_accepted(1)
        server.process.stop(stop)
        return client.result()

    all_four = [*servers(), *servers()]
    stops = [signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT]
    outcomes = list(pool.map(stop_during_a_request, all_four, stops))
    assert outcomes == ["lost", "answered"] * 2
    tracebacks = ["Traceback" in server.process.stderr for server in all_four]
    assert tracebacks == [False, False, True, False]


GRACEFUL = """
import signal


async def main() -> None:
    async with trio.open_nursery() as handlers, trio.open_nursery() as accept_loops:
        serve = partial(trio.serve_tcp, handler, PORT, host="localhost", handler_nursery=handlers)
        accept_loops.start_soon(serve)
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            await anext(signals)
        accept_loops.cancel_scope.cancel()


trio.run(main)
"""


def test_the_server_is_stopped_with_clients_in_the_accept_queue(
    servers: Servers, pool: ThreadPoolExecutor
) -> None:
    text = FIFTEEN_LINES.read_text().split("\ntrio.run")[0] + GRACEFUL

    def stop_with_a_queue(server: Server) -> list[str]:
        server.process.freeze()
        clients = [pool.submit(server.ask) for _ in range(80)]
        server.process.wait_until(lambda: server.waiting == 80)
        server.process.kill(signal.SIGTERM)
        server.process.thaw()
        return results(clients)

    fifteen, _ = both = servers(text=text, delay=0)
    by_fifteen, by_ours = pool.map(stop_with_a_queue, both)
    assert "lost" in by_fifteen
    assert fifteen.process.wait() == 0
    assert by_ours == ["answered"]


SUSPEND = "os.kill(os.getpid(), signal.SIGSTOP)"
SUSPENDING_RESPONDER = f"""
import os, signal
import trio_server.command

async def suspend(request, *, delay):
    {SUSPEND}

trio_server.command.hello_world = suspend
"""


def test_many_clients_connect_at_once(servers: Servers) -> None:
    def clients_that_wait_during_the_first_request(server: Server) -> int | None:
        """Return the length of the queue. If it overflows, its clients wait for a second."""
        server.process.freeze()
        with ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(server.connect()).sendall(b"hi")
            assert server.waiting == 200
            server.process.thaw()
            server.wait_until_accepted(1)
            server.process.wait_until_suspended()
            return server.waiting

    text = FIFTEEN_LINES.read_text().replace("await trio.sleep(DELAY)", SUSPEND)
    text = f"import os, signal\n{text}"
    fifteen, ours = servers(text=text, ours=changed(SUSPENDING_RESPONDER))
    assert clients_that_wait_during_the_first_request(fifteen)
    assert clients_that_wait_during_the_first_request(ours) == 0


def test_there_are_more_clients_than_files(servers: Servers, pool: ThreadPoolExecutor) -> None:
    fifteen, ours = servers(prefix=file_limit(40, soft=True), delay=0.2)
    clients = [pool.submit(server.ask) for _ in range(70) for server in (fifteen, ours)]
    assert results(clients) == ["answered"]
    assert fifteen.process.stderr.count("Traceback") > 1
    assert "Too many open files" in fifteen.process.stderr
    assert "Too many open files" not in ours.process.stderr


def test_localhost_is_also_an_address_that_the_machine_does_not_have(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    enter = f"""
        mount --bind {tmp_path}/hosts /etc/hosts
        echo 1 > /proc/sys/net/ipv6/conf/lo/disable_ipv6
        ip link set lo up
        exec "$@"
    """
    tool("ip")
    namespaces = (tool("unshare"), "--map-root-user", "--net", "--mount")
    if subprocess.run([*namespaces, "true"], check=False).returncode != 0:
        (pytest.fail if os.geteuid() == 0 else pytest.skip)("this user may make no namespaces")
    prefix = (*namespaces, "sh", "-ec", enter, "sh")
    fifteen = start("1729", "0", program=[str(FIFTEEN_LINES)], prefix=prefix)
    assert fifteen.wait() == 1
    assert "Cannot assign requested address" in fifteen.stderr
    ours = start(prefix=prefix)
    ours.wait_for_banner()
    assert ours.addresses == [("127.0.0.1", 1729)]


def test_the_port_is_taken(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        fifteen = start(port, "0", program=[str(FIFTEEN_LINES)])
        ours = start("--port", port)
        assert (fifteen.wait(), ours.wait()) == (1, 1)
    assert "Traceback" in fifteen.stderr
    assert f" ERROR port {port} is already in use: " in ours.stderr
    assert len(ours.stderr.splitlines()) == 1


def test_nothing_reads_the_log(servers: Servers) -> None:
    text = "import logging\nlogging.basicConfig(level=logging.INFO)\n" + FIFTEEN_LINES.read_text()
    text = text.replace("await trio.sleep(DELAY)", "logging.info('a request')")
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    try:
        fifteen, ours = servers(text=text, delay=0, stderr=writer)
        until_lost = itertools.takewhile(
            lambda _: fifteen.ask(timeout=1) == "answered", range(250)
        )
        assert 100 < len(list(until_lost)) < 250  # The pipe holds some 200 lines.
        assert all(ours.ask() == "answered" for _ in range(50))
        fifteen.process.kill(signal.SIGKILL)
    finally:
        os.close(reader)
        os.close(writer)
