import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from process import BANNER, Process, Start, activated, receive_all, tool

import trio_server
from trio_server.arguments import parse_arguments
from trio_server.responder import REPLY
from trio_server.signals import ONE_STOP

SLACK = 0.9  # seconds; a busy machine is late


def send(process: Process, request: bytes = b"hi\n") -> socket.socket:
    """Send a request; return when the server has it."""
    client = process.connect()
    client.sendall(request)
    process.wait_for_log(f"{client.getsockname()[1]} sent {len(request)} bytes")
    return client


def test_stdout_says_where_it_listens_and_last_that_it_accepts(start: Start) -> None:
    process = start("--host", "127.0.0.1", "--port", "0", "--delay", "0")
    process.wait_for_banner()
    # Connecting at once must succeed.
    with process.connect() as client:
        client.sendall(b"hi\n")
        assert receive_all(client) == REPLY
    assert process.stop() == 0
    assert process.stdout == (
        f"Listening on http://127.0.0.1:{process.port} (Ctrl-C stops)\n{BANNER}\n"
    )


def lines_of(process: Process) -> list[str]:
    """Return the log without its times."""
    return [re.sub(r"^[\d-]{10} [\d:]{8} ", "", line) for line in process.stderr.splitlines()]


def test_each_connection_leaves_one_line_and_the_end_the_totals(serve: Start) -> None:
    process = serve("--delay", "0.1")
    with process.connect() as client:
        port = client.getsockname()[1]
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert receive_all(client) == REPLY
    process.wait_for_log("answered")
    process.connect().close()  # Who sends nothing is counted, and not shown.
    process.wait_until(lambda: process.stop() == 0)
    answered, shutting_down, stopped = lines_of(process)
    assert re.fullmatch(
        rf"INFO 127\.0\.0\.1:{port} answered in 0\.\d{{3}} s: 35 bytes in, {len(REPLY)} out, "
        r"GET / HTTP/1\.1",
        answered,
    )
    assert shutting_down == "INFO SIGTERM: shutting down"
    assert stopped == (
        "INFO stopped: 1 answered, 1 sent nothing, 0 went away, 0 timed out, 0 cut off, 0 failed"
    )


def test_the_line_of_a_curl_fits_into_100_columns(serve: Start) -> None:
    process = serve("--delay", "0.1")  # which has as many digits as 4
    subprocess.check_call([tool("curl"), "-s", process.url], stdout=subprocess.DEVNULL)
    process.wait_for_log("answered in 0.1")
    [line] = process.stderr.splitlines()
    assert len(line) <= 100


def test_a_client_cannot_forge_a_line_of_the_log_or_move_the_cursor(serve: Start) -> None:
    process = serve("--delay", "0")
    with process.connect() as client:
        client.sendall(b"\r\n2026-01-01 INFO forged\x1b[2J\xe9'\"\\\n and more")
        assert receive_all(client) == REPLY
    process.wait_for_log("answered")
    [line] = process.stderr.splitlines()
    assert line.endswith("111 out, 2026-01-01 INFO forged\\x1b[2J\\xe9\\'\\\"\\\\")
    assert line.isascii()
    assert line.isprintable()


def test_an_ipv4_client_of_a_dual_stack_socket_is_shown_as_ipv4(start: Start) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no dual-stack sockets on this machine")
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        process = activated(start, listener.fileno(), "--delay", "0")
        process.wait_for_banner()
        with socket.create_connection(("127.0.0.1", listener.getsockname()[1])) as client:
            client.sendall(b"hi")
            assert receive_all(client) == REPLY
            port = client.getsockname()[1]
        process.wait_for_log(f" 127.0.0.1:{port} answered")


@contextmanager
def serving_unix(start: Start, path: str) -> Iterator[Process]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        process = activated(start, listener.fileno(), "--delay", "0")
        process.wait_for_banner()
        yield process


def test_an_inherited_unix_socket_is_served(start: Start, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with serving_unix(start, path) as process, socket.socket(socket.AF_UNIX) as client:
        assert f"Listening on {path} " in process.stdout
        client.connect(path)
        client.sendall(b"hi")
        assert receive_all(client) == REPLY
    process.wait_for_log(" client answered in ")


def test_the_path_of_a_unix_client_cannot_forge_a_line_either(
    start: Start, tmp_path: Path
) -> None:
    path = str(tmp_path / "socket")
    with serving_unix(start, path) as process, socket.socket(socket.AF_UNIX) as client:
        client.bind(str(tmp_path / "client\n2026-01-01 INFO forged\x1b[2J"))
        client.connect(path)
        client.sendall(b"hi")
        assert receive_all(client) == REPLY
    process.wait_for_log(r"/client\n2026-01-01 INFO forged\x1b[2J answered in ")
    assert len(process.stderr.splitlines()) == 1


def test_localhost_is_every_address_of_that_name_on_a_port_of_its_own(start: Start) -> None:
    process = start("--port", "0", "--delay", "0")
    process.wait_for_banner()
    expected = {info[4][0] for info in socket.getaddrinfo("localhost", 0)}
    assert {host for host, _ in process.addresses} <= expected
    assert process.addresses
    for address in process.addresses:
        with socket.create_connection(address) as client:
            client.sendall(b"hi\n")
            assert receive_all(client) == REPLY


def test_ipv6_addresses_stand_in_brackets(start: Start) -> None:
    try:
        with socket.socket(socket.AF_INET6) as trial:
            trial.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 on this machine")
    process = start("--host", "::1", "--port", "0", "--delay", "0")
    process.wait_for_banner()
    assert f"Listening on http://[::1]:{process.port} (Ctrl-C stops)\n" in process.stdout
    with socket.create_connection(("::1", process.port)) as client:
        client.sendall(b"hi\n")
        assert receive_all(client) == REPLY
        port = client.getsockname()[1]
    process.wait_for_log(f"[::1]:{port} answered")


def test_an_empty_host_is_all_interfaces(start: Start) -> None:
    process = start("--host", "", "--port", "0")
    process.wait_for_banner()
    assert {host for host, _ in process.addresses} <= {"0.0.0.0", "::"}  # noqa: S104
    with process.connect(), socket.create_connection(("127.0.0.2", process.port)):
        pass


def test_delay(serve: Start) -> None:
    process = serve("--delay", "0.5")
    before = time.monotonic()
    with process.connect() as client:
        client.sendall(b"hi\n")
        assert receive_all(client) == REPLY
    assert 0.5 <= time.monotonic() - before < 0.5 + SLACK


def test_client_timeout(serve: Start) -> None:
    process = serve("--client-timeout", "0.5", "--log-level", "debug")
    before = time.monotonic()
    with process.connect() as client:
        assert receive_all(client) == b""
    assert 0.5 <= time.monotonic() - before < 0.5 + SLACK
    process.wait_for_log("timed out: 0 bytes in, 0 out")


def test_log_level_debug_shows_each_step(serve: Start) -> None:
    process = serve("--log-level", "debug", "--delay", "0")
    with process.connect() as client:
        port = client.getsockname()[1]
        process.wait_for_log(f"127.0.0.1:{port} connected")
        client.sendall(b"hi\n")
        process.wait_for_log(f"127.0.0.1:{port} sent 3 bytes")
    process.connect().close()
    process.wait_for_log(" sent nothing: 0 bytes in, 0 out")
    assert process.stop() == 0
    ignored, empty = (
        process.stderr.index("newcomers are ignored"),
        process.stderr.index("the accept queues are empty"),
    )
    assert ignored < empty


def test_log_level_warning_is_silent_when_all_is_well(start: Start) -> None:
    process = start("--host", "127.0.0.1", "--port", "0", "--log-level", "warning")
    process.wait_for_banner()
    assert process.stop() == 0
    assert process.stderr == ""


def test_version(start: Start) -> None:
    process = start("--version")
    assert process.wait() == 0
    assert process.stdout == f"trio-server {trio_server.__version__}\n"


def test_help_shows_defaults_and_an_example(start: Start) -> None:
    process = start("--help", env={**os.environ, "COLUMNS": "200"})
    assert process.wait() == 0
    for option, default in {
        "--host HOST": "localhost",
        "--port PORT": "1729",
        "--delay SECONDS": "4",
        "--client-timeout SECONDS": "30",
        "--grace-period SECONDS": "30",
        "--max-concurrent N": "no limit",
        "--log-level {debug,info,warning,error}": "info",
    }.items():
        assert re.search(rf"{option}\s[^-]*\(default: {default}\)", process.stdout), option
    assert "example: trio-server --host" in process.stdout


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(
            ("--port", value)
            for value in ("70000", "65536", "-1", "abc", "17.29", "١٧٢٩", "", "9" * 5000)
        ),
        *(("--delay", value) for value in ("-1", "nan", "inf", "-inf", "abc", "")),
        *(("--client-timeout", value) for value in ("-1", "0", "nan", "inf", "abc")),
        *(("--grace-period", value) for value in ("-1", "nan", "inf", "abc")),
        *(("--host", value) for value in ("[::1]", "http://localhost", "localhost:8080")),
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


def fails_to_start(process: Process) -> str:
    """Check that it ends with one plain sentence, and return that."""
    assert process.wait() == 1
    assert process.stdout == ""
    assert process.stderr.count("\n") == 1
    return process.stderr


def test_a_taken_port(serve: Start, start: Start) -> None:
    port = str(serve().port)
    sentence = fails_to_start(start("--host", "127.0.0.1", "--port", port))
    assert sentence == (
        f"trio-server: port {port} is already in use: stop the program that listens on it, "
        "or choose another port with --port\n"
    )


def test_a_privileged_port(start: Start) -> None:
    limit = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    if limit.exists() and int(limit.read_text()) <= 80:
        pytest.skip("no port needs privileges on this machine")
    # Even root may not, without this capability.
    without = (tool("setpriv"), "--bounding-set=-net_bind_service", "--inh-caps=-all")
    process = start("--port", "80", prefix=() if os.geteuid() else without)
    assert fails_to_start(process) == (
        "trio-server: port 80 needs privileges: choose a port from 1024 on with --port\n"
    )


def test_a_host_that_does_not_resolve(start: Start) -> None:
    sentence = fails_to_start(start("--host", "host.invalid"))
    assert sentence.startswith("trio-server: host 'host.invalid' does not resolve (")
    assert sentence.endswith("): check --host\n")


def test_a_host_of_another_machine(start: Start) -> None:
    assert fails_to_start(start("--host", "203.0.113.1")) == (
        "trio-server: this machine has no address of '203.0.113.1': "
        "choose one of its own with --host\n"
    )


STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_one_signal_answers_what_is_in_flight(signum: signal.Signals, serve: Start) -> None:
    process = serve("--delay", "0.5", "--log-level", "debug")
    with send(process) as client:
        process.kill(signum)
        process.wait_for_log(
            f"{signum.name}: shutting down, 1 in flight may take up to 30 s; "
            "a second signal stops now\n"
        )
        assert receive_all(client) == REPLY
    assert process.wait() == 0
    assert "stopped: 1 answered, " in process.stderr


def test_two_signals_cut_off_what_is_in_flight(serve: Start) -> None:
    process = serve("--delay", "60", "--log-level", "debug")
    with send(process) as client:
        process.kill(signal.SIGINT)
        process.wait_for_log("a second signal stops now")
        time.sleep(ONE_STOP)
        assert process.stop(signal.SIGINT) == 1
        assert receive_all(client) == b""
    assert re.search(r" cut off after \d\.\d{3} s: 3 bytes in, 0 out, hi\n", process.stderr)
    assert "1 cut off" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("pair", [STOP_SIGNALS[:2], [signal.SIGTERM] * 2, [signal.SIGINT] * 2])
def test_two_signals_within_half_a_second_are_one_stop(
    pair: list[signal.Signals], serve: Start
) -> None:
    process = serve("--delay", "0.5", "--log-level", "debug")
    with send(process) as client:
        process.kill(pair[0])
        process.wait_for_log("shutting down")
        process.kill(pair[1])
        assert receive_all(client) == REPLY
    assert process.wait() == 0
    assert "stopping now" not in process.stderr


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(
    signum: signal.Signals, serve: Start
) -> None:
    ignoring = ("sh", "-c", f'trap "" {signum.name[3:]}; exec "$@"', "sh")
    process = serve("--delay", "0", prefix=ignoring)
    process.kill(signum)
    with process.connect() as client:
        client.sendall(b"hi\n")
        assert receive_all(client) == REPLY
    other = signal.SIGTERM if signum != signal.SIGTERM else signal.SIGINT
    assert process.stop(other) == 0
    assert f"{signum.name}: shutting down" not in process.stderr


def test_two_signals_with_nothing_in_flight_are_no_failure(serve: Start) -> None:
    process = serve("--delay", "0")
    with process.connect(), process.connect() as client:
        client.sendall(b"hi\n")
        assert receive_all(client) == REPLY  # both are accepted by now
        process.kill(signal.SIGINT)
        process.wait_for_log("SIGINT: shutting down\n")
        time.sleep(ONE_STOP)
        assert process.stop(signal.SIGINT) == 0


def test_sigusr1_says_what_goes_on_at_any_log_level(serve: Start) -> None:
    process = serve("--delay", "60", "--max-concurrent", "1", "--log-level", "error")
    with process.connect() as first, process.connect() as second, process.connect():
        first.sendall(b"hi")
        second.sendall(b"hi")

        def status() -> str:
            process.kill(signal.SIGUSR1)
            time.sleep(0.2)
            return process.stderr

        # For a moment, both wait: to get a permit takes a checkpoint.
        expected = (
            r"INFO 3 open, 2 in flight \(the oldest for \d\.\d s, 1 wait for a permit\); "
            r"since [\d-]{10} [\d:]{8}: 0 answered, 0 sent nothing, .*, 0 failed\n"
        )
        process.wait_until(lambda: re.search(expected, status()) is not None)
    assert process.popen.poll() is None


def test_the_end_of_the_grace_period(serve: Start) -> None:
    process = serve("--delay", "60", "--grace-period", "0.5", "--log-level", "debug")
    with send(process):
        before = time.monotonic()
        assert process.stop(signal.SIGTERM) == 1
    assert 0.5 <= time.monotonic() - before < 0.5 + SLACK
    assert "1 cut off" in process.stderr


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_server_is_ready_ends_it_without_a_traceback(
    signum: signal.Signals, start: Start, tmp_path: Path
) -> None:
    # The first thing that the command does after it has set its signals is to read its options.
    (tmp_path / "sitecustomize.py").write_text(
        "import argparse, time\n"
        "def wait(*_, **__):\n"
        "    print('reading', flush=True)\n"
        "    time.sleep(60)\n"
        "argparse.ArgumentParser.parse_args = wait\n"
    )
    process = start(env={**os.environ, "PYTHONPATH": str(tmp_path)})
    process.wait_until(lambda: process.stdout == "reading\n")
    assert process.stop(signum) == -signum
    assert process.stderr == ""


def test_a_signal_while_a_name_is_resolved_ends_it(start: Start, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import socket, time\n"
        "def wait(_host, _port, family, type, proto, flags):\n"
        "    if not flags & socket.AI_NUMERICHOST:\n"
        "        print('resolving', flush=True)\n"
        "        time.sleep(60)\n"
        "    raise socket.gaierror(socket.EAI_NONAME, 'no number')\n"
        "socket.getaddrinfo = wait\n"
    )
    process = start("--host", "name", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    process.wait_until(lambda: process.stdout.startswith("resolving"))
    assert process.stop(signal.SIGTERM) == 0
    assert "Traceback" not in process.stderr


def test_a_reader_of_the_banner_that_has_gone_is_no_reason_to_stop(start: Start) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = start("--host", "127.0.0.1", "--port", "0", "--delay", "0", stdout=writer)
    os.close(writer)
    process.wait_until(lambda: socket_of(process) is not None)
    with socket.create_connection(("127.0.0.1", socket_of(process) or 0)) as client:
        client.sendall(b"hi\n")
        assert receive_all(client) == REPLY
    assert process.stop() == 0
    assert "Traceback" not in process.stderr


def socket_of(process: Process) -> int | None:
    """Find the port of a process that cannot say it."""
    listening = subprocess.check_output([tool("ss"), "-Hltnp"], text=True)
    found = re.search(rf":(\d+) .*pid={process.popen.pid},", listening)
    return int(found[1]) if found else None


@pytest.mark.parametrize(
    ("host", "advice"),
    [
        ("[::1]", "write --host ::1"),
        ("http://localhost", "write --host localhost"),
        ("localhost:8080", "write --host localhost --port 8080"),
        ("https://[::1]:80/", "write --host ::1 --port 80"),
        ("user@localhost", "write --host localhost"),
        ("localhost:99999", "write --host localhost"),
        ("[::1", "write --host localhost"),
    ],
)
def test_a_host_that_is_a_part_of_a_url_is_told_how_to_be_written(
    host: str, advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trio-server", "--host", host])
    with pytest.raises(SystemExit):
        parse_arguments()
    assert capsys.readouterr().err.endswith(f"{host!r} is more than a host: {advice}\n")


def test_head_gets_the_header_fields_without_the_body(serve: Start) -> None:
    process = serve("--delay", "0")
    with process.connect() as client:
        client.sendall(b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert receive_all(client) == REPLY.removesuffix(b"Hello World!")


class Manager:
    """A process manager that wants to be told (sd_notify(3))."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.settimeout(10)

    def hears(self) -> str:
        return self.socket.recv(4096).decode()


@pytest.mark.parametrize("abstract", [False, True])
def test_a_process_manager_is_told_of_each_step(
    abstract: bool,  # noqa: FBT001 - pytest passes it
    serve: Start,
    tmp_path: Path,
) -> None:
    name = f"{tmp_path.name}-{os.getpid()}" if abstract else str(tmp_path / "notify")
    manager = Manager(f"\0{name}" if abstract else name)
    with manager.socket:
        address = f"@{name}" if abstract else name
        process = serve(env={**os.environ, "NOTIFY_SOCKET": address})
        assert manager.hears() == "READY=1"
        process.kill(signal.SIGUSR1)
        assert manager.hears().startswith("STATUS=0 open, 0 in flight; since ")
        process.kill(signal.SIGTERM)
        assert manager.hears() == "STOPPING=1"
    assert process.wait() == 0


def test_a_process_manager_that_is_gone_is_no_reason_to_stop(serve: Start, tmp_path: Path) -> None:
    process = serve(env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "gone")})
    assert process.stop() == 0


def test_a_process_manager_that_does_not_read_holds_nobody_up(
    serve: Start, tmp_path: Path
) -> None:
    manager = Manager(str(tmp_path / "notify"))
    with manager.socket, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.settimeout(0)
        with suppress(BlockingIOError):
            while True:
                other.sendto(b"x", str(tmp_path / "notify"))
        process = serve(
            "--delay", "0", env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        )
        for _ in range(5):
            process.kill(signal.SIGUSR1)
        with process.connect() as client:
            client.sendall(b"hi")
            assert receive_all(client) == REPLY
        assert process.stop() == 0


def test_a_start_that_fails_is_not_ready(start: Start, tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    with manager.socket:
        settings = {"env": {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}}
        assert start("--host", "host.invalid", **settings).wait() == 1
        manager.socket.settimeout(0)
        with pytest.raises(BlockingIOError):
            manager.hears()
