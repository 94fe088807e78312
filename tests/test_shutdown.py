"""`Shutdown` by itself, and with handlers of the tests' own, in memory and on a mock clock."""

import math
import weakref
from functools import partial

import pytest
import trio
from streams import MemoryListener, Server, read_all
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_server import Shutdown
from trio_server.shutdown import GRACE_PERIOD, IDLE_TIME


async def ends_after(seconds: float, shutdown: Shutdown, limit: float) -> None:
    """Wait until the time is over; check when that was."""
    before = trio.current_time()
    with shutdown.move_on_after(limit) as wait:
        await trio.sleep_forever()
    assert wait.cancelled_caught
    assert trio.current_time() - before == pytest.approx(seconds)


async def test_without_a_shutdown_a_wait_ends_after_its_own_time(
    autojump_clock: MockClock,
) -> None:
    shutdown = Shutdown()
    assert not shutdown.begun
    await ends_after(30, shutdown, 30)


async def test_a_wait_is_shortened_when_the_shutdown_begins(autojump_clock: MockClock) -> None:
    shutdown = Shutdown()
    async with trio.open_nursery() as waits:
        waits.start_soon(ends_after, 10 + IDLE_TIME, shutdown, 30)
        waits.start_soon(ends_after, 10 + IDLE_TIME, shutdown, math.inf)
        waits.start_soon(ends_after, 10.5, shutdown, 10.5)
        await trio.sleep(10)
        shutdown.begin()
        assert shutdown.begun


async def test_a_wait_that_starts_after_the_shutdown_has_the_idle_time(
    autojump_clock: MockClock,
) -> None:
    shutdown = Shutdown()
    shutdown.begin()
    await ends_after(IDLE_TIME, shutdown, 30)
    await ends_after(0.5, shutdown, 0.5)


async def test_the_idle_time_can_be_chosen(autojump_clock: MockClock) -> None:
    shutdown = Shutdown(idle_time=3)
    async with trio.open_nursery() as waits:
        waits.start_soon(ends_after, 3, shutdown, 30)
        await wait_all_tasks_blocked()
        shutdown.begin()
        waits.start_soon(ends_after, 3, shutdown, 30)


async def test_the_time_counts_as_with_the_function_of_trio(autojump_clock: MockClock) -> None:
    # From entering the block; before Trio 0.27, from the call.
    scopes = [trio.move_on_after(30), Shutdown().move_on_after(30)]
    await trio.sleep(20)
    ends = []
    for scope in scopes:
        with scope:
            ends.append(scope.deadline)
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("seconds", "grace_period", "left"), [(9, 5, 1), (0.5, 5, 0.5), (9, 0.2, 0.2)]
)
async def test_a_shutdown_that_begins_just_before_the_block_is_entered_shortens_it(
    seconds: float, grace_period: float, left: float, autojump_clock: MockClock
) -> None:
    shutdown = Shutdown()
    scope = shutdown.move_on_after(seconds)
    shutdown.begin(grace_period)
    with scope:
        assert scope.deadline == trio.current_time() + left


@pytest.mark.parametrize("grace_period", [0.25, 0])
async def test_the_end_of_the_grace_period_ends_waits_that_started_before_and_after_the_shutdown(
    grace_period: float, autojump_clock: MockClock
) -> None:
    shutdown = Shutdown()
    async with trio.open_nursery() as waits:
        waits.start_soon(ends_after, grace_period, shutdown, 30)
        await wait_all_tasks_blocked()
        shutdown.begin(grace_period)
        waits.start_soon(ends_after, grace_period, shutdown, 30)


async def test_the_end_of_the_grace_period_ends_a_wait_that_starts_later(
    autojump_clock: MockClock,
) -> None:
    shutdown = Shutdown()
    shutdown.begin(10)
    await trio.sleep(9.75)
    await ends_after(0.25, shutdown, 30)
    await trio.sleep(5)
    await ends_after(0, shutdown, 30)


async def test_waits_that_are_over_are_forgotten(autojump_clock: MockClock) -> None:
    shutdown = Shutdown()
    for _ in range(10_000):
        with shutdown.move_on_after(30):
            await trio.lowlevel.checkpoint()
    # Trio itself keeps up to a thousand scopes that have ended, among its deadlines.
    assert len(shutdown._scopes) < 2_000  # noqa: SLF001 - a leak shows nowhere else


async def test_a_wait_whose_time_ran_out_keeps_nothing_in_memory(
    autojump_clock: MockClock, no_collector: None
) -> None:
    # On Python 3.12 and 3.13, `contextlib.contextmanager` would fail this test.
    kept = []

    async def handler() -> None:
        local = trio.Event()
        kept.append(weakref.ref(local))
        with Shutdown().move_on_after(1) as wait:
            await trio.sleep_forever()
        assert wait.cancelled_caught

    async with trio.open_nursery() as nursery:
        nursery.start_soon(handler)
    assert [one() for one in kept] == [None]


async def test_tasks_that_wait_for_the_shutdown_go_on_when_it_begins(
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


async def work(shutdown: Shutdown) -> bool:  # type: ignore[return] # mypy knows that time may run out
    with shutdown.move_on_after(1):
        await trio.sleep_forever()
        return True


async def test_after_a_wait_whose_time_ran_out_the_program_goes_on(
    autojump_clock: MockClock,
) -> None:
    assert await work(Shutdown()) is None


async def test_a_time_that_is_too_long_begins_nothing() -> None:
    shutdown = Shutdown()
    with pytest.raises(OverflowError):
        shutdown.begin(10**400)
    assert not shutdown.begun


@pytest.mark.parametrize("value", [-1, math.nan, -math.inf])
async def test_what_is_no_length_of_time_is_an_error_that_names_the_argument(value: float) -> None:
    with pytest.raises(ValueError, match=r"^idle_time is .*: it must be a number of seconds"):
        Shutdown(value)
    shutdown = Shutdown()
    with pytest.raises(ValueError, match=r"^grace_period is .*: it must be a number of seconds"):
        shutdown.begin(value)
    assert not shutdown.begun
    with (
        pytest.raises(ValueError, match=r"^seconds is .*: it must be a number of seconds"),
        shutdown.move_on_after(value),
    ):
        pass


async def test_the_end_of_the_grace_period_can_be_read_and_not_set(
    autojump_clock: MockClock,
) -> None:
    shutdown = Shutdown()
    assert shutdown.grace_ends == math.inf
    shutdown.begin(5)
    assert shutdown.grace_ends == trio.current_time() + 5
    with pytest.raises(AttributeError):
        shutdown.grace_ends = 0  # type: ignore[misc]


def test_it_can_be_made_before_trio_runs() -> None:
    shutdown = Shutdown()

    async def main() -> None:
        shutdown.begin()
        await shutdown.wait()

    trio.run(main)


async def test_outside_of_the_thread_of_trio_begin_fails_and_tells_how_to_call_it() -> None:
    shutdown = Shutdown()

    def begin() -> None:
        with pytest.raises(
            RuntimeError, match=r"trio\.from_thread\.run_sync.*token\.run_sync_soon"
        ):
            shutdown.begin()
        assert not shutdown.begun
        trio.from_thread.run_sync(shutdown.begin)

    await trio.to_thread.run_sync(begin)
    assert shutdown.begun


async def echo(shutdown: Shutdown, stream: trio.abc.Stream) -> None:
    """Send back what arrives until the client is idle for a minute, or the shutdown comes."""
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


class EchoServer(Server):
    """An echo server on in-memory connections, in the background."""

    def __init__(self, shutdown: Shutdown, *, ignores: bool = False) -> None:
        super().__init__(handler=ignore_the_shutdown if ignores else partial(echo, shutdown))
        self.shutdown = shutdown
        self.listener = MemoryListener()

    async def connect_to(self, nursery: trio.Nursery) -> trio.abc.HalfCloseableStream:
        """Start, and connect a client that has been served once."""
        await self.start(nursery, self.listener)
        client = self.listener.connect()
        await client.send_all(b"hi")
        assert await client.receive_some() == b"hi"
        return client


async def test_an_idle_client_delays_the_end_of_a_server_by_the_idle_time(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    server = EchoServer(Shutdown())
    client = await server.connect_to(nursery)
    before = trio.current_time()
    server.shutdown.begin()
    assert await read_all(client) == b""
    await wait_all_tasks_blocked()
    assert server.ended_at == before + IDLE_TIME
    assert server.listener.closed


async def test_work_in_flight_is_not_shortened(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    server = EchoServer(Shutdown())
    client = await server.connect_to(nursery)
    await client.send_all(b"work")
    await wait_all_tasks_blocked()
    before = trio.current_time()
    server.shutdown.begin()
    assert await client.receive_some() == b"work"
    assert trio.current_time() == before + 10
    assert await client.receive_some() == b""
    await wait_all_tasks_blocked()
    assert server.ended_at == before + 10 + IDLE_TIME


@pytest.mark.parametrize("grace_period", [0, 5, GRACE_PERIOD])
async def test_a_handler_that_ignores_the_shutdown_has_the_grace_period(
    grace_period: float, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    server = EchoServer(Shutdown(), ignores=True)
    client = await server.connect_to(nursery)
    before = trio.current_time()
    server.shutdown.begin(grace_period)
    assert await read_all(client) == b""
    await wait_all_tasks_blocked()
    assert server.ended_at == before + grace_period


async def test_beginning_again_can_only_shorten_the_grace_period(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    server = EchoServer(Shutdown(), ignores=True)
    await server.connect_to(nursery)
    before = trio.current_time()
    server.shutdown.begin(60)
    await trio.sleep(1)
    server.shutdown.begin(5)
    server.shutdown.begin(60)
    await trio.sleep(10)
    assert server.ended_at == before + 6


async def test_one_shutdown_stops_two_servers(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    shutdown = Shutdown()
    one, other = EchoServer(shutdown), EchoServer(shutdown, ignores=True)
    await one.connect_to(nursery)
    await other.connect_to(nursery)
    before = trio.current_time()
    shutdown.begin(7)
    await trio.sleep(10)
    assert one.ended_at == before + IDLE_TIME
    assert other.ended_at == before + 7


@pytest.mark.parametrize("grace_period", [0, GRACE_PERIOD])
async def test_it_may_begin_before_a_server_starts(
    grace_period: float, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    server = EchoServer(Shutdown())
    server.shutdown.begin(grace_period)
    before = trio.current_time()
    await server.start(nursery, server.listener)
    await wait_all_tasks_blocked()
    assert server.ended_at == before
    assert server.listener.closed


async def test_it_may_begin_while_a_server_starts(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    server = EchoServer(Shutdown())
    nursery.start_soon(server.start, nursery, server.listener)
    before = trio.current_time()
    await trio.lowlevel.checkpoint()
    server.shutdown.begin()
    await wait_all_tasks_blocked()
    assert server.ended_at == before
    assert server.listener.closed
