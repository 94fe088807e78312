"""The README's own text: its programs run, its links point at what they say."""

import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from process import Process, Start, free_port, receive_all, request

from trio_server.responder import REPLY

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SOURCE_LINKS = re.findall(r"\[`([^`]+)`\]\(([\w./]+)#L(\d+)\)", README)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


PROGRAMS = blocks("python")  # The first is that of test_naive.py.
_, RESPONDER, LINES, TLS, TEST = PROGRAMS


@contextmanager
def running(program: str) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """Run a program on a free port; connect to it."""
    port = free_port("127.0.0.1")
    command = [sys.executable, "-c", program.replace("1729", str(port))]
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            give_up = time.monotonic() + 10
            while True:
                try:
                    client = socket.create_connection(("127.0.0.1", port), timeout=10)
                    break
                except ConnectionRefusedError:
                    assert time.monotonic() < give_up
                    time.sleep(0.01)
            with client:
                yield process, client
        finally:
            process.kill()


def test_the_responder() -> None:
    with running(RESPONDER) as (_, client):
        client.sendall(b"hello")
        assert receive_all(client) == b"HELLO"


def test_the_line_protocol_and_its_end() -> None:
    with running(LINES.replace("sleep(60)", "sleep(0.5)")) as (process, client):
        client.sendall(b"one\ntw")
        client.sendall(b"o\n")
        assert receive_all(client) == b"eno\nowt\n"
        assert process.wait(10) == 0


def test_tls() -> None:
    program = TLS.replace("respond=hello_world", "respond=partial(hello_world, delay=0)")
    with running(program) as (_, client):
        context = ssl.create_default_context(cafile=str(ROOT / "tests/localhost.pem"))
        with context.wrap_socket(client, server_hostname="localhost") as secured:
            secured.sendall(b"hi")
            assert secured.recv(1024) == REPLY


def test_the_test_passes(tmp_path: Path) -> None:
    (tmp_path / "test_from_readme.py").write_text(TEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntrio_mode = true\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    assert "1 passed" in subprocess.check_output(command, text=True, timeout=30, cwd=tmp_path)


def test_it_is_short() -> None:
    assert len(README.splitlines()) < 300
    for program in PROGRAMS:
        assert sum(line.strip() != "" for line in program.splitlines()) <= 20


def broken(start: Start, folder: Path, file: str, *options: str) -> Process:
    """Start the command with the change of a file that "Break it yourself" asks for."""
    found = re.search(rf"^- In `{file}`, write `(.*?)` for `(.*?)`", README, re.MULTILINE)
    assert found
    shutil.copytree(ROOT / "trio_server", folder / "trio_server")
    path = folder / "trio_server" / file
    text = path.read_text()
    assert text.count(found[2]) == 1
    path.write_text(text.replace(found[2], found[1]))
    process = start("--port", "0", *options, cwd=folder)
    process.wait_for_banner()
    return process


def test_a_task_that_blocks_stops_all_others(start: Start, tmp_path: Path) -> None:
    process = broken(start, tmp_path, "responder.py", "--delay", "0.3")
    begun = time.monotonic()
    with ThreadPoolExecutor() as pool:
        assert set(pool.map(request, [("127.0.0.1", process.port)] * 3)) == {"answered"}
    assert time.monotonic() - begun >= 0.9


def test_without_draining_a_reply_is_lost(start: Start, tmp_path: Path) -> None:
    process = broken(start, tmp_path, "connection.py", "--delay", "0")
    with process.connect() as client, pytest.raises(ConnectionError):
        client.sendall(b"x" * 40_000_000)


@pytest.mark.parametrize(("text", "path", "number"), SOURCE_LINKS)
def test_a_link_points_at_what_it_says(text: str, path: str, number: str) -> None:
    assert text in (ROOT / path).read_text().splitlines()[int(number) - 1]


def test_each_row_of_the_table_links_to_its_test() -> None:
    lines = (ROOT / "tests/test_naive.py").read_text().splitlines()
    numbers = [
        int(number) for number in re.findall(r"\[test\]\(tests/test_naive.py#L(\d+)\)", README)
    ]
    starts = [number for number, line in enumerate(lines, 1) if line.startswith("def test_")]
    assert sorted(numbers) == starts[1:]  # The first compares the texts.


def test_links_to_files_and_sections() -> None:
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#(?!L\d)([^)]*))?", README):
        assert (ROOT / path).exists()
        if anchor:
            text = (ROOT / (path or "README.md")).read_text()
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            names = (re.sub(r"[^\w -]", "", heading).lower() for heading in headings)
            assert anchor in {name.replace(" ", "-") for name in names}


def test_the_table_of_options_is_complete(start: Start) -> None:
    process = start("--help")
    assert process.wait() == 0
    options = set(re.findall(r"--[a-z-]+", process.stdout))
    assert options == set(
        re.findall(r"`(--[a-z-]+)", README.split("## Options, ")[1].split("\n## ")[0])
    )
