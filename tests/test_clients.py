"""The programs that people try the server with, against the real process."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from process import Process, Start, tool

from trio_server.responder import REPLY


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    options = ("--host=127.0.0.1", "--port=0", "--delay=0")
    process = Process(tmp_path_factory.mktemp("server"), options)
    try:
        process.wait_for_banner()
        yield process
    finally:
        process.popen.kill()
        process.wait()


def run(*command: str | Path, text: bytes = b"") -> bytes:
    return subprocess.run(command, input=text, capture_output=True, check=True, timeout=60).stdout


def file_of(size: int, folder: Path) -> Path:
    path = folder / f"{size}-bytes"
    path.write_bytes(b"x" * size)
    return path


def test_curl_get(server: Process) -> None:
    assert run(tool("curl"), "-si", server.url) == REPLY


@pytest.mark.parametrize("size", [1500, 3_000_000])
def test_curl_post(size: int, server: Process, tmp_path: Path) -> None:
    body = file_of(size, tmp_path)
    # Without `Expect: 100-continue`, curl sends the body at once.
    command = ("-si", "-H", "Expect:", "--data-binary", f"@{body}", server.url)
    assert run(tool("curl"), *command) == REPLY


def test_curl_head(server: Process) -> None:
    assert run(tool("curl"), "-sI", server.url) == REPLY.removesuffix(b"Hello World!")


@pytest.mark.parametrize("size", [1500, 3_000_000])
def test_wget_post(size: int, server: Process, tmp_path: Path) -> None:
    body = file_of(size, tmp_path)
    command = ("-q", "-O", "-", f"--post-file={body}", server.url)
    assert REPLY.endswith(run(tool("wget"), *command))


def test_netcat_with_a_typed_line(server: Process) -> None:
    # A terminal stays open after the line; so does this pipe, until netcat has ended.
    with subprocess.Popen(
        [tool("nc"), "127.0.0.1", str(server.port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as netcat:
        assert netcat.stdin
        assert netcat.stdout
        netcat.stdin.write(b"hi\n")
        netcat.stdin.flush()
        assert netcat.stdout.read(len(REPLY)) == REPLY
        netcat.stdin.close()
        assert netcat.stdout.read() == b""
        assert netcat.wait(10) == 0


@pytest.mark.parametrize("size", [3, 1500, 3_000_000])
def test_netcat_that_closes_its_half(size: int, server: Process, tmp_path: Path) -> None:
    text = file_of(size, tmp_path).read_bytes()
    assert run(tool("nc"), "-N", "127.0.0.1", str(server.port), text=text) == REPLY


def test_ab_100_requests_10_at_a_time(server: Process) -> None:
    report = run(tool("ab"), "-n", "100", "-c", "10", server.url).decode()
    assert "Complete requests:      100\n" in report
    assert "Failed requests:        0\n" in report
    assert "Non-2xx" not in report


def test_ten_curls_at_once_take_one_delay(serve: Start) -> None:
    server = serve("--delay", "0.4")
    before = time.monotonic()
    curls = [
        subprocess.Popen([tool("curl"), "-si", server.url], stdout=subprocess.PIPE)
        for _ in range(10)
    ]
    assert [curl.communicate(timeout=60)[0] for curl in curls] == [REPLY] * 10
    # One after the other, they would take 4 seconds.
    assert 0.4 <= time.monotonic() - before < 4
