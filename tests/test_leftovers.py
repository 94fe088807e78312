"""What connections leave behind: nothing, so the garbage collector may look less often."""

import gc
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import trio
import trio.testing
from process import Start
from streams import RESET_ON_CLOSE

from trio_server import Connections, Outcome, Shutdown, serve_connection, serve_tcp
from trio_server.connection import Connection

NUMBER = 20  # of connections in each state

# A request for each state, and how to tell that its connection is in it.
STATES: dict[str, tuple[bytes, Callable[[Connection], bool]]] = {
    "waiting for a request": (b"", lambda connection: not connection.in_flight),
    "working": (b"work", lambda connection: connection.in_flight),
    "replying": (b"big", lambda connection: connection.in_flight),
    "draining": (b"hi", lambda connection: connection.outcome is Outcome.ANSWERED),
}

# Runs the rest of the command line, up to where the server would start.
SHOW_COLLECTOR = """
import gc, runpy, sys, trio
trio.run = lambda *_: print(gc.get_threshold()[0], gc.get_freeze_count())
del sys.argv[1:4]
runpy.run_module("trio_server", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def connect(port: int, request: bytes) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=10)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    client.sendall(request)
    return client


def exceptions_and_connections() -> int:
    return sum(isinstance(one, BaseException | Connection) for one in gc.get_objects())


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
        ended = connections.outcomes.total()
        clients = [connect(port, request) for _ in range(NUMBER)]
        if reached:
            while len(connections.open) < NUMBER or not all(map(reached, connections.open)):
                await trio.sleep(0.01)
        for client in clients:
            client.close()
        done.set()
        while connections.outcomes.total() < ended + NUMBER:
            await trio.sleep(0.01)
        await trio.testing.wait_all_tasks_blocked()

    shutdown, connections = Shutdown(), Connections()
    handler = partial(
        serve_connection, respond=respond, shutdown=shutdown, connections=connections
    )
    async with trio.open_nursery() as nursery:
        serve = partial(serve_tcp, handler, 0, host="127.0.0.1", shutdown=shutdown)
        listeners = await nursery.start(serve)
        port = listeners[0].socket.getsockname()[1]
        with trio.fail_after(20):
            await reset_some()  # for what is there from the first time on
            gc.collect()
            before = exceptions_and_connections()
            await reset_some()
        assert exceptions_and_connections() == before
        assert gc.collect() < NUMBER  # objects
        shutdown.begin()
    assert not connections.open
    assert connections.outcomes == {Outcome.WENT_AWAY: 2 * NUMBER}


def test_the_command_lets_the_collector_look_less_often_at_less(start: Start) -> None:
    process = start(prefix=(sys.executable, "-c", SHOW_COLLECTOR))
    assert process.wait() == 0
    threshold, frozen = map(int, process.stdout.split())
    assert threshold > 10_000  # Python's own is 700, or 2,000
    assert frozen > 10_000  # objects of the imported modules
