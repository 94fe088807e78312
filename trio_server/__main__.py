"""The command: arguments, logging, signals, exit status.

All that changes the process as a whole is here, and only here.
"""

import signal

# The first thing that happens, so that no Ctrl-C finds the program half started: from here
# on the signals wait in the kernel until `run` is ready for them.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

import argparse
import contextlib
import errno
import gc
import logging
import logging.handlers
import math
import os
import resource
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import trio

import trio_server
from trio_server.connection import CLIENT_TIMEOUT, Outcome
from trio_server.responder import DELAY, hello_world
from trio_server.server import GRACE_PERIOD, Server, format_address

PORT = 1729
"""The port of the command: the smallest number that is a sum of two cubes in two ways."""

HIGHEST_PORT = 65535  # a port is 16 bits (RFC 9293, section 3.1)

FIRST_INHERITED = 3
"""The first descriptor that a process manager passes: those before are the standard streams."""

COLLECTOR_THRESHOLDS = (1_000_000, 10, 10)
"""For `gc.set_threshold`: collect the young objects when there are so many more than last time,
and the older ones after 10 such collections. A connection takes some 35 objects, so that not
even a burst of 20,000 sets off a collection. Tried in ``tests/benchmark/collector.py``."""

LOG_INTERVAL = 0.2
"""Seconds between two times that the log is written: too short to be noticed, long enough for a
busy server to write many lines at a time, which takes less time for each of them."""

LOG_BUFFER = 1000
"""Lines at which the log is written early."""

BANNER = "Waiting for connection to be established"

logger: logging.Logger = logging.getLogger("trio_server")


def main() -> int | str:
    """Run the command with the arguments of the process.

    Returns:
        What `sys.exit` takes: an exit status, or the sentence that says why the server could
        not start, for stderr and status 1.
    """
    options = parse_arguments()
    set_up_logging(options.log_level)
    raise_file_limit()
    tune_collector()
    # `run` replaces these handlers for as long as it lasts. A signal that comes when all is
    # done has nothing left to stop.
    for signum in STOP_SIGNALS:
        signal.signal(signum, lambda *_: None)
    try:
        status = trio.run(run, options, inherited_sockets())
    finally:
        flush_log()
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)  # what Python leaves as it is when it ends
    return status


def parse_arguments() -> argparse.Namespace:
    """Read the command line; end the process with status 2 on wrong usage."""
    parser = argparse.ArgumentParser(
        prog="trio-server",
        description="Answer every TCP connection with an HTTP 200 and `Hello World!`, "
        "each in a task of its own, after a pause that stands in for work.",
        epilog="example: trio-server --host '' --port 8080 --delay 0.5",
        allow_abbrev=False,
    )
    option = parser.add_argument
    option(
        "--host",
        default="localhost",
        help="interface to listen on; a name with several addresses gets a listener on each; "
        "an empty string is all interfaces (default: %(default)s)",
    )
    option(
        "--port",
        type=port,
        default=PORT,
        help="port to listen on; 0 lets the kernel pick (default: %(default)s)",
    )
    option(
        "--delay",
        type=seconds,
        default=DELAY,
        metavar="SECONDS",
        help="simulated work for each request (default: %(default)g)",
    )
    option(
        "--client-timeout",
        type=some_seconds,
        default=CLIENT_TIMEOUT,
        metavar="SECONDS",
        help="how long to wait for a client: for its first bytes, while it takes the reply, "
        "until it closes (default: %(default)g)",
    )
    option(
        "--grace-period",
        type=seconds,
        default=GRACE_PERIOD,
        metavar="SECONDS",
        help="how long requests in flight may take after the first SIGINT or SIGTERM "
        "(default: %(default)g)",
    )
    option(
        "--max-connections",
        type=count,
        metavar="N",
        help="how many connections are served at once; the others wait their turn "
        "(default: no limit but that of open files)",
    )
    option(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="the least severe of what is logged on stderr (default: %(default)s)",
    )
    option("--version", action="version", version=f"%(prog)s {trio_server.__version__}")
    return parser.parse_args()


def port(text: str) -> int:
    """Parse a port number."""
    if not (text.isascii() and text.isdecimal() and int(text) <= HIGHEST_PORT):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to {HIGHEST_PORT}")
    return int(text)


def seconds(text: str) -> float:
    """Parse a length of time."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or more")
    return value


def some_seconds(text: str) -> float:
    """Parse a length of time that is not 0."""
    value = seconds(text)
    if value == 0:
        raise argparse.ArgumentTypeError("has to be more than 0 seconds")
    return value


def count(text: str) -> int:
    """Parse a number of things."""
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def set_up_logging(level: str) -> None:
    """Log to stderr from a level on: warnings and errors at once, the rest with `flush_log`."""
    stderr = logging.StreamHandler()
    stderr.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.handlers.MemoryHandler(LOG_BUFFER, flushLevel=logging.WARNING, target=stderr)
    logging.basicConfig(handlers=[log], level=level.upper())
    logging.raiseExceptions = False  # A log that cannot be written is no reason for tracebacks.
    # What the format does not show need not be found out (logging HOWTO, "Optimization").
    logging._srcfile = None  # noqa: SLF001
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.getLogger("trio.serve_listeners").addFilter(OncePerSecond())


def flush_log() -> None:
    """Write what the log has buffered."""
    for handler in logging.getLogger().handlers:
        handler.flush()


class OncePerSecond(logging.Filter):
    """Lets one record a second pass, without its traceback.

    At the limit of open files Trio logs every failed `accept`, ten times a second for each
    listener.
    """

    _next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """Decide on a record."""
        if record.created < self._next:
            return False
        self._next = record.created + 1
        record.exc_info = None
        return True


def raise_file_limit() -> None:
    """Let the process open as many files as it may: each connection is one.

    The usual soft limit is 1,024, as `select(2)` cannot handle higher descriptors.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS: not as many as it says.
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        logger.debug("limit of open files: was %d, is %d", soft, hard)


def tune_collector() -> None:
    """Make the cyclic garbage collector look less often at what is not garbage.

    Its full collections visit every object of every live connection, and find next to nothing:
    a connection that has ended leaves no cycles behind.
    """
    gc.collect()
    gc.freeze()  # the imported modules will not become garbage
    gc.set_threshold(*COLLECTOR_THRESHOLDS)


def inherited_sockets() -> list[socket.socket]:
    """Take over the listening sockets that a process manager passes in (sd_listen_fds(3)).

    Returns:
        The sockets; none when the environment names none, or is meant for another process.
        A descriptor that is not a listening TCP socket ends the process with status 1.
    """
    pid, number = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS"))
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not number:
        return []
    if not number.isdecimal():
        sys.exit(f"trio-server: LISTEN_FDS={number} is not a number of sockets: unset it")
    return [
        inherited_socket(descriptor)
        for descriptor in range(FIRST_INHERITED, FIRST_INHERITED + int(number))
    ]


def inherited_socket(descriptor: int) -> socket.socket:
    """Take over one descriptor, and keep it from programs that this one starts."""
    try:
        os.set_inheritable(descriptor, False)  # noqa: FBT003 - it has no name
        listener = socket.socket(fileno=descriptor)
        listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError:
        listening = False
    if not (listening and listener.family in (socket.AF_INET, socket.AF_INET6)):
        sys.exit(
            f"trio-server: inherited descriptor {descriptor} is not a listening TCP socket: "
            "pass one, as with ListenStream= in a systemd socket unit"
        )
    return listener


async def run(options: argparse.Namespace, sockets: list[socket.socket]) -> int | str:
    """Serve until a signal ends it; return what `main` does.

    The status is 1 when a request was cut off or its responder failed, and 0 otherwise.
    """
    server = Server(
        partial(hello_world, delay=options.delay),
        client_timeout=options.client_timeout,
        max_connections=options.max_connections,
    )
    if sockets:
        logger.info("serving on inherited sockets, so --host and --port do not count")
        listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(s)) for s in sockets]
        start = partial(server.serve_listeners, listeners)
    else:
        start = partial(server.serve_tcp, options.port, options.host)
    with trio.open_signal_receiver(*STOP_SIGNALS) as signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        async with trio.open_nursery() as watchers:
            watchers.start_soon(write_log)
            watchers.start_soon(shut_down_on_signals, signals, server, options.grace_period)
            failure = await serve(start)
            watchers.cancel_scope.cancel()
    if failure is not None:
        return f"trio-server: {advice(failure, options)}"
    totals = (f"{server.outcomes[outcome]} {outcome.value}" for outcome in Outcome)
    logger.info("stopped: %s", ", ".join(totals))
    return 1 if server.outcomes[Outcome.CUT_OFF] or server.outcomes[Outcome.FAILED] else 0


async def serve(start: Callable[..., Awaitable[None]]) -> OSError | None:
    """Serve until the server is shut down; return the reason if it could not start."""
    async with trio.open_nursery() as nursery:
        try:
            listeners = await nursery.start(start)
        except OSError as error:
            return error
        if listeners:
            announce(listeners)
    return None


def announce(listeners: list[trio.SocketListener]) -> None:
    """Say on stderr where the server listens, and on stdout that it accepts connections."""
    for listener in listeners:
        logger.info("listening on %s", format_address(listener.socket.getsockname()))
    flush_log()  # which may go to the same terminal, and should come first there
    try:
        print(BANNER, flush=True)
    except OSError:
        # Whoever started the server has stopped reading: no reason to stop serving. What is
        # left in the buffer has to go somewhere, or writing it fails again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


async def write_log() -> None:
    """Write the log every now and then, for as long as the server runs."""
    while True:
        await trio.sleep(LOG_INTERVAL)
        flush_log()


async def shut_down_on_signals(
    signals: AsyncIterator[int], server: Server, grace_period: float
) -> None:
    """Shut down gracefully on the first signal, at once on the second."""
    first = signal.Signals(await anext(signals))
    server.shut_down(grace_period)
    logger.info(
        "%s: shutting down, %d in flight may take up to %g s; a second signal stops now",
        first.name,
        server.in_flight,
        grace_period,
    )
    second = signal.Signals(await anext(signals))
    server.shut_down(0)
    logger.info("%s: stopping now", second.name)


def advice(error: OSError, options: argparse.Namespace) -> str:
    """Say in one sentence why the server cannot listen, and what to do about it."""
    if isinstance(error, socket.gaierror):
        return f"host {options.host!r} does not resolve ({error.strerror}): check --host"
    match error.errno:
        case errno.EADDRINUSE:
            return (
                f"port {options.port} is already in use: stop the program that listens on it, "
                "or choose another port with --port"
            )
        case errno.EACCES:
            return f"port {options.port} needs privileges: choose a port from 1024 on with --port"
        case errno.EADDRNOTAVAIL:
            return f"{error.strerror}: choose one of its own with --host"
    return f"cannot listen on host {options.host!r}, port {options.port}: {error.strerror}"


if __name__ == "__main__":
    sys.exit(main())
