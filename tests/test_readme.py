"""The pages: their commands and programs run, and what they name and link exists."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from process import Process, Start, free_port, request

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TOUR = (ROOT / "trio_server/README.md").read_text()
PAGES = [
    ROOT / "README.md",
    ROOT / "trio_server/README.md",
    *ROOT.glob("tests/README.md"),
    *ROOT.glob("tests/*/README.md"),
]


def program(number: int) -> str:
    """Return one of the programs on the front page."""
    found = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return str(found[number])


def test_the_two_commands_stand_there_as_they_are_run() -> None:
    in_an_environment = "python3 -m venv .venv && .venv/bin/pip install -q -e"
    assert f"\n{in_an_environment} . && .venv/bin/python -m trio_server\n" in README
    assert f"\n{in_an_environment} '.[test]' && .venv/bin/pytest\n" in README


def test_the_first_program_is_the_one_of_the_benchmark() -> None:
    assert program(0) == (ROOT / "tests/benchmark/peers/fifteen_lines.py").read_text()


def test_the_second_program_echoes_and_stops(tmp_path: Path) -> None:
    port = free_port("127.0.0.1")
    text = program(1).replace("1729", str(port))
    process = Process(tmp_path, [], program=("-c", text))

    def echoes() -> bool:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
                client.sendall(b"hello")
                return client.recv(10) == b"hello"
        except ConnectionRefusedError:
            return False

    try:
        process.wait_until(echoes)
        assert process.stop() == 0
        assert process.stderr == ""
    finally:
        process.popen.kill()


def test_the_program_of_the_tour_prints_what_it_says() -> None:
    found = re.search(r"^```python\n(.*?)^```$", TOUR, re.MULTILINE | re.DOTALL)
    assert found
    jumping = "trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))"
    text = "import trio.testing\n" + found[1].replace("trio.run(main)", jumping)
    output = subprocess.check_output([sys.executable, "-c", text], text=True)
    assert output == "True\nBoth are started. Neither has run yet.\n(ValueError('oops'),)\n"


def broken(start: Start, folder: Path, number: int, *options: str) -> Process:
    """Start the command with the change that a step of "Break it yourself" asks for."""
    found = re.search(
        rf"^{number}\. In `(.*?)`, write `(.*?)` instead of `(.*?)`", TOUR, re.MULTILINE
    )
    assert found
    shutil.copytree(ROOT / "trio_server", folder / "trio_server")
    path = folder / "trio_server" / found[1]
    text = path.read_text()
    assert text.count(found[3]) == 1
    path.write_text(text.replace(found[3], found[2]))
    process = start("--port", "0", *options, cwd=folder)
    process.wait_for_banner()
    return process


def test_a_task_that_blocks_stops_all_others(start: Start, tmp_path: Path) -> None:
    process = broken(start, tmp_path, 1, "--delay", "0.2")
    begun = time.monotonic()
    with ThreadPoolExecutor() as pool:
        assert set(pool.map(request, [("127.0.0.1", process.port)] * 3)) == {"answered"}
    assert time.monotonic() - begun >= 0.6


def test_without_draining_a_reply_is_lost(start: Start, tmp_path: Path) -> None:
    process = broken(start, tmp_path, 2, "--delay", "0")
    with process.connect() as client, pytest.raises(ConnectionError):
        client.sendall(b"x" * 40_000_000)


def test_without_the_shutdown_a_silent_client_delays_the_exit(
    start: Start, tmp_path: Path
) -> None:
    process = broken(start, tmp_path, 3, "--client-timeout", "2")
    begun = time.monotonic()
    with process.connect() as client:
        process.wait_for_status("1 open")
        process.kill(signal.SIGINT)
        assert not client.recv(1)
        assert time.monotonic() - begun >= 2


def anchors(page: Path) -> set[str]:
    """Return the names under which the headings of a page can be linked."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_link_leads_to_a_file_or_heading_that_exists(page: Path) -> None:
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), anchor


def test_each_function_that_the_tour_names_exists() -> None:
    sources = [*ROOT.glob("trio_server/**/*.py"), ROOT / "tests/test_naive.py"]
    source = "\n".join(path.read_text() for path in sources)
    tables = "\n".join(line for line in TOUR.splitlines() if line.startswith("| "))
    here = re.sub(r"## The same server elsewhere.*?\n## ", "", TOUR, flags=re.DOTALL)
    assert tables
    for name in re.findall(r"`([A-Za-z_]+(?:\.[a-z_]+)?)`", here):
        owner, _, attribute = name.rpartition(".")
        if owner in {"", "Shutdown"}:
            assert re.search(rf"\b{attribute}\b", source), name


def test_the_operators_page_lists_each_option(start: Start) -> None:
    process = start("--help")
    assert process.wait() == 0
    page = (ROOT / "tests/deployment/README.md").read_text()
    options = set(re.findall(r"--[a-z-]+", process.stdout)) - {"--help", "--version"}
    assert options <= set(re.findall(r"`(--[a-z-]+)", page))
