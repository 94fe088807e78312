"""The command: puts the parts together.

All that changes the process as a whole is called from here: signals, limits, logging, the
collector, the exit status.
"""

import argparse
import contextlib
import gc
import logging
import resource
import socket
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from signal import Signals

import trio

from trio_server import signals
from trio_server.account import Connections, Outcome
from trio_server.activation import inherited_sockets, notify
from trio_server.addresses import format_url
from trio_server.arguments import advice, parse_arguments
from trio_server.connection import serve_connection
from trio_server.log import Log, set_up_logging, write
from trio_server.responder import hello_world
from trio_server.server import serve_listeners, serve_tcp
from trio_server.shutdown import Shutdown
from trio_server.watch import View

COLLECTOR_THRESHOLDS = (1_000_000, 10, 10)
"""For `gc.set_threshold`: collect when a million more objects were made than freed. A connection
takes some 35, so not even 20,000 at once set it off. See ``tests/benchmark/collector.py``."""

BANNER = "Waiting for connection to be established"

logger: logging.Logger = logging.getLogger("trio_server")


def main() -> int:
    """Run the command; return its exit status."""
    stop_signals = signals.default_until_ready()
    options = parse_arguments()
    log = set_up_logging(options.log_level)
    raise_file_limit()
    tune_collector()
    return trio.run(run, options, inherited_sockets(), stop_signals, log)


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


async def run(
    options: argparse.Namespace,
    sockets: list[socket.socket],
    stop_signals: list[Signals],
    log: Log,
) -> int:
    """Serve until a signal ends it; return the exit status."""
    shutdown = Shutdown()
    connections = View(shutdown, options.delay, log) if options.watch else Connections()
    limit = options.max_concurrent
    limiter = None if limit is None else trio.CapacityLimiter(limit)
    handler = partial(
        serve_connection,
        respond=partial(hello_world, delay=options.delay),
        client_timeout=options.client_timeout,
        limiter=limiter,
        shutdown=shutdown,
        connections=connections,
    )
    if sockets:
        listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(s)) for s in sockets]
        start = partial(serve_listeners, handler, listeners, shutdown=shutdown)
    else:
        start = partial(serve_tcp, handler, options.port, host=options.host, shutdown=shutdown)

    with signals.receive(stop_signals) as received:
        async with trio.open_nursery() as writers:
            writers.start_soon(log.run)
            async with trio.open_nursery() as helpers:
                say_status = partial(report, connections, log)
                obey = partial(signals.obey, received, shutdown, connections, say_status)
                helpers.start_soon(obey, options.grace_period)
                failure = await serve(start, helpers, partial(announce, connections))
                helpers.cancel_scope.cancel()
            if failure is not None:
                log.fail(f"trio-server: {advice(failure, options)}")
            elif logger.isEnabledFor(logging.INFO):
                log.say(f"stopped: {connections.totals()}")
            log.end()
    outcomes = connections.outcomes
    return 1 if failure or outcomes[Outcome.CUT_OFF] or outcomes[Outcome.FAILED] else 0


async def serve(
    start: Callable[..., Awaitable[None]],
    helpers: trio.Nursery,
    ready: Callable[[list[trio.SocketListener]], Awaitable[None]],
) -> Exception | None:
    """Serve until the server is shut down; return the reason if it could not."""
    failure = None
    try:
        async with trio.open_nursery() as nursery:
            if listeners := await nursery.start(start):
                helpers.start_soon(ready, listeners)
    except* (OSError, trio.ClosedResourceError) as group:
        [failure] = group.exceptions
    return failure


async def announce(connections: Connections, listeners: list[trio.SocketListener]) -> None:
    """Say on stdout where the server listens, and that it accepts connections. Show the view."""
    notify("READY=1")
    sockets = [listener.socket for listener in listeners if listener.socket.fileno() >= 0]
    urls = [format_url(one.getsockname()) for one in sockets]  # Some may be closed by now.
    lines = [*(f"Listening on {url} (Ctrl-C stops)" for url in urls), BANNER]
    await write(sys.stdout, "".join(f"{line}\n" for line in lines))
    if isinstance(connections, View):
        try:
            await connections.show(urls)
        except Exception:
            logger.exception("the view has ended, and the server goes on")


def report(connections: Connections, log: Log) -> None:
    """Log what is going on, and tell the process manager."""
    status = connections.status()
    log.say(status)
    notify(f"STATUS={status}")


if __name__ == "__main__":
    sys.exit(main())
