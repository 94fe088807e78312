"""`Shutdown` by itself, with handlers of the tests' own, in memory and on a mock clock."""

import math
from functools import partial

import pytest
import trio
from streams import MemoryListener, read_all
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_server import Shutdown, serve_listeners
from trio_server.shutdown import CLOSING_TIME, GRACE_PERIOD


async def echo(shutdown: Shutdown, stream: trio.abc.Stream) -> None:
    """Send back what comes, again and again, as long as the client is not idle for a minute."""
    while True:
        chunk = bytearray()
        with shutdown.move_on_after(60):
            chunk = bytearray(await stream.receive_some())
        if not chunk:
            break
        if chunk == b"work":
            await trio.sleep(10)
        await stream.send_all(chunk)


async def ignore_the_shutdown(stream: trio.abc.Stream) -> None:
    async for chunk in stream:
        await stream.send_all(chunk)


async def ends_after(seconds: float, scope: trio.CancelScope) -> None:
    """Sleep in a scope until it is cancelled; check when that was."""
    before = trio.current_time()
    with scope:
        await trio.sleep_forever()
    assert scope.cancelled_caught
    assert trio.current_time() - before == pytest.approx(seconds)


async def test_without_a_shutdown_a_wait_ends_after_its_own_time(
    autojump_clock: MockClock,
) -> None:
    shutdown = Shutdown()
    assert not shutdown.begun
    await ends_after(30, shutdown.move_on_after(30))


async def test_a_wait_is_shortened_when_the_shutdown_begins(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    shutdown = Shutdown()
    nursery.start_soon(ends_after, 10 + CLOSING_TIME, shutdown.move_on_after(30))
    nursery.start_soon(ends_after, 10.5, shutdown.move_on_after(10.5))
    await trio.sleep(10)
    shutdown.begin()
    assert shutdown.begun


async def test_a_wait_that_starts_later_is_short_from_the_start(autojump_clock: MockClock) -> None:
    shutdown = Shutdown()
    shutdown.begin()
    await ends_after(CLOSING_TIME, shutdown.move_on_after(30))
    await ends_after(0.5, shutdown.move_on_after(0.5))


async def test_waits_that_are_over_are_forgotten(autojump_clock: MockClock) -> None:
    shutdown = Shutdown()
    for _ in range(10_000):
        with shutdown.move_on_after(30):
            await trio.lowlevel.checkpoint()
    # Trio keeps some 1,000 deadlines that have gone, to clean them up together.
    assert len(shutdown._waits) < 3000  # noqa: SLF001 - a leak shows nowhere else


async def test_the_end_of_the_grace_period_ends_a_wait_as_well(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    shutdown = Shutdown()
    nursery.start_soon(ends_after, 0.25, shutdown.move_on_after(30))
    await wait_all_tasks_blocked()
    shutdown.begin(0.25)


async def test_whoever_waits_for_the_shutdown_goes_on_when_it_begins(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    shutdown = Shutdown()
    began = []

    async def watch() -> None:
        await shutdown.wait()
        began.append(trio.current_time())

    nursery.start_soon(watch)
    await trio.sleep(3)
    assert not began
    shutdown.begin()
    await wait_all_tasks_blocked()
    assert began == [trio.current_time()]
    await shutdown.wait()


@pytest.mark.parametrize("value", [-1, math.nan, -math.inf])
async def test_what_is_no_length_of_time_is_an_error_that_names_the_argument(value: float) -> None:
    shutdown = Shutdown()
    with pytest.raises(ValueError, match=r"^grace_period is .*: it has to be a number of seconds"):
        shutdown.begin(value)
    assert not shutdown.begun
    with pytest.raises(ValueError, match=r"^seconds is .*: it has to be a number of seconds"):
        shutdown.move_on_after(value)


def test_it_can_be_made_before_trio_runs() -> None:
    shutdown = Shutdown()

    async def main() -> None:
        shutdown.begin()
        await shutdown.wait()

    trio.run(main)


class Server:
    """An echo server on in-memory connections, in the background."""

    def __init__(
        self, nursery: trio.Nursery, shutdown: Shutdown, *, ignores: bool = False
    ) -> None:
        self.listener = MemoryListener()
        self.ended_at = math.nan
        self._handler = ignore_the_shutdown if ignores else partial(echo, shutdown)
        nursery.start_soon(self._serve, shutdown)

    async def _serve(self, shutdown: Shutdown) -> None:
        await serve_listeners(self._handler, [self.listener], shutdown=shutdown)
        self.ended_at = trio.current_time()


async def test_an_idle_client_holds_an_echo_server_up_for_a_second(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    shutdown = Shutdown()
    server = Server(nursery, shutdown)
    client = server.listener.connect()
    await client.send_all(b"hi")
    assert await client.receive_some() == b"hi"
    before = trio.current_time()
    shutdown.begin()
    assert await read_all(client) == b""
    await wait_all_tasks_blocked()
    assert server.ended_at == before + CLOSING_TIME
    assert server.listener.closed


async def test_work_in_flight_is_not_shortened(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    shutdown = Shutdown()
    server = Server(nursery, shutdown)
    client = server.listener.connect()
    await client.send_all(b"work")
    await wait_all_tasks_blocked()
    before = trio.current_time()
    shutdown.begin()
    assert await client.receive_some() == b"work"
    assert trio.current_time() == before + 10
    assert await client.receive_some() == b""
    await wait_all_tasks_blocked()
    assert server.ended_at == before + 10 + CLOSING_TIME


@pytest.mark.parametrize("grace_period", [0, 5, GRACE_PERIOD])
async def test_a_handler_that_ignores_the_shutdown_has_the_grace_period(
    grace_period: float, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    shutdown = Shutdown()
    server = Server(nursery, shutdown, ignores=True)
    client = server.listener.connect()
    await client.send_all(b"hi")
    assert await client.receive_some() == b"hi"
    before = trio.current_time()
    shutdown.begin(grace_period)
    assert await read_all(client) == b""
    await wait_all_tasks_blocked()
    assert server.ended_at == before + grace_period


async def test_beginning_again_can_only_shorten_the_grace_period(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    shutdown = Shutdown()
    server = Server(nursery, shutdown, ignores=True)
    server.listener.connect()
    await wait_all_tasks_blocked()
    before = trio.current_time()
    shutdown.begin(60)
    await trio.sleep(1)
    shutdown.begin(5)
    shutdown.begin(60)
    await trio.sleep(10)
    assert server.ended_at == before + 6


async def test_one_shutdown_stops_two_servers(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    shutdown = Shutdown()
    patient = Server(nursery, shutdown)
    ignorant = Server(nursery, shutdown, ignores=True)
    patient.listener.connect()
    ignorant.listener.connect()
    await wait_all_tasks_blocked()
    before = trio.current_time()
    shutdown.begin(7)
    await trio.sleep(10)
    assert patient.ended_at == before + CLOSING_TIME
    assert ignorant.ended_at == before + 7


async def test_it_may_begin_before_serving_starts(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    shutdown = Shutdown()
    shutdown.begin()
    server = Server(nursery, shutdown)
    await wait_all_tasks_blocked()
    assert server.ended_at == trio.current_time()
    assert server.listener.closed


async def test_it_may_begin_while_serving_starts(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    shutdown = Shutdown()
    server = Server(nursery, shutdown)
    shutdown.begin()
    await wait_all_tasks_blocked()
    assert server.ended_at == trio.current_time()
    assert server.listener.closed
