"""The command: it puts the parts together, and sets up signals, limits and the collector."""

import argparse
import gc
import logging
import math
import resource
import sys
from contextlib import suppress
from functools import partial
from signal import Signals
from typing import Any

import trio

from trio_server.account import Account, Outcome
from trio_server.command import signals
from trio_server.command.activation import inherited_listeners, notify
from trio_server.command.arguments import NO_SUCH_ADDRESS, advice, parse_arguments, resolve
from trio_server.command.log import set_up_logging, write_all
from trio_server.command.watch import View
from trio_server.connection import Responder, format_address, serve_connection
from trio_server.responder import hello_world
from trio_server.server import serve_gracefully
from trio_server.shutdown import Shutdown

BANNER = "Waiting for connection to be established"
COLLECTOR_THRESHOLDS = (1_000_000, 10, 10)  # 20,000 open connections need fewer objects than that.

logger: logging.Logger = logging.getLogger("trio_server")


def main() -> int:
    """Run the command; return its exit status."""
    stop_signals = signals.exit_on_stop_signals()
    options = parse_arguments()
    inherited = inherited_listeners()
    log = set_up_logging(options.log_level)
    try:
        raise_file_limit()
        tune_collector()
        addresses = [] if inherited else resolve(options.host, options.port)
        return trio.run(run, options, inherited, addresses, stop_signals)
    except* OSError as group:
        logger.error("%s", advice(group, options))  # noqa: TRY400 - one sentence is enough
    except* BaseException:  # a bug, or a responder that raised `SystemExit`
        logger.critical("the server has failed", exc_info=True)
    finally:
        log.close()
    return 1


def raise_file_limit() -> None:
    """Raise the limit on open files as far as the system allows: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS may refuse its own hard limit.
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        logger.debug("limit on open files: was %d, is %d", soft, hard)


def tune_collector() -> None:
    """Look for cyclic garbage less often: connections leave none (see ``tests/benchmark``)."""
    gc.collect()
    gc.freeze()  # The imported modules will not become garbage.
    gc.set_threshold(*COLLECTOR_THRESHOLDS)


async def run(
    options: argparse.Namespace,
    inherited: list[trio.SocketListener],
    addresses: list[str],
    stop_signals: list[Signals],
) -> int:
    """Serve until a signal stops the server; return the exit status."""
    shutdown, account = Shutdown(), Account()
    limiter = trio.CapacityLimiter(options.max_concurrent)
    respond: Responder = partial(hello_world, delay=options.delay)
    if options.max_concurrent < math.inf:
        respond = partial(limited, limiter, respond)
    handler = partial(
        serve_connection,
        respond=respond,
        client_timeout=options.client_timeout,
        shutdown=shutdown,
        account=account,
    )
    if inherited:
        servers: list[partial[Any]] = [partial(trio.serve_listeners, handler, inherited)]
    else:
        servers = [partial(trio.serve_tcp, handler, options.port, host=one) for one in addresses]
    with signals.receive(stop_signals) as received:
        async with trio.open_nursery() as helpers:
            stop = partial(signals.handle, received, shutdown, account, limiter)
            helpers.start_soon(stop, options.grace_period)
            async with trio.open_nursery() as nursery:
                listeners = await start(servers, shutdown, nursery, shared=bool(inherited))
                if not shutdown.begun:
                    urls = announce(listeners)
                    if options.watch:
                        helpers.start_soon(View(account, shutdown, options.delay, urls).show)
            helpers.cancel_scope.cancel()
    logger.info("stopped: %s", account.totals())
    return 1 if account.outcomes[Outcome.CUT_OFF] or account.outcomes[Outcome.FAILED] else 0


async def limited(limiter: trio.CapacityLimiter, respond: Responder, request: bytes) -> bytes:
    """Respond as soon as the limiter has a permit, in order of arrival."""
    async with limiter:
        return await respond(request)


async def start(
    servers: list[partial[Any]], shutdown: Shutdown, nursery: trio.Nursery, *, shared: bool
) -> list[trio.SocketListener]:
    """Start a server on each address that this machine has. If it has none, raise `OSError`."""
    listeners: list[trio.SocketListener] = []
    for server in servers:
        run_server = partial(serve_gracefully, server, shutdown, shared=shared)
        try:
            listeners += await nursery.start(run_server)
        except OSError as error:
            # In many containers, `localhost` is also `::1`, although IPv6 is switched off.
            if error.errno not in NO_SUCH_ADDRESS or (server is servers[-1] and not listeners):
                raise
            logger.warning("not listening on %s: %s", server.keywords["host"], error.strerror)
    return listeners


def announce(listeners: list[trio.SocketListener]) -> str:
    """Tell the process manager and stdout that clients may connect. Return the URLs."""
    notify("READY=1")
    names = [listener.socket.getsockname() for listener in listeners]  # A Unix socket has a path.
    urls = [f"http://{format_address(n)}" if isinstance(n, tuple) else ascii(n) for n in names]
    lines = [*(f"Listening on {url} (Ctrl-C stops)" for url in urls), BANNER]
    if sys.stdout is not None:  # If it is closed, descriptor 1 may be another file.
        write_all(1, "".join(f"{line}\n" for line in lines), patience=0)
    return ", ".join(urls)
