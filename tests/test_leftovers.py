"""What connections leave behind: nothing, so the garbage collector may run less often."""

import gc
import socket
import sys
from collections.abc import Callable
from functools import partial

import pytest
import trio
import trio.testing
from process import Start
from streams import RESET_ON_CLOSE

from trio_server import Account, Exchange, Outcome, Shutdown, serve_connection, serve_gracefully

NUMBER = 20  # connections in each state

# A request for each state, and a function that tells whether its exchange is in that state.
STATES: dict[str, tuple[bytes, Callable[[Exchange], bool]]] = {
    "waiting for a request": (b"", lambda exchange: not exchange.in_flight),
    "working": (b"work", lambda exchange: exchange.in_flight),
    "replying": (b"big", lambda exchange: exchange.in_flight),
    "draining": (b"hi", lambda exchange: exchange.outcome is Outcome.ANSWERED),
}

# Runs the rest of the command line, but not the server.
SHOW_COLLECTOR = """
import gc, runpy, sys, trio
trio.run = lambda *_: print(gc.get_threshold()[0], gc.get_freeze_count())
del sys.argv[1:4]
runpy.run_module("trio_server", run_name="__main__", alter_sys=True)
"""


def connect(port: int, request: bytes) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=10)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    client.sendall(request)
    return client


def exceptions_and_connections() -> int:
    return sum(isinstance(one, BaseException | Exchange) for one in gc.get_objects())


@pytest.mark.parametrize("state", ["in the accept queue", *STATES])
async def test_connections_that_are_reset_leave_nothing_and_no_cycles(
    state: str, no_collector: None
) -> None:
    done = trio.Event()

    async def respond(request: bytes) -> bytes:
        if request == b"work":
            await done.wait()
        return bytes(10_000_000 if request == b"big" else 10)

    async def reset_some() -> None:
        nonlocal done
        done = trio.Event()
        request, reached = STATES.get(state, (b"", None))
        ended = account.outcomes.total()
        clients = [connect(port, request) for _ in range(NUMBER)]
        if reached:
            while len(account.open) < NUMBER or not all(map(reached, account.open)):
                await trio.sleep(0.01)
        for client in clients:
            client.close()
        done.set()
        while account.outcomes.total() < ended + NUMBER:
            await trio.sleep(0.01)
        await trio.testing.wait_all_tasks_blocked()
        account.ended.clear()  # It holds the last 50 exchanges.

    shutdown, account = Shutdown(), Account()
    handler = partial(serve_connection, respond=respond, shutdown=shutdown, account=account)
    async with trio.open_nursery() as nursery:
        server = partial(trio.serve_tcp, handler, 0, host="127.0.0.1")
        listeners = await nursery.start(serve_gracefully, server, shutdown)
        port = listeners[0].socket.getsockname()[1]
        with trio.fail_after(20):
            await reset_some()  # The first connections create what stays.
            gc.collect()
            before = exceptions_and_connections()
            await reset_some()
        assert exceptions_and_connections() == before
        assert gc.collect() < NUMBER  # objects
        nursery.cancel_scope.cancel()
    assert not account.open
    assert account.outcomes == {Outcome.WENT_AWAY: 2 * NUMBER}


def test_the_command_makes_the_collector_run_less_often_and_visit_less(start: Start) -> None:
    process = start(prefix=(sys.executable, "-c", SHOW_COLLECTOR))
    assert process.wait() == 0
    threshold, frozen = map(int, process.stdout.split())
    assert threshold > 10_000  # Python's own is 700, or 2,000
    assert frozen > 10_000  # objects of the imported modules
