"""How the servers of the benchmark are built, started, checked and ended."""

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
from dataclasses import dataclass
from pathlib import Path

from trio_server.responder import BODY, REPLY

HOST = "127.0.0.1"
PEERS = Path(__file__).with_name("peers")

START_TIMEOUT = 20.0  # seconds; the slowest needs one
ANSWER_TIMEOUT = 10.0  # seconds; answered at once, or something is wrong
END_TIMEOUT = 10.0  # seconds; a killed process with 19,000 sockets needs a moment
BUILD_TIMEOUT = 120.0  # seconds; the first `go build` compiles its standard library
LOOK_INTERVAL = 0.02  # seconds between two looks whether a server has started

SETTLING_TIME = 0.1  # seconds from listening to being idle, before anything is measured

LISTENING = "0A"  # the state of a socket in /proc/net/tcp

BACKLOG = "65535"
"""The accept queue that Trio asks for, and the kernel shortens to its maximum. All get the
same: with defaults of 5 or 100, the benchmark would measure dropped connections."""

ACTIVATE = 'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@" 3<&0 </dev/null'
"""A shell script that runs its arguments as a process manager does, see sd_listen_fds(3): its
standard input, a listening socket, becomes descriptor 3."""


@dataclass(frozen=True)
class Kind:
    """A server that can be started.

    Attributes:
        name: What the tables call it.
        command: Program and arguments; ``{port}`` and ``{delay}`` stand for the numbers. The
            environment has them too, as ``PORT`` and ``DELAY``, and the bytes of the ``REPLY``.
        exact: Whether all of the reply is ours to choose. ASGI servers add a date and their
            name, so of them only the status and the body are checked.
        sleeps: Whether it can hold connections; the floor can not.
        announcement: What its log says once it serves, where listening means too little:
            Hypercorn listens before the process that is to serve has started.
    """

    name: str
    command: tuple[str, ...]
    exact: bool = True
    sleeps: bool = True
    announcement: str = ""


@dataclass(frozen=True)
class Running:
    """A server that accepts connections: its process and its port."""

    pid: int
    port: int


def ours(python: str, name: str = "trio_server") -> Kind:
    """Our server on some Python."""
    return Kind(
        name, (python, "-m", "trio_server", f"--host={HOST}", "--port={port}", "--delay={delay}")
    )


OURS = ours(sys.executable)
FIFTEEN = Kind("fifteen lines", (sys.executable, "fifteen_lines.py", "{port}", "{delay}"))
UVICORN = "uvicorn"


def raise_file_limit() -> int:
    """Raise the limit of open files for all that this process starts; return it.

    With the usual limit of 1,024 the plain servers would fail: that would flatter ours, which
    raises it itself.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def available(folder: Path, pythons: Sequence[str]) -> tuple[list[Kind], list[str]]:
    """Find out what this machine can run; compile what has to be, into ``folder``.

    Args:
        folder: Where the compiled programs go.
        pythons: More Pythons, each with Trio, to run our server on.

    Returns:
        The servers, ours first; and a sentence about each that is left out.
    """
    versions = [
        subprocess.check_output((python, "-V"), text=True, timeout=START_TIMEOUT).strip()
        for python in pythons
    ]
    kinds = [
        OURS,
        *(ours(python, f"… on {text}") for python, text in zip(pythons, versions, strict=True)),
        FIFTEEN,
        Kind("asyncio", (sys.executable, "asyncio_streams.py")),
        Kind("threads", (sys.executable, "threads.py")),
    ]
    left_out = []
    backlog = ("--backlog", BACKLOG)
    hypercorn = ("asgi:on_trio", "--worker-class", "trio", "--bind", HOST + ":{port}", *backlog)
    uvicorn = ("asgi:on_asyncio", "--host", HOST, "--port", "{port}", *backlog)
    for package, options, announcement in (
        ("hypercorn", hypercorn, "Running on"),
        (UVICORN, uvicorn, ""),
    ):
        if importlib.util.find_spec(package):
            command = (sys.executable, "-m", package, *options)
            kinds.append(Kind(package, command, exact=False, announcement=announcement))
        else:
            left_out.append(f"{package} is left out: it is not installed (`pip install .[bench]`)")

    goroutines, floor = str(folder / "goroutines"), str(folder / "floor")
    go = ("go", "build", "-o", goroutines, "goroutines.go")
    cc = ("cc", "-O2", "-o", floor, "floor.c")
    for kind, build in (
        (Kind("Go", (goroutines,)), go),
        (Kind("C floor", (floor,), sleeps=False), cc),
    ):
        if shutil.which(build[0]):
            subprocess.run(build, cwd=PEERS, check=True, timeout=BUILD_TIMEOUT)
            kinds.append(kind)
        else:
            left_out.append(f"{kind.name} is left out: there is no `{build[0]}`")
    return kinds, left_out


@contextmanager
def serving(kind: Kind, delay: float, folder: Path) -> Iterator[Running]:
    """Run a server on a fresh port, with its log in ``folder``, until the block ends.

    Args:
        kind: Which one.
        delay: Seconds of work for each request. With 0 the reply is checked first; otherwise
            the check would take as long.
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
        yield Running(process.pid, port)


@contextmanager
def serving_inherited(listener: socket.socket, delay: float, folder: Path) -> Iterator[Running]:
    """Run our server on a socket that listens already."""
    server = (sys.executable, "-m", "trio_server", f"--delay={delay}")
    command = ["sh", "-c", ACTIVATE, "sh", *server]
    with running(command, folder, {}, stdin=listener.fileno()) as (process, log):
        wait_until(lambda: "Listening on " in log.read_text(), process, log)
        yield Running(process.pid, listener.getsockname()[1])


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
    """Run a program, with its outputs in a file, until the block ends; give it and the file."""
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
    give_up = time.monotonic() + START_TIMEOUT
    while not condition():
        if process.poll() is not None or time.monotonic() > give_up:
            raise RuntimeError(f"{process.args!r} did not start: {log.read_text()}")
        time.sleep(LOOK_INTERVAL)


def free_port() -> int:
    """Let the kernel pick a port that nothing uses, not even a connection that has ended."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def listens(port: int) -> bool:
    """Tell whether somebody listens on a port.

    The kernel is asked, as a plain server would hold a connection made to find out for the
    length of its delay, and it would be counted.
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
    """Raise unless the server gives the reply that all have to give."""
    with socket.create_connection((HOST, port), timeout=ANSWER_TIMEOUT) as client:
        client.sendall(b"GET / HTTP/1.0\r\nHost: %b\r\n\r\n" % HOST.encode())  # as ab does
        reply = b"".join(iter(lambda: client.recv(1024), b""))
    head, _, body = reply.partition(b"\r\n\r\n")
    right = reply == REPLY if kind.exact else head.startswith(b"HTTP/1.1 200 ") and body == BODY
    if not right:
        raise RuntimeError(f"{kind.name} gives a wrong reply: {reply!r}")
