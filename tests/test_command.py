"""The command: its options, its addresses, what it prints, and what a process manager needs."""

import math
import os
import re
import signal
import socket
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import trio
from process import BANNER, Process, Start, activated, changed, receive_all, request, tool
from trio.testing import MockClock, wait_all_tasks_blocked

import trio_server
from trio_server.command import limited
from trio_server.command.arguments import parse_arguments
from trio_server.responder import REPLY

TAKEN = "is already in use: stop the program that listens on it, or choose another port"

LOCALHOST = """
import socket
getaddrinfo = socket.getaddrinfo

def resolve(host, *args, **settings):
    if host not in ("localhost", b"localhost"):
        return getaddrinfo(host, *args, **settings)
    return [info for one in {} for info in getaddrinfo(one, *args, **settings)]

socket.getaddrinfo = resolve
"""

NO_THREADS = """
import threading

def fail(thread):
    raise RuntimeError("can't start new thread")

threading.Thread.start = fail
"""


def localhost(*addresses: str) -> str:
    """Return code that gives `localhost` these addresses."""
    return LOCALHOST.format(addresses)


def ask(address: tuple[str, int], text: bytes = b"hi\n") -> tuple[int, bytes]:
    """Return the client's port and the reply."""
    with socket.create_connection(address, timeout=10) as client:
        client.sendall(text)
        return client.getsockname()[1], receive_all(client)


def test_it_prints_where_it_listens_and_logs_each_connection_and_the_totals(
    serve: Start,
) -> None:
    process = serve("--delay", "0.1")  # which accepts connections as soon as it prints the banner
    assert process.stdout == (
        f"Listening on http://127.0.0.1:{process.port} (Ctrl-C stops)\n{BANNER}\n"
    )
    port, reply = ask(process.addresses[0], b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert reply == REPLY
    head = ask(process.addresses[0], b"HEAD / HTTP/1.1\r\n\r\n")[1]
    assert head == REPLY.removesuffix(b"Hello World!")
    ask(process.addresses[0], b"\r\n2026-01-01 INFO forged\x1b[2J\xe9\\\n and more")
    process.connect().close()  # The totals count a client that sends nothing.
    process.wait_for_log("forged")
    assert process.stop() == 0
    answered, _, forged, shutting_down, stopped = process.log
    assert re.fullmatch(
        rf"INFO 127\.0\.0\.1:{port} answered in \d+\.\d{{3}} s: 35 bytes in, {len(REPLY)} out, "
        r"GET / HTTP/1\.1",
        answered,
    )
    assert forged.endswith("111 out, 2026-01-01 INFO forged\\x1b[2J\\xe9\\\\")
    assert shutting_down.startswith("INFO SIGTERM: shutting down")
    assert stopped == (
        "INFO stopped: 3 answered, 1 sent nothing, 0 went away, 0 timed out, 0 cut off, 0 failed"
    )


def test_the_work_lasts_for_the_delay_and_a_silent_client_has_the_client_timeout(
    serve: Start,
) -> None:
    process = serve("--delay", "0.3", "--client-timeout", "0.4", "--log-level", "DEBUG")
    before = time.monotonic()
    assert ask(process.addresses[0])[1] == REPLY
    assert 0.3 <= time.monotonic() - before < 4  # the default
    before = time.monotonic()
    with process.connect() as client:
        assert receive_all(client) == b""
    assert 0.4 <= time.monotonic() - before < 20  # The default is 30 s.
    process.wait_for_log("timed out: 0 bytes in, 0 out")  # at the level DEBUG


def test_an_ipv4_client_of_a_dual_stack_socket_is_shown_as_ipv4(start: Start) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no dual-stack sockets on this machine")
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        process = activated(start, listener.fileno(), "--delay", "0")
        process.wait_for_banner()
        port, reply = ask(("127.0.0.1", listener.getsockname()[1]))
        assert reply == REPLY
        process.wait_for_log(f" 127.0.0.1:{port} answered")


def test_an_inherited_unix_socket_is_served_and_its_client_cannot_forge_a_line(
    start: Start, tmp_path: Path
) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(path)
        listener.listen()
        process = activated(start, listener.fileno(), "--delay", "0")
        process.wait_for_banner()
        assert f"Listening on {path!r} " in process.stdout
        client.bind(str(tmp_path / "client\n2026-01-01 INFO forged\x1b[2J"))
        client.connect(path)
        client.sendall(b"hi")
        assert receive_all(client) == REPLY
        client.close()
        process.wait_for_log(" answered in ")
        assert len(process.stderr.splitlines()) == 1


def test_an_inherited_unix_socket_may_have_an_abstract_address(start: Start) -> None:
    address = f"\0trio-server-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(address)
        listener.listen()
        process = activated(start, listener.fileno(), "--delay", "0")
        process.wait_for_banner()
        client.connect(address)
        client.sendall(b"hi")
        assert receive_all(client) == REPLY
    assert process.stop() == 0


def test_a_host_may_be_a_name_or_an_ipv6_address_or_all_interfaces(start: Start) -> None:
    hosts = ["localhost", ""]
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        hosts.append("::1")
    named, everywhere, *ipv6 = (start("--port=0", "--delay=0", "--host", one) for one in hosts)
    for process in (named, everywhere, *ipv6):
        process.wait_for_banner()
        assert process.addresses
        for address in process.addresses:
            assert ask(address)[1] == REPLY
    assert {host for host, _ in named.addresses} <= {
        info[4][0] for info in socket.getaddrinfo("localhost", 0)
    }
    assert {host for host, _ in everywhere.addresses} <= {"0.0.0.0", "::"}  # noqa: S104
    assert request(("127.0.0.2", everywhere.port)) == "answered"
    for process in ipv6:
        assert f"Listening on http://[::1]:{process.port} (Ctrl-C stops)\n" in process.stdout
        port, _ = ask(("::1", process.port))
        process.wait_for_log(f"[::1]:{port} answered")


def test_localhost_is_each_address_that_this_machine_has(start: Start) -> None:
    several = start("--port=0", "--delay=0", **changed(localhost("127.0.0.1", "127.0.0.2")))
    twice = start("--port=0", **changed(localhost("127.0.0.1", "127.0.0.1")))
    # No machine has an address that is reserved for documentation (RFC 5737).
    first_missing = start("--port=0", **changed(localhost("203.0.113.1", "127.0.0.1")))
    last_missing = start("--port=0", **changed(localhost("127.0.0.1", "203.0.113.1")))
    none = start("--port=0", **changed(localhost("203.0.113.1", "203.0.113.2")))
    several.wait_for_banner()
    assert [host for host, _ in several.addresses] == ["127.0.0.1", "127.0.0.2"]
    assert [ask(address)[1] for address in several.addresses] == [REPLY, REPLY]
    assert several.stop() == 0  # One signal stops both.
    assert "stopped: 2 answered" in several.stderr
    for process, warnings in ((twice, 0), (first_missing, 1), (last_missing, 1)):
        process.wait_for_banner()
        assert [host for host, _ in process.addresses] == ["127.0.0.1"]
        assert process.stop() == 0
        assert process.stderr.count("WARNING not listening on 203.0.113.1: ") == warnings
        assert process.stderr.count("WARNING") == warnings
    assert none.wait() == 1
    assert none.log[-1] == (
        "ERROR 'localhost' is not an address of this machine: choose another --host"
    )


def test_localhost_with_one_address_taken_is_the_end_and_leaves_nothing_running(
    start: Start,
) -> None:
    with socket.create_server(("127.0.0.2", 0)) as taken:
        port = str(taken.getsockname()[1])
        addresses = changed(localhost("127.0.0.1", "127.0.0.2"))
        process = start("--port", port, "--client-timeout=600", "--grace-period=600", **addresses)
        assert TAKEN in fails_to_start(process)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(port)))


def test_without_a_thread_the_server_works_and_an_unknown_name_is_one_sentence(
    start: Start,
) -> None:
    def without_threads(host: str) -> Process:
        return start("--port=0", "--delay=0", "--host", host, **changed(NO_THREADS))

    hosts = ("127.0.0.1", "", "localhost", "host.invalid")
    numeric, everywhere, named, name = map(without_threads, hosts)
    for process in (numeric, everywhere, named):
        process.wait_for_banner()
        assert ask(process.addresses[0])[1] == REPLY
        process.wait_for_log(" answered in ")
        process.kill(signal.SIGTERM)
    assert named.wait() == 0
    for process in (numeric, everywhere):
        assert process.wait() == 0
        starts = [line.split(":")[0] for line in process.log]
        assert starts == ["INFO 127.0.0.1", "INFO SIGTERM", "INFO stopped"]
    assert fails_to_start(name).startswith("ERROR host 'host.invalid' does not resolve (")


def fails_to_start(process: Process) -> str:
    """Check that it ends with one plain sentence, and return that."""
    assert process.wait() == 1
    assert process.stdout == ""
    [line] = process.log
    return line


def test_a_start_that_fails_is_one_sentence(start: Start) -> None:
    limit = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    if limit.exists() and int(limit.read_text()) <= 80:
        pytest.skip("no port needs privileges on this machine")
    # Without this capability, even root may not listen on port 80.
    without = (tool("setpriv"), "--bounding-set=-net_bind_service", "--inh-caps=-all")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        on_taken = start("--host", "127.0.0.1", "--port", port)
        on_80 = start("--port", "80", prefix=() if os.geteuid() else without)
        unknown = start("--host", "host.invalid")
        impossible = [start("--host", host) for host in ("a..b", "x" * 64, "[::1]")]
        elsewhere = start("--host", "203.0.113.1")
        assert fails_to_start(on_taken) == f"ERROR port {port} {TAKEN} with --port"
    assert fails_to_start(on_80) == (
        "ERROR port 80 needs privileges: choose 1024 or higher with --port"
    )
    for process in (unknown, *impossible):
        sentence = fails_to_start(process)
        assert re.fullmatch(r"ERROR host '\S+' does not resolve \(.+\): check --host", sentence)
    assert fails_to_start(elsewhere) == (
        "ERROR '203.0.113.1' is not an address of this machine: choose another --host"
    )


def test_version_and_help_and_the_level_warning(start: Start) -> None:
    version = start("--version")
    described = start("--help", env={**os.environ, "COLUMNS": "200"})
    silent = start("--host=127.0.0.1", "--port=0", "--log-level", "warning")
    assert version.wait() == 0
    assert version.stdout == f"trio-server {trio_server.__version__}\n"
    assert described.wait() == 0
    for option, default in {
        "--host HOST": "localhost",
        "--port N": "1729",
        "--delay SECONDS": "4.0",
        "--client-timeout SECONDS": "30.0",
        "--grace-period SECONDS": "30.0",
        "--max-concurrent N": "inf",
        "--log-level {debug,info,warning,error}": "info",
    }.items():
        assert re.search(rf"{option}\s[^-]*\(default: {default}\)", described.stdout), option
    silent.wait_for_banner()
    assert silent.stop() == 0
    assert silent.stderr == ""


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--port", value) for value in ("70000", "65536", "-1", "abc", "17.29", "", "9" * 5000)),
        *(("--delay", value) for value in ("-1", "nan", "inf", "-inf", "abc", "")),
        *(("--client-timeout", value) for value in ("-1", "0", "nan", "inf", "abc")),
        *(("--grace-period", value) for value in ("-1", "nan", "inf", "abc")),
        *(("--max-concurrent", value) for value in ("0", "-1", "1.5", "abc")),
        ("--log-level", "loud"),
    ],
)
def test_a_wrong_value_is_a_usage_error_that_names_the_option(
    option: str,
    value: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["trio-server", option, value])
    with pytest.raises(SystemExit) as info:
        parse_arguments()
    assert info.value.code == 2
    output = capsys.readouterr()
    assert f"trio-server: error: argument {option}: " in output.err
    assert output.out == ""


@pytest.mark.parametrize("most", [1, 2, math.inf])
async def test_requests_that_wait_for_the_limit_are_answered_in_order_of_arrival(
    most: float, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    limiter = trio.CapacityLimiter(most)
    answered: list[tuple[bytes, float]] = []

    async def respond(request: bytes) -> bytes:
        await trio.sleep(1)
        return request

    async def be_a_client(request: bytes) -> None:
        reply = await limited(limiter, respond, request)
        answered.append((reply, trio.current_time() - begun))

    begun = trio.current_time()
    for number in range(6):
        nursery.start_soon(be_a_client, b"%d" % number)
        await wait_all_tasks_blocked()
    await trio.sleep(10)
    expected = [(b"%d" % number, number // most + 1 if most < 6 else 1) for number in range(6)]
    assert sorted(answered) == expected
    if most == 1:
        assert answered == expected


def test_with_a_limit_of_one_the_second_request_waits_and_silent_clients_do_not_count(
    serve: Start,
) -> None:
    process = serve("--delay", "60", "--max-concurrent", "1")
    with process.connect() as first, process.connect() as second, process.connect():
        first.sendall(b"hi")
        second.sendall(b"hi")
        process.wait_for_status(
            r"INFO 3 open, 2 in flight, 1 waiting for --max-concurrent; "
            r"0 answered, 0 sent nothing, .*, 0 failed"
        )


def test_a_stdout_that_is_closed_or_has_no_reader_does_not_end_the_server(start: Start) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    options = ("--host", "127.0.0.1", "--port", "0", "--delay", "0")
    closed = start(*options, prefix=("sh", "-c", 'exec "$@" >&-', "sh"))
    without_reader = start(*options, stdout=writer)
    os.close(writer)
    for process in (closed, without_reader):
        while port_of(process) is None:
            time.sleep(0.01)
        assert request(("127.0.0.1", port_of(process) or 0)) == "answered"
        process.kill(signal.SIGTERM)
    for process in (closed, without_reader):
        assert process.wait() == 0
        assert "Traceback" not in process.stderr


def port_of(process: Process) -> int | None:
    """Find the port of a process that cannot print it."""
    sockets = set()
    for one in Path(f"/proc/{process.popen.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # It was closed meanwhile.
            sockets.add(str(one.readlink()).removeprefix("socket:[").removesuffix("]"))
    for row in Path(f"/proc/{process.popen.pid}/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *_, inode = row.split()[:10]
        if state == "0A" and inode in sockets:  # It listens.
            return int(local.split(":")[1], 16)
    return None


class Manager:
    """A process manager that receives messages (sd_notify(3))."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.settimeout(10)

    def receive(self) -> str:
        return self.socket.recv(4096).decode()

    def receive_all_that_came(self) -> list[str]:
        self.socket.settimeout(0)
        messages = []
        with suppress(BlockingIOError):
            while True:
                messages.append(self.receive())
        return messages


@pytest.mark.parametrize("abstract", [False, True])
def test_a_process_manager_receives_each_change_of_state(
    abstract: bool,  # noqa: FBT001 - pytest passes it
    serve: Start,
    tmp_path: Path,
) -> None:
    name = f"{tmp_path.name}-{os.getpid()}" if abstract else str(tmp_path / "notify")
    manager = Manager(f"\0{name}" if abstract else name)
    with manager.socket:
        address = f"@{name}" if abstract else name
        process = serve("--log-level", "error", env={**os.environ, "NOTIFY_SOCKET": address})
        assert manager.receive() == "READY=1"
        process.kill(signal.SIGUSR1)  # The status is sent at any log level.
        assert manager.receive().startswith("STATUS=0 open, 0 in flight, ")
        process.kill(signal.SIGTERM)
        assert manager.receive() == "STOPPING=1"
    assert process.wait() == 0


def test_a_process_manager_that_has_gone_or_does_not_read_delays_nothing(
    start: Start, tmp_path: Path
) -> None:
    manager = Manager(str(tmp_path / "notify"))
    with manager.socket, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.settimeout(0)
        with suppress(BlockingIOError):
            while True:
                other.sendto(b"x", str(tmp_path / "notify"))
        start_with = partial(start, "--host=127.0.0.1", "--port=0", "--delay=0")
        processes = [
            start_with(env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / name)})
            for name in ("gone", "notify")
        ]
        for process in processes:
            process.wait_for_banner()
            process.kill(signal.SIGUSR1)
            assert request(process.addresses[0]) == "answered"
            process.kill(signal.SIGTERM)
        for process in processes:
            assert process.wait() == 0
            assert "Traceback" not in process.stderr


def test_a_start_that_fails_is_never_reported_as_ready(start: Start, tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    with manager.socket:
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        assert start("--host=host.invalid", env=environment).wait() == 1
        assert manager.receive_all_that_came() == []
