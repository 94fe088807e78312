import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from process import BANNER, Process, Start, receive_all, tool

import trio_server
from trio_server.responder import REPLY

SLACK = 0.9  # seconds; a busy machine is late


def send(process: Process, request: bytes = b"hi\n") -> socket.socket:
    """Send a request; return when the server has it."""
    client = process.connect()
    client.sendall(request)
    process.wait_for_log(f"{client.getsockname()[1]} sent {len(request)} bytes")
    return client


def test_the_banner_says_that_it_accepts_and_is_alone_on_stdout(start: Start) -> None:
    process = start("--host", "127.0.0.1", "--port", "0", "--delay", "0")
    process.wait_until(lambda: process.stdout != "")
    # Connecting at once must succeed.
    with process.connect() as client:
        client.sendall(b"hi\n")
        assert receive_all(client) == REPLY
    assert process.stop() == 0
    assert process.stdout == f"{BANNER}\n"


def test_each_connection_leaves_one_line_and_the_end_the_totals(serve: Start) -> None:
    process = serve("--delay", "0.1")
    with process.connect() as client:
        port = client.getsockname()[1]
        client.sendall(b"hi\n")
        assert receive_all(client) == REPLY
    process.wait_for_log("answered")
    process.connect().close()
    process.wait_for_log("sent nothing")
    assert process.stop() == 0
    lines = [re.sub(r"^\S+ \S+ ", "", line) for line in process.stderr.splitlines()]
    assert re.fullmatch(r"INFO listening on 127\.0\.0\.1:\d+", lines[0])
    assert re.fullmatch(
        rf"INFO 127\.0\.0\.1:{port} answered: 3 bytes in, {len(REPLY)} bytes out, 0\.\d{{3}} s",
        lines[1],
    )
    assert re.fullmatch(
        r"INFO 127\.0\.0\.1:\d+ sent nothing: 0 bytes in, 0 bytes out, 0\.\d{3} s", lines[2]
    )
    assert lines[3:] == [
        "INFO SIGTERM: shutting down, 0 in flight may take up to 30 s; a second signal stops now",
        "INFO stopped: 1 answered, 1 sent nothing, 0 went away, 0 timed out, 0 cut off, 0 failed",
    ]


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
    assert f"listening on [::1]:{process.port}\n" in process.stderr
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
    process = serve("--client-timeout", "0.5")
    before = time.monotonic()
    with process.connect() as client:
        assert receive_all(client) == b""
    assert 0.5 <= time.monotonic() - before < 0.5 + SLACK
    process.wait_for_log("timed out: 0 bytes in, 0 bytes out")


def test_log_level_debug_shows_the_stages(serve: Start) -> None:
    process = serve("--log-level", "debug", "--delay", "0")
    with process.connect() as client:
        client.sendall(b"hi\n")
        assert receive_all(client) == REPLY
    process.wait_for_log("sent 3 bytes")


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
        *(("--port", value) for value in ("70000", "65536", "-1", "abc", "17.29", "١٧٢٩", "")),
        *(("--delay", value) for value in ("-1", "nan", "inf", "-inf", "abc", "")),
        *(("--client-timeout", value) for value in ("-1", "0", "nan", "inf", "abc")),
        *(("--grace-period", value) for value in ("-1", "nan", "inf", "abc")),
        *(("--max-concurrent", value) for value in ("0", "-1", "1.5", "abc")),
        ("--log-level", "loud"),
    ],
)
def test_a_wrong_value_is_a_usage_error_that_names_the_option(
    option: str, value: str, start: Start
) -> None:
    process = start(option, value)
    assert process.wait() == 2
    assert f"trio-server: error: argument {option}: " in process.stderr
    assert "Traceback" not in process.stderr
    assert process.stdout == ""


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


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_answers_what_is_in_flight(signum: signal.Signals, serve: Start) -> None:
    process = serve("--delay", "1", "--log-level", "debug")
    with send(process) as client:
        process.kill(signum)
        process.wait_for_log(f"{signum.name}: shutting down, 1 in flight may take up to 30 s")
        assert receive_all(client) == REPLY
    assert process.wait() == 0
    assert "stopped: 1 answered, " in process.stderr


def test_two_signals_cut_off_what_is_in_flight(serve: Start) -> None:
    process = serve("--delay", "60", "--log-level", "debug")
    with send(process) as client:
        process.kill(signal.SIGINT)
        process.wait_for_log("a second signal stops now")
        assert process.stop(signal.SIGINT) == 1
        assert receive_all(client) == b""
    assert "cut off: 3 bytes in, 0 bytes out" in process.stderr
    assert "1 cut off" in process.stderr
    assert "Traceback" not in process.stderr


def test_two_signals_with_nothing_in_flight_are_no_failure(serve: Start) -> None:
    process = serve("--log-level", "debug", "--delay", "0")
    with process.connect(), process.connect() as client:
        client.sendall(b"hi\n")
        assert receive_all(client) == REPLY  # both are accepted by now
        process.kill(signal.SIGINT)
        process.wait_for_log("a second signal stops now")
        assert process.stop(signal.SIGINT) == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_without_end_are_no_failure(signum: signal.Signals, start: Start) -> None:
    # A name to resolve, as that takes a thread, and a signal may reach any thread.
    process = start("--host", "localhost", "--port", "0")
    process.wait_for_banner()
    while process.popen.poll() is None:
        process.kill(signum)
        time.sleep(0.0005)
    assert process.wait() == 0
    assert "Traceback" not in process.stderr


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
    process.wait_for_log("listening on")
    with process.connect() as client:
        client.sendall(b"hi\n")
        assert receive_all(client) == REPLY
    assert process.stop() == 0
    assert "Traceback" not in process.stderr
