"""The command: arguments, logging, signals, exit status.

All that changes the process as a whole is here, and only here.
"""

import argparse
import contextlib
import errno
import gc
import logging
import logging.handlers
import math
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import trio

import trio_server
from trio_server.account import Connections, Outcome
from trio_server.addresses import format_address
from trio_server.connection import CLIENT_TIMEOUT, serve_connection
from trio_server.responder import DELAY, hello_world
from trio_server.server import HIGHEST_PORT, serve_listeners, serve_tcp
from trio_server.shutdown import GRACE_PERIOD, Shutdown

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

PORT = 1729  # the smallest number that is a sum of two cubes in two ways
FIRST_INHERITED = 3  # the descriptors before are the standard streams (sd_listen_fds(3))
LOG_INTERVAL = 0.2  # seconds; too short to be noticed, long enough to write many lines together
LOG_BUFFER = 1000  # lines at which the log is written early

COLLECTOR_THRESHOLDS = (1_000_000, 10, 10)
"""For `gc.set_threshold`: collect when there are so many more objects than last time. A connection
takes some 35, so not even 20,000 at once set it off. See ``tests/benchmark/collector.py``."""

BANNER = "Waiting for connection to be established"

logger: logging.Logger = logging.getLogger("trio_server")


def main() -> int | str:
    """Run the command; return an exit status, or for status 1 the sentence that says why."""
    # Until the server is ready for them, the signals end the process, without a traceback.
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_DFL)
    options = parse_arguments()
    set_up_logging(options.log_level)
    raise_file_limit()
    tune_collector()
    try:
        return trio.run(run, options, inherited_sockets())
    finally:
        flush_log()


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
        type=partial(whole_number, least=0, most=HIGHEST_PORT),
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
        type=partial(seconds, zero=False),
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
        "--max-concurrent",
        type=partial(whole_number, least=1),
        metavar="N",
        help="how many requests are worked on at once; the next ones wait (default: no limit)",
    )
    option(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="the least severe of what is logged on stderr (default: %(default)s)",
    )
    option("--version", action="version", version=f"%(prog)s {trio_server.__version__}")
    return parser.parse_args()


def whole_number(text: str, *, least: int, most: float = math.inf) -> int:
    """Parse a whole number within limits."""
    if not (text.isascii() and text.isdecimal() and least <= int(text) <= most):
        limits = f"{least} or more" if most == math.inf else f"{least} to {most}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {limits}")
    return int(text)


def seconds(text: str, *, zero: bool = True) -> float:
    """Parse a length of time."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf or (value == 0 and not zero):
        least = "0 or more" if zero else "more than 0"
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, {least}")
    return value


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
    """Let the process open as many files as it may: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS: not as many as it says.
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        logger.debug("limit of open files: was %d, is %d", soft, hard)


def tune_collector() -> None:
    """Make the cyclic garbage collector look less often at live connections.

    It visits every object of each, and finds nothing: a connection leaves no cycles behind.
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
    shutdown, connections = Shutdown(), Connections()
    limit = options.max_concurrent
    handler = partial(
        serve_connection,
        respond=partial(hello_world, delay=options.delay),
        client_timeout=options.client_timeout,
        limiter=None if limit is None else trio.CapacityLimiter(limit),
        shutdown=shutdown,
        connections=connections,
    )
    if sockets:
        logger.info("serving on inherited sockets, so --host and --port do not count")
        listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(s)) for s in sockets]
        start = partial(serve_listeners, handler, listeners, shutdown=shutdown)
    else:
        start = partial(serve_tcp, handler, options.port, host=options.host, shutdown=shutdown)
    # The receiver restores this when it is left: then a signal has nothing left to stop.
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    with trio.open_signal_receiver(*STOP_SIGNALS) as signals:
        async with trio.open_nursery() as helpers:
            helpers.start_soon(write_log)
            stop = partial(shut_down_on_signals, signals, shutdown, connections)
            helpers.start_soon(stop, options.grace_period)
            failure = await serve(start)
            helpers.cancel_scope.cancel()
    if failure is not None:
        return f"trio-server: {advice(failure, options)}"
    outcomes = connections.outcomes
    logger.info("stopped: %s", ", ".join(f"{outcomes[one]} {one.value}" for one in Outcome))
    return 1 if outcomes[Outcome.CUT_OFF] or outcomes[Outcome.FAILED] else 0


async def serve(start: Callable[..., Awaitable[None]]) -> Exception | None:
    """Serve until the server is shut down; return the reason if it could not."""
    failure = None
    try:
        async with trio.open_nursery() as nursery:
            if listeners := await nursery.start(start):
                announce(listeners)
    except* (OSError, trio.ClosedResourceError) as group:
        [failure] = group.exceptions
    return failure


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
    signals: AsyncIterator[int], shutdown: Shutdown, connections: Connections, grace_period: float
) -> None:
    """Shut down gracefully on the first signal, at once on the second."""
    first = signal.Signals(await anext(signals))
    shutdown.begin(grace_period)
    logger.info(
        "%s: shutting down, %d in flight may take up to %g s; a second signal stops now",
        first.name,
        connections.in_flight,
        grace_period,
    )
    second = signal.Signals(await anext(signals))
    shutdown.begin(0)
    logger.info("%s: stopping now", second.name)


def advice(error: Exception, options: argparse.Namespace) -> str:
    """Say in one sentence why the server cannot serve, and what to do about it."""
    if not isinstance(error, OSError):
        return "cannot accept, as the listening socket was closed"
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
    return f"cannot serve on host {options.host!r}, port {options.port}: {error.strerror}"


if __name__ == "__main__":
    sys.exit(main())
