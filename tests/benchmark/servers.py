"""How the servers of the benchmark are built, started, checked and stopped."""

import importlib.util
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from trio_server.responder import BODY, REPLY

HOST = "127.0.0.1"
PEERS = Path(__file__).with_name("peers")

START_TIMEOUT = 60.0  # seconds; the slowest needs one, and valgrind ten
ANSWER_TIMEOUT = 10.0  # seconds; without a delay, a reply needs milliseconds
END_TIMEOUT = 10.0  # seconds; a killed process with 19,000 sockets needs a moment
BUILD_TIMEOUT = 120.0  # seconds; the first `go build` compiles its standard library
POLL_INTERVAL = 0.02  # seconds between two checks whether a server has started

SETTLING_TIME = 0.1  # seconds from listening to being idle, before anything is measured

LISTENING = "0A"  # the state of a socket in /proc/net/tcp

BACKLOG = "65535"
"""The length of the accept queue that Trio asks for, and that the kernel shortens to its maximum.
All servers ask for the same: with defaults of 5 or 100, connections would be dropped."""

ACTIVATE = 'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@" 3<&0 </dev/null'
"""A shell script that runs its arguments as a process manager does, see sd_listen_fds(3): its
standard input, a listening socket, becomes descriptor 3."""


class Figure(StrEnum):
    """What can be measured of a server."""

    STOP = "stop"  # requests lost when it is stopped under load
    INSTRUCTIONS = "instructions"  # instructions per connection
    RATE = "rate"  # requests per second, and processor time
    AT_ONCE = "at-once"  # times and memory with many connections at once
    SHARED = "shared"  # requests per second of two processes on one socket
    MANY = "many"  # more connections at once than one process may open


SPEED = frozenset({Figure.RATE, Figure.AT_ONCE})


@dataclass(frozen=True)
class Kind:
    """A server that can be started.

    Attributes:
        name: What the tables call it.
        command: Program and arguments; ``{port}`` and ``{delay}`` stand for the numbers. The
            environment has them too, as ``PORT`` and ``DELAY``, and the bytes of the ``REPLY``.
        figures: What is measured of it.
        exact: Whether it sends exactly the bytes of our reply. ASGI servers add header fields,
            so only the status and the body of their replies are checked.
        announcement: What its log contains once it serves. Only hypercorn needs this: it listens
            before the process that accepts connections has started.
    """

    name: str
    command: tuple[str, ...]
    figures: frozenset[Figure] = SPEED
    exact: bool = True
    announcement: str = ""


@dataclass(frozen=True)
class Running:
    """A server that accepts connections: its process, its port and its log."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path


def ours(python: str, name: str = "trio_server") -> Kind:
    """Describe our server on some Python."""
    options = (f"--host={HOST}", "--port={port}", "--delay={delay}")
    return Kind(name, (python, "-m", "trio_server", *options))


OURS = replace(ours(sys.executable), figures=frozenset(Figure))
FIFTEEN = Kind(
    "fifteen lines",
    (sys.executable, "fifteen_lines.py", "{port}", "{delay}"),
    SPEED | {Figure.STOP, Figure.INSTRUCTIONS},
)
UVICORN = "uvicorn"


def raise_file_limit() -> int:
    """Raise the limit on open files for all that this process starts; return it.

    With the usual limit of 1,024 the plain servers would fail. That would be unfair, as ours
    raises the limit itself.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def available(folder: Path, pythons: Sequence[str]) -> tuple[list[Kind], list[str]]:
    """Find out which servers this machine can run, and compile those that need it.

    Args:
        folder: Where the compiled programs go.
        pythons: Paths of more Pythons with Trio, to run our server on.

    Returns:
        The servers, ours first; and a sentence about each that is left out.
    """
    versions = [
        subprocess.check_output((python, "-V"), text=True, timeout=START_TIMEOUT).strip()
        for python in pythons
    ]
    counted = SPEED | {Figure.INSTRUCTIONS}
    kinds = [
        OURS,
        *(
            replace(ours(python, f"… on {text}"), figures=counted)
            for python, text in zip(pythons, versions, strict=True)
        ),
        FIFTEEN,
        Kind("asyncio", (sys.executable, "asyncio_streams.py"), counted | {Figure.STOP}),
        Kind("threads", (sys.executable, "threads.py"), counted),
    ]
    left_out = []
    for package, servers in (("hypercorn", hypercorn()), (UVICORN, [uvicorn()])):
        if importlib.util.find_spec(package):
            kinds += servers
        else:
            left_out.append(f"{package} is left out: it is not installed (`pip install .[bench]`)")
    for name, source, command, figures in (
        ("Go", "goroutines.go", ("go", "build", "-o"), SPEED),
        ("Go net/http", "net_http.go", ("go", "build", "-o"), frozenset({Figure.STOP})),
        ("C floor", "floor.c", ("cc", "-O2", "-o"), frozenset({Figure.RATE})),
    ):
        if shutil.which(command[0]):
            program = str(folder / Path(source).stem)
            build = (*command, program, source)
            subprocess.run(build, cwd=PEERS, check=True, timeout=BUILD_TIMEOUT)
            kinds.append(Kind(name, (program,), figures))
        else:
            left_out.append(f"{name} is left out: `{command[0]}` is not installed")
    return kinds, left_out


def hypercorn() -> list[Kind]:
    """Describe hypercorn: its command, its Trio worker alone, and under `serve_gracefully`."""
    options = ("--worker-class", "trio", "--bind", HOST + ":{port}", "--backlog", BACKLOG)
    command = (sys.executable, "-m", "hypercorn", "asgi_app:on_trio", *options)
    return [
        Kind(
            "hypercorn",
            command,
            SPEED | {Figure.STOP},
            exact=False,
            announcement="Running on",
        ),
        *(
            Kind(name, (sys.executable, program), frozenset({Figure.STOP}), exact=False)
            for name, program in (
                ("hypercorn.trio.serve", "hypercorn_serve.py"),
                ("hypercorn under serve_gracefully", "hypercorn_gracefully.py"),
            )
        ),
    ]


def uvicorn() -> Kind:
    """Describe uvicorn."""
    options = ("--host", HOST, "--port", "{port}", "--backlog", BACKLOG)
    command = (sys.executable, "-m", "uvicorn", "asgi_app:on_asyncio", *options)
    figures = SPEED | {Figure.STOP, Figure.INSTRUCTIONS, Figure.MANY}
    return Kind(UVICORN, command, figures, exact=False)


@contextmanager
def serving(kind: Kind, delay: float, folder: Path) -> Iterator[Running]:
    """Run a server on a fresh port, with its log in ``folder``, until the block ends.

    Args:
        kind: Which server.
        delay: Seconds of work for each request. With 0 the reply is checked first.
        folder: Where the log goes.
    """
    port = free_port()
    command = [part.format(port=port, delay=delay) for part in kind.command]
    variables = {"PORT": str(port), "DELAY": str(delay), "REPLY": REPLY.decode()}
    with running(command, folder, variables) as (process, log):
        wait_until(lambda: kind.announcement in log.read_text(), process, log)
        wait_until(lambda: listens(port), process, log)
        time.sleep(SETTLING_TIME)
        if delay == 0:
            check(kind, port)
        yield Running(process, port, log)


@contextmanager
def serving_inherited(listener: socket.socket, delay: float, folder: Path) -> Iterator[Running]:
    """Run our server on a socket that listens already."""
    server = (sys.executable, "-m", "trio_server", f"--delay={delay}")
    command = ["sh", "-c", ACTIVATE, "sh", *server]
    with running(command, folder, {}, stdin=listener.fileno()) as (process, log):
        wait_until(lambda: "Listening on " in log.read_text(), process, log)
        yield Running(process, listener.getsockname()[1], log)


@contextmanager
def serving_together(processes: int, delay: float, folder: Path) -> Iterator[list[Running]]:
    """Run several processes of our server that accept from one socket."""
    with socket.create_server((HOST, 0), backlog=int(BACKLOG)) as listener, ExitStack() as stack:
        yield [
            stack.enter_context(serving_inherited(listener, delay, folder))
            for _ in range(processes)
        ]


@contextmanager
def running(
    command: Sequence[str],
    folder: Path,
    variables: dict[str, str],
    stdin: int = subprocess.DEVNULL,
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run a program until the block ends; yield its process and the file with its output."""
    log = folder / f"log-{time.monotonic_ns()}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=PEERS,
            env={**os.environ, **variables},
            # A process group of its own, so that its children end with it.
            start_new_session=True,
        )
    try:
        yield process, log
    finally:
        with suppress(ProcessLookupError):  # It has ended, and its children.
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(END_TIMEOUT)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for a server to start; raise with its log if it does not."""
    deadline = time.monotonic() + START_TIMEOUT
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{process.args!r} did not start: {log.read_text()}")
        time.sleep(POLL_INTERVAL)


def free_port() -> int:
    """Let the kernel choose a port that nothing uses, not even a connection that has ended."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def listens(port: int) -> bool:
    """Return whether a socket listens on a port.

    This asks the kernel. A connection to the port would be one more that the server works on.
    """
    with Path("/proc/net/tcp").open() as table:
        next(table)  # the header
        for row in table:
            _, address, _, state, *_ = row.split()
            if state != LISTENING:  # These come first.
                return False
            if address.endswith(f":{port:04X}"):
                return True
    return False


def check(kind: Kind, port: int) -> None:
    """Raise an error unless the server sends the reply that all servers have to send."""
    with socket.create_connection((HOST, port), timeout=ANSWER_TIMEOUT) as client:
        client.sendall(b"GET / HTTP/1.0\r\nHost: %b\r\n\r\n" % HOST.encode())  # as ab does
        reply = b"".join(iter(lambda: client.recv(1024), b""))
    if not (reply == REPLY if kind.exact else is_right(reply)):
        raise RuntimeError(f"{kind.name} sends a wrong reply: {reply!r}")


def is_right(reply: bytes) -> bool:
    """Return whether a reply arrived whole, with the right status and body."""
    head, _, body = reply.partition(b"\r\n\r\n")
    return head.startswith(b"HTTP/1.1 200 ") and body == BODY
