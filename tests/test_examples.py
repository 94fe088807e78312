"""The examples, as their reader runs them: copied into an empty folder, with real clients.

Each scenario mostly waits, so all of them run side by side.
"""

import importlib.util
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path

import pytest
from process import Process, receive_all

from trio_server.responder import REPLY

EXAMPLES = Path(__file__).with_name("examples")
CERTIFICATE = Path(__file__).with_name("localhost.pem")
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
TEXT_FRAME = b"\x81\x0cHello World!"  # RFC 6455, section 5.2
GOING_AWAY_FRAME = b"\x88\x02\x03\xe9"  # the code 1001


class Example:
    """A running example, copied into an empty folder."""

    def __init__(self, folder: Path, name: str, changes: dict[str, str]) -> None:
        text = (EXAMPLES / name).read_text()
        for old, new in changes.items():
            assert text.count(old) == 1
            text = text.replace(old, new)
        self.folder = folder
        # While this socket has the port, no other scenario gets it. It does not listen.
        self.reserved = socket.socket()
        self.reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.reserved.bind(("127.0.0.1", 0))
        self.port: int = self.reserved.getsockname()[1]
        assert text.count(" 1729") == 1
        (folder / name).write_text(text.replace(" 1729", f" {self.port}"))
        options = [str(CERTIFICATE)] if name == "tls.py" else []
        self.process = Process(folder, options, program=(name,), cwd=folder)

    def wait_until_it_listens(self) -> None:
        self.process.wait_until(lambda: not self.refuses_connections())

    def connect(self, request: bytes = b"") -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        client.sendall(request)
        return client

    def refuses_connections(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=0.1).close()
        except ConnectionRefusedError:
            return True
        except TimeoutError:  # It ignores new connections, but still listens.
            pass
        return False

    def assert_it_ended_well(self) -> None:
        assert self.process.wait() == 0
        assert self.process.stderr == ""


class Starter:
    """Starts examples, and kills those that still run when the scenario has ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[Example] = []

    def start(
        self, name: str, changes: dict[str, str] | None = None, folder: Path | None = None
    ) -> Example:
        if name == "asgi.py" and not importlib.util.find_spec("hypercorn"):
            pytest.skip("asgi.py needs hypercorn: pip install -e '.[bench]'")
        if folder is None:
            folder = self.folder / str(len(self._started))
            folder.mkdir()
        self._started.append(Example(folder, name, changes or {}))
        return self._started[-1]

    def run(
        self, name: str, changes: dict[str, str] | None = None, folder: Path | None = None
    ) -> Example:
        example = self.start(name, changes, folder)
        example.wait_until_it_listens()
        return example

    def play(self, scenario: "Scenario") -> None:
        try:
            scenario(self)
        finally:
            for example in self._started:
                example.process.popen.kill()
                example.process.wait()
                example.reserved.close()


Scenario = Callable[[Starter], None]
SCENARIOS: list[Scenario] = []


def side_by_side(scenario: Scenario) -> Scenario:
    SCENARIOS.append(scenario)
    return scenario


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Scenario, Future[None]]]:
    folder = tmp_path_factory.mktemp
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        yield {one: pool.submit(Starter(folder("examples")).play, one) for one in SCENARIOS}


@side_by_side
def each_server_without_a_client_ends_quietly_at_ctrl_c(starter: Starter) -> None:
    names = ("echo.py", "line_protocol.py", "tls.py", "two_servers.py")
    examples = [starter.start(name) for name in names]
    for example in examples:
        example.wait_until_it_listens()
        example.process.kill(signal.SIGINT)
    for example in examples:
        example.assert_it_ended_well()


@side_by_side
def echo_disconnects_an_idle_client_at_sigterm_and_at_ctrl_c(starter: Starter) -> None:
    both = [starter.run("echo.py") for _ in range(2)]
    clients = [echo.connect(b"hello") for echo in both]
    for echo, client, signum in zip(both, clients, (signal.SIGTERM, signal.SIGINT), strict=True):
        assert client.recv(100) == b"hello"
        echo.process.kill(signum)
    for echo, client in zip(both, clients, strict=True):
        with client:
            assert client.recv(100) == b""
        echo.assert_it_ended_well()


@side_by_side
def a_second_signal_leaves_the_handlers_less_time(starter: Starter) -> None:
    echo = starter.run("echo.py", {"begin(5": "begin(0.5"})
    with echo.connect() as client:  # It does not read, so the server cannot send all.
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.sendall(b"x" * 40_000_000)
        echo.process.kill(signal.SIGINT)
        echo.process.wait_until(echo.refuses_connections)
        echo.process.kill(signal.SIGTERM)
        assert echo.process.wait() == 0  # The grace period is longer than this waits.
    assert "cancelled by the shutdown: 1" in echo.process.stderr
    assert "Traceback" not in echo.process.stderr


@side_by_side
def a_stop_that_arrives_as_two_signals_loses_nothing(starter: Starter) -> None:
    lines = starter.run("line_protocol.py")
    with lines.connect(b"one\n") as client:
        time.sleep(0.5)  # The server works on the line for a second.
        lines.process.kill(signal.SIGINT)
        time.sleep(0.05)
        lines.process.kill(signal.SIGINT)
        assert receive_all(client) == b"ONE\n"
    lines.assert_it_ended_well()


@side_by_side
def lines_that_have_arrived_are_answered_and_an_idle_client_disconnected(
    starter: Starter,
) -> None:
    lines = starter.run("line_protocol.py", {"sleep(1)": "sleep(0.2)"})
    with lines.connect(b"one\ntwo\nth") as busy, lines.connect() as idle:
        assert receive_until(busy, b"\n") == b"ONE\n"
        lines.process.kill(signal.SIGTERM)
        busy.sendall(b"ree\n")
        assert receive_all(idle) == b""
        assert receive_all(busy) == b"TWO\nTHREE\n"
    lines.assert_it_ended_well()


@side_by_side
def a_client_that_keeps_sending_lines_does_not_delay_the_end(starter: Starter) -> None:
    lines = starter.run("line_protocol.py", {"sleep(1)": "sleep(0.05)"})
    with lines.connect() as client, suppress(ConnectionError):
        for number in range(100):
            client.sendall(b"one\n")
            if not client.recv(100):
                break
            if number == 2:
                lines.process.kill(signal.SIGTERM)
    lines.assert_it_ended_well()
    assert number < 99


@side_by_side
def a_line_that_is_too_long_or_not_finished_ends_its_connection(starter: Starter) -> None:
    lines = starter.run("line_protocol.py")
    with lines.connect(b"x" * 1001) as too_long, lines.connect(b"one\ntw") as unfinished:
        assert receive_all(too_long) == b""
        unfinished.shutdown(socket.SHUT_WR)
        assert receive_all(unfinished) == b"ONE\n"
    lines.process.kill(signal.SIGTERM)
    lines.assert_it_ended_well()


@side_by_side
def tls_clients_in_the_accept_queue_are_answered(starter: Starter) -> None:
    tls = starter.run("tls.py")
    context = ssl.create_default_context(cafile=str(CERTIFICATE))

    def ask(client: socket.socket) -> bytes:
        with context.wrap_socket(client, server_hostname="localhost") as secured:
            secured.sendall(b"hi")
            return secured.recv(1000)

    tls.process.freeze()
    clients = [tls.connect() for _ in range(10)]
    with ThreadPoolExecutor(len(clients)) as pool:
        replies = pool.map(ask, clients)
        tls.process.kill(signal.SIGTERM)
        tls.process.thaw()
        assert list(replies) == [REPLY] * 10
    tls.assert_it_ended_well()


@side_by_side
def asgi_loses_no_request_of_keep_alive_clients(starter: Starter) -> None:
    asgi = starter.run("asgi.py", {"sleep(1)": "sleep(0.1)"})

    def ask_until_told_to_close(number: int) -> None:
        client = HTTPConnection("127.0.0.1", asgi.port, timeout=10)
        for asked in range(1000):
            client.request("GET", "/")
            reply = client.getresponse()
            assert reply.read() == b"Hello World!"
            if reply.will_close:
                return
            if number == 0 and asked == 2:
                asgi.process.kill(signal.SIGTERM)
        pytest.fail("no reply had the header field")

    with ThreadPoolExecutor(30) as pool:
        list(pool.map(ask_until_told_to_close, range(30)))
    asgi.assert_it_ended_well()


@side_by_side
def asgi_clients_in_the_accept_queue_are_answered_at_ctrl_c(starter: Starter) -> None:
    asgi = starter.run("asgi.py", {"sleep(1)": "sleep(0.1)"})
    asgi.process.freeze()
    clients = [asgi.connect(GET) for _ in range(10)]
    asgi.process.kill(signal.SIGINT)
    asgi.process.thaw()
    for client in clients:
        with client:
            assert receive_all(client).endswith(b"Hello World!\r\n0\r\n\r\n")
    asgi.assert_it_ended_well()


@side_by_side
def each_kind_of_asgi_client_gets_at_a_shutdown_what_the_docstring_says(starter: Starter) -> None:
    changes = {
        "            await receive()\n": '            print((await receive())["type"])\n',
        "sleep(1)": "sleep(0.3)",
        "Config(),": "Config.from_mapping(keep_alive_timeout=1000),",  # so only the shutdown ends
    }
    asgi = starter.run("asgi.py", changes)
    with (
        asgi.connect(UPGRADE) as websocket,
        asgi.connect(GET) as keep_alive,
        asgi.connect() as silent,
    ):
        assert receive_until(websocket, TEXT_FRAME).startswith(b"HTTP/1.1 101 ")
        receive_until(keep_alive, b"Hello World!\r\n0\r\n\r\n")
        with asgi.connect(GET) as streaming:
            assert b"connection: close" not in receive_until(streaming, b"\r\n\r\n")
            asgi.process.kill(signal.SIGTERM)
            assert receive_all(websocket) == GOING_AWAY_FRAME
            assert receive_all(streaming) == b"c\r\nHello World!\r\n0\r\n\r\n"
            assert receive_all(keep_alive) == receive_all(silent) == b""
    asgi.assert_it_ended_well()
    assert asgi.process.stdout == "lifespan.startup\nlifespan.shutdown\n"


def receive_until(client: socket.socket, end: bytes) -> bytes:
    received = b""
    while not received.endswith(end):
        data = client.recv(1)
        assert data, f"got only {received!r}"
        received += data
    return received


@side_by_side
def the_admin_command_stops_both_servers_and_a_request_is_answered(starter: Starter) -> None:
    changes = {"respond=hello_world": "respond=partial(hello_world, delay=1)"}
    both = starter.run("two_servers.py", changes)
    path = both.folder / "admin.sock"
    with both.connect(b"hi") as client, socket.socket(socket.AF_UNIX) as admin:
        admin.settimeout(10)
        both.process.wait_until(lambda: admin.connect_ex(str(path)) == 0)
        admin.sendall(b"stop\n")
        assert receive_all(admin) == b"stopping\n"
        assert receive_all(client) == REPLY
    both.assert_it_ended_well()
    assert not path.exists()


@side_by_side
def sigterm_stops_both_servers_and_a_path_that_was_left_behind_is_no_obstacle(
    starter: Starter,
) -> None:
    killed = starter.run("two_servers.py")
    path = killed.folder / "admin.sock"
    killed.process.wait_until(path.exists)
    killed.process.stop(signal.SIGKILL)
    both = starter.run("two_servers.py", folder=killed.folder)
    with socket.socket(socket.AF_UNIX) as admin:
        both.process.wait_until(lambda: admin.connect_ex(str(path)) == 0)
        both.process.kill(signal.SIGTERM)
        both.assert_it_ended_well()
    assert not path.exists()


@side_by_side
def the_tests_of_a_handler_pass(starter: Starter) -> None:
    command = [sys.executable, "-m", "pytest", "-o", "trio_mode=true", "test_handler.py"]
    folder = starter.folder
    shutil.copy(EXAMPLES / "test_handler.py", folder)
    output = subprocess.check_output(command, text=True, timeout=30, cwd=folder)
    assert " 3 passed in " in output


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_example(scenario: Scenario, outcomes: dict[Scenario, Future[None]]) -> None:
    outcomes[scenario].result()
