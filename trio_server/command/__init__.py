"""The command: put the parts together.

All that changes the process as a whole is called from here: signals, limits, logging, the
garbage collector, the exit status.
"""

import argparse
import contextlib
import errno
import gc
import logging
import math
import resource
import socket
from functools import partial
from signal import Signals

import trio

from trio_server.account import Account, Outcome
from trio_server.command import signals
from trio_server.command.activation import inherited_sockets, notify
from trio_server.command.addresses import format_url, resolve
from trio_server.command.arguments import advice, parse_arguments
from trio_server.command.log import set_up_logging, write_stdout
from trio_server.command.watch import View
from trio_server.connection import Responder, serve_connection
from trio_server.responder import hello_world
from trio_server.server import Handler, serve_gracefully
from trio_server.shutdown import Shutdown

COLLECTOR_THRESHOLDS = (1_000_000, 10, 10)
"""For `gc.set_threshold`: collect when a million more objects were made than freed. A connection
needs some 35, so even 20,000 at once do not trigger it. See ``tests/benchmark/collector.py``."""

UNAVAILABLE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # bind(2): not an address of this machine
BANNER = "Waiting for connection to be established"

logger: logging.Logger = logging.getLogger("trio_server")


def main() -> int:
    """Run the command; return its exit status."""
    stop_signals = signals.exit_on_stop_signals()
    options = parse_arguments()
    sockets = inherited_sockets()
    log = set_up_logging(options.log_level)
    try:
        raise_file_limit()
        tune_collector()
        return trio.run(run, options, sockets, stop_signals)
    except BaseException:  # a bug, or a responder that raised `SystemExit`
        logger.critical("the server has failed", exc_info=True)
        return 1
    finally:
        log.close()


def raise_file_limit() -> None:
    """Let the process open as many files as it may: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS allows fewer than it says.
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        logger.debug("limit of open files: was %d, is %d", soft, hard)


def tune_collector() -> None:
    """Make the cyclic garbage collector run less often.

    It would visit every object of each open connection, and find nothing: connections leave no
    cycles behind.
    """
    gc.collect()
    gc.freeze()  # The imported modules will not become garbage.
    gc.set_threshold(*COLLECTOR_THRESHOLDS)


async def run(
    options: argparse.Namespace, sockets: list[socket.socket], stop_signals: list[Signals]
) -> int:
    """Serve until a signal ends it; return the exit status."""
    shutdown, account = Shutdown(), Account()
    limiter = trio.CapacityLimiter(options.max_concurrent or math.inf)
    respond = partial(hello_world, delay=options.delay)
    handler = partial(
        serve_connection,
        respond=partial(limited, limiter, respond) if options.max_concurrent else respond,
        client_timeout=options.client_timeout,
        shutdown=shutdown,
        account=account,
    )
    failure: Exception | None = None
    with signals.receive(stop_signals) as received:
        async with trio.open_nursery() as helpers:
            on_signal = partial(signals.handle, received, shutdown, account, limiter)
            helpers.start_soon(on_signal, options.grace_period)
            try:
                async with trio.open_nursery() as servers:
                    listeners = await start(handler, options, sockets, shutdown, servers)
                    opened = (one.socket for one in listeners if one.socket.fileno() >= 0)
                    urls = [format_url(one.getsockname()) for one in opened]
                    view = View(account, shutdown, options.delay) if options.watch else None
                    if not shutdown.begun:
                        helpers.start_soon(announce, urls, view)
            except* (OSError, trio.ClosedResourceError) as group:
                failure = group.exceptions[0]
            helpers.cancel_scope.cancel()
    if failure is not None:
        logger.error("%s", advice(failure, options))
    else:
        logger.info("stopped: %s", account.totals())
    lost = account.outcomes[Outcome.CUT_OFF] + account.outcomes[Outcome.FAILED]
    return 1 if failure or lost else 0


async def limited(limiter: trio.CapacityLimiter, respond: Responder, request: bytes) -> bytes:
    """Respond as soon as the limiter has a permit, in order of arrival."""
    async with limiter:
        return await respond(request)


async def start(
    handler: Handler,
    options: argparse.Namespace,
    sockets: list[socket.socket],
    shutdown: Shutdown,
    nursery: trio.Nursery,
) -> list[trio.SocketListener]:
    """Start a server on the inherited sockets, or on each address; return its listeners."""
    if sockets:
        inherited = [trio.SocketListener(trio.socket.from_stdlib_socket(one)) for one in sockets]
        serve_inherited = partial(trio.serve_listeners, handler, inherited)
        await nursery.start(partial(serve_gracefully, serve_inherited, shutdown, shared=True))
        return inherited
    listeners: list[trio.SocketListener] = []
    addresses: list[str] = []
    with shutdown.move_on_after(math.inf):  # A slow name lookup does not delay a shutdown.
        addresses = await resolve(options.host, options.port)
    for address in addresses:
        server = partial(trio.serve_tcp, handler, options.port, host=address)
        try:
            listeners += await nursery.start(serve_gracefully, server, shutdown)
        except OSError as error:
            # `localhost` is also `::1` in many containers, where IPv6 is switched off.
            if error.errno not in UNAVAILABLE or (address == addresses[-1] and not listeners):
                raise
            logger.warning("not listening on %s: %s", address, error.strerror)
    return listeners


async def announce(urls: list[str], view: View | None) -> None:
    """Report that the server accepts connections: to the process manager, and on stdout."""
    notify("READY=1")
    lines = [*(f"Listening on {url} (Ctrl-C stops)" for url in urls), BANNER]
    await write_stdout("".join(f"{line}\n" for line in lines))
    if view is not None:
        await view.show(urls)
