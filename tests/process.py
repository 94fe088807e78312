"""The command as a real process, for the tests that start it."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from trio_server.responder import REPLY

BANNER = "Waiting for connection to be established"


class Process:
    """`python -m trio_server`, with its two outputs in files so that it never waits for us."""

    def __init__(
        self,
        folder: Path,
        options: Sequence[str],
        *,
        prefix: Sequence[str] = (),
        program: Sequence[str] = ("-m", "trio_server"),
        **settings: Any,
    ) -> None:
        self._stdout = folder / f"stdout-{time.monotonic_ns()}"
        self._stderr = folder / f"stderr-{time.monotonic_ns()}"
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self.popen: subprocess.Popen[bytes] = subprocess.Popen(
                [*prefix, sys.executable, *program, *options],
                **{"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": stderr, **settings},
            )

    @property
    def stdout(self) -> str:
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """The addresses that it prints."""
        found = re.findall(r"Listening on http://\[?([^]\s]+?)\]?:(\d+) ", self.stdout)
        return [(host, int(port)) for host, port in found]

    @property
    def port(self) -> int:
        return self.addresses[0][1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def wait_for_banner(self) -> None:
        self.wait_until(lambda: self.stdout.endswith(f"{BANNER}\n"))

    def wait_for_log(self, text: str) -> None:
        self.wait_until(lambda: text in self.stderr)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        give_up = time.monotonic() + seconds
        while not condition():
            assert self.popen.poll() is None, f"it ended: {self.stderr}"
            assert time.monotonic() < give_up, f"it took too long: {self.stderr}"
            time.sleep(0.01)

    def wait_for_status(self, pattern: str) -> None:
        """Let the server log its status again and again, until that matches."""

        def matches() -> bool:
            self.kill(signal.SIGUSR1)
            time.sleep(0.05)
            return re.search(pattern, self.stderr) is not None

        self.wait_until(matches)

    @property
    def log(self) -> list[str]:
        """The lines of the log without their times."""
        return [re.sub(r"^[\d-]{10} [\d:]{8} ", "", line) for line in self.stderr.splitlines()]

    def kill(self, signum: int) -> None:
        os.kill(self.popen.pid, signum)

    def freeze(self) -> None:
        """Suspend the process, until `thaw`."""
        self.kill(signal.SIGSTOP)
        self.wait_until_suspended()

    def wait_until_suspended(self) -> None:
        status = Path(f"/proc/{self.popen.pid}/stat")
        self.wait_until(lambda: ") T " in status.read_text())

    def thaw(self) -> None:
        self.kill(signal.SIGCONT)

    @property
    def descriptors(self) -> int:
        """The number of open files: each connection is one."""
        return len(list(Path(f"/proc/{self.popen.pid}/fd").iterdir()))

    def wait(self, seconds: float = 10) -> int:
        """Wait for its end; return its exit status."""
        return self.popen.wait(seconds)

    def stop(self, signum: int = signal.SIGTERM, seconds: float = 10) -> int:
        self.kill(signum)
        return self.wait(seconds)


# Runs the rest of the command line as a process manager does. The socket whose descriptor comes
# first on that line becomes descriptor 3. The variables are those of sd_listen_fds(3).
ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execv(sys.argv[2], sys.argv[2:])
"""

Start = Callable[..., Process]
"""A fixture that starts the command with options, and settings for `Process`."""


def start_each(start: Start, number: int, *options: str, **settings: Any) -> list[Process]:
    """Start several servers side by side; return when all accept connections."""
    start_one = partial(start, "--host=127.0.0.1", "--port=0", *options, **settings)
    processes = [start_one() for _ in range(number)]
    for process in processes:
        process.wait_for_banner()
    return processes


def changed(text: str) -> dict[str, Sequence[str]]:
    """Return settings for `Process`: run some code first, and then the command."""
    command = "import sys\nfrom trio_server.command import main\nsys.exit(main())\n"
    return {"program": ("-c", f"{text}\n{command}")}


def activated(start: Start, descriptor: int, *options: str, **settings: Any) -> Process:
    """Start the command with an inherited socket."""
    activate = (sys.executable, "-c", ACTIVATE, str(descriptor))
    return start("--port=0", *options, prefix=activate, pass_fds=[descriptor], **settings)


def free_port(host: str) -> int:
    """Return a port that no program listens on."""
    with socket.create_server((host, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def file_limit(number: int, *, soft: bool = False) -> tuple[str, ...]:
    """Begin a command line whose rest runs with a limit on open files."""
    return ("sh", "-c", f'ulimit {"-S " if soft else ""}-n {number}; exec "$@"', "sh")


def receive_all(client: socket.socket) -> bytes:
    """Read to the end of file."""
    return b"".join(iter(lambda: client.recv(65536), b""))


def tool(name: str) -> str:
    """Return the path of a program. Without it the test is skipped, and fails in CI."""
    # Debian has HAProxy where only root's PATH looks.
    path = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin")
    if path is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no {name} here")
    return path


def request(
    address: tuple[str, int],
    text: bytes = b"GET / HTTP/1.1\r\n\r\n",
    *,
    timeout: float = 20,
    is_answer: Callable[[bytes], bool] = REPLY.__eq__,
) -> str:
    """Send a request; return "answered" or what went wrong."""
    try:
        with socket.create_connection(address, timeout=timeout) as client:
            client.sendall(text)
            reply = receive_all(client)
    except OSError as error:
        return repr(error)
    return "answered" if is_answer(reply) else f"got {reply!r}"


@contextmanager
def hammering(
    address: tuple[str, int],
    clients: int,
    ask: Callable[[tuple[str, int]], str] = request,
) -> Iterator[Counter[str]]:
    """Let clients send request after request; yield how often each result came."""
    results: Counter[str] = Counter()
    stop = threading.Event()

    def hammer() -> None:
        while not stop.is_set():
            results[ask(address)] += 1

    threads = [threading.Thread(target=hammer) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield results
    finally:
        stop.set()
        for thread in threads:
            thread.join()
