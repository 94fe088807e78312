"""The life of one connection, in memory and on a mock clock."""

import logging
import math
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import trio
from streams import read_all
from trio.testing import (
    MockClock,
    lockstep_stream_pair,
    memory_stream_pair,
    wait_all_tasks_blocked,
)

from trio_server import (
    Connections,
    Outcome,
    Responder,
    Shutdown,
    hello_world,
    serve_connection,
)
from trio_server.connection import CLIENT_TIMEOUT, DRAIN_SILENCE, LAST_LOOK, REQUEST_SIZE
from trio_server.responder import DELAY, REPLY
from trio_server.shutdown import CLOSING_TIME

# `autojump_clock` jumps to the next deadline when all tasks wait: seconds take no time, and
# come out exact.


async def ask(client: trio.abc.HalfCloseableStream, request: bytes) -> bytes:
    """Do what curl does: send, read the reply to its end, close."""
    await client.send_all(request)
    reply = await read_all(client)
    await client.aclose()
    return reply


async def is_closed(stream: trio.abc.Stream) -> bool:
    with trio.move_on_after(0.1):
        try:
            await stream.receive_some(1)
        except trio.ClosedResourceError:
            return True
    return False


async def never(_: bytes) -> bytes:
    await trio.sleep_forever()
    raise AssertionError


async def echo(request: bytes) -> bytes:
    return request


class Trial:
    """A connection being served in the background, and how it ended."""

    def __init__(
        self,
        nursery: trio.Nursery,
        stream: trio.abc.Stream,
        respond: Responder,
        **settings: Any,
    ) -> None:
        self.connections = Connections()
        self.shutdown = Shutdown()
        self.scope = trio.CancelScope()
        self.seconds = math.nan
        self.outcome: Outcome | None = None
        self._done = trio.Event()
        self._serve = partial(
            serve_connection,
            stream,
            respond,
            shutdown=self.shutdown,
            connections=self.connections,
            **settings,
        )
        nursery.start_soon(self._run)
        self.stream = stream

    async def _run(self) -> None:
        before = trio.current_time()
        with self.scope:
            self.outcome = await self._serve()
        self.seconds = trio.current_time() - before
        self._done.set()

    async def end(self) -> tuple[Outcome, float]:
        """Wait for its end; check that it left nothing behind."""
        await self._done.wait()
        assert not self.connections.open
        [(outcome, number)] = self.connections.outcomes.items()
        assert number == 1
        assert self.outcome in (outcome, None)
        assert await is_closed(self.stream)
        return outcome, round(self.seconds, 6)

    @property
    def bytes_in(self) -> int:
        [connection] = self.connections.open
        return connection.bytes_in


async def test_the_reply_comes_after_the_delay_to_the_tick(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, hello_world)
    assert await ask(client, b"GET / HTTP/1.1\r\n\r\n") == REPLY
    assert await trial.end() == (Outcome.ANSWERED, DELAY)


async def test_without_any_options_it_serves_and_closes(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    nursery.start_soon(ask, client, b"hi")
    assert await serve_connection(server, hello_world) is Outcome.ANSWERED
    assert await is_closed(server)


@pytest.mark.parametrize("value", [-5, math.nan])
async def test_a_client_timeout_that_is_no_length_of_time(value: float) -> None:
    _, server = memory_stream_pair()
    with pytest.raises(ValueError, match=r"^client_timeout is "):
        await serve_connection(server, hello_world, client_timeout=value)


async def test_ten_connections_at_once_take_one_delay(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    before = trio.current_time()
    replies = []

    async def one_client() -> None:
        client, server = memory_stream_pair()
        nursery.start_soon(serve_connection, server, hello_world)
        replies.append(await ask(client, b"hi\n"))

    async with trio.open_nursery() as clients:
        for _ in range(10):
            clients.start_soon(one_client)
    assert replies == [REPLY] * 10
    assert trio.current_time() - before == DELAY


async def test_the_request_is_the_first_kilobyte_and_the_rest_is_discarded(
    nursery: trio.Nursery, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="trio_server")
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, echo)
    assert await ask(client, b"x" * 3000) == b"x" * REQUEST_SIZE == b"x" * 1024
    assert (await trial.end())[0] is Outcome.ANSWERED
    assert "3000 bytes in, 1024 out, xxx" in caplog.text


async def test_a_responder_gets_bytes_also_in_memory(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    seen = []

    async def remember(request: bytes) -> bytes:
        seen.append(request)
        return b""

    client, server = memory_stream_pair()
    trial = Trial(nursery, server, remember)
    assert await ask(client, b"hi") == b""
    assert (await trial.end())[0] is Outcome.ANSWERED
    assert seen == [b"hi"]
    assert type(seen[0]) is bytes


async def test_silence_ends_with_the_client_timeout(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, hello_world)
    assert await read_all(client) == b""
    assert await trial.end() == (Outcome.TIMED_OUT, CLIENT_TIMEOUT + LAST_LOOK)


async def test_a_request_that_came_in_time_but_was_not_seen_is_answered(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    looks = 0

    async def be_held_up() -> None:
        # As after SIGCONT: the first look misses what has arrived, as the time is over.
        nonlocal looks
        looks += 1
        if looks == 1:
            await trio.sleep_forever()

    server.receive_stream.receive_some_hook = be_held_up
    trial = Trial(nursery, server, hello_world)
    await client.send_all(b"hi")
    assert await read_all(client) == REPLY
    await client.aclose()
    assert await trial.end() == (Outcome.ANSWERED, CLIENT_TIMEOUT + DELAY)


async def test_end_of_file_before_a_request_is_a_quiet_end(
    nursery: trio.Nursery, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, hello_world)
    await client.aclose()
    assert await trial.end() == (Outcome.SENT_NOTHING, 0)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


async def test_half_close_before_the_reply_still_gets_it(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, hello_world)
    await client.send_all(b"hi\n")
    await client.send_eof()
    assert await read_all(client) == REPLY
    assert await trial.end() == (Outcome.ANSWERED, DELAY)


async def test_a_reset_before_the_request(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    _, server = memory_stream_pair()

    async def reset() -> None:
        raise trio.BrokenResourceError

    server.receive_stream.receive_some_hook = reset
    trial = Trial(nursery, server, hello_world)
    assert await trial.end() == (Outcome.WENT_AWAY, 0)


async def test_a_client_that_goes_away_during_the_work(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, hello_world)
    await client.send_all(b"hi")
    await wait_all_tasks_blocked()
    await client.aclose()
    assert await trial.end() == (Outcome.WENT_AWAY, DELAY)


async def test_a_reset_while_draining_is_a_client_that_went_away(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, echo)

    async def reset() -> None:
        if trial.connections.open and not trial.connections.in_flight and received:
            raise trio.BrokenResourceError

    received: list[bytes] = []
    server.receive_stream.receive_some_hook = reset
    await client.send_all(b"hi")
    received.append(bytes(await client.receive_some()))
    assert await trial.end() == (Outcome.WENT_AWAY, 0)
    assert received == [b"hi"]


async def test_a_stream_that_somebody_else_closes(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    _, server = memory_stream_pair()
    trial = Trial(nursery, server, hello_world)
    await trio.sleep(1)
    await server.aclose()
    assert await trial.end() == (Outcome.WENT_AWAY, 1)


async def test_a_client_that_does_not_take_the_reply(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = lockstep_stream_pair()
    trial = Trial(nursery, server, hello_world)
    await client.send_all(b"hi")
    assert await trial.end() == (Outcome.TIMED_OUT, DELAY + CLIENT_TIMEOUT)


async def test_a_client_that_is_silent_after_its_reply_is_let_go_after_two_seconds(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, hello_world)
    await client.send_all(b"hi")
    assert await trial.end() == (Outcome.ANSWERED, DELAY + DRAIN_SILENCE + LAST_LOOK)
    assert DRAIN_SILENCE == 2


async def test_or_after_its_timeout_if_that_is_shorter(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, hello_world, client_timeout=0.5)
    await client.send_all(b"hi")
    assert await trial.end() == (Outcome.ANSWERED, DELAY + 0.5 + LAST_LOOK)


async def test_what_came_in_time_while_draining_but_was_not_seen_is_read(
    nursery: trio.Nursery, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="trio_server")
    client, server = memory_stream_pair()
    looks = 0

    async def be_held_up() -> None:
        nonlocal looks
        looks += 1
        if looks == 2:  # the first one while draining
            await trio.sleep_forever()

    server.receive_stream.receive_some_hook = be_held_up
    trial = Trial(nursery, server, echo)
    await client.send_all(b"hi")
    assert await client.receive_some() == b"hi"
    await client.send_all(b"x" * 5000)
    await trio.sleep(DRAIN_SILENCE + 1)
    await client.aclose()
    assert await trial.end() == (Outcome.ANSWERED, DRAIN_SILENCE + 1)
    assert "5002 bytes in" in caplog.text


async def send_for_ever(client: trio.abc.SendStream) -> None:
    with suppress(trio.BrokenResourceError):
        while True:
            await client.send_all(b"x")
            await trio.sleep(1)


async def test_a_client_that_never_stops_sending_has_the_client_timeout(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, hello_world)
    nursery.start_soon(send_for_ever, client)
    assert await trial.end() == (Outcome.ANSWERED, DELAY + CLIENT_TIMEOUT)


async def test_responding_is_not_the_clients_time(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, partial(hello_world, delay=3 * CLIENT_TIMEOUT))
    assert await ask(client, b"hi") == REPLY
    assert await trial.end() == (Outcome.ANSWERED, 3 * CLIENT_TIMEOUT)


async def test_receiving_and_replying_have_the_whole_client_timeout_each(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = lockstep_stream_pair()
    trial = Trial(nursery, server, hello_world)
    await trio.sleep(CLIENT_TIMEOUT - 1)
    await client.send_all(b"hi")
    await trio.sleep(DELAY + CLIENT_TIMEOUT - 1)
    assert await read_all(client) == REPLY
    await client.aclose()
    assert await trial.end() == (Outcome.ANSWERED, DELAY + 2 * CLIENT_TIMEOUT - 2)


async def raises(_: bytes) -> bytes:
    raise ValueError("boom")


async def raises_a_group(_: bytes) -> bytes:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(raises, b"")
        nursery.start_soon(raises, b"")
    raise AssertionError


async def breaks_a_stream_of_its_own(_: bytes) -> bytes:
    raise trio.BrokenResourceError("boom")


async def returns_nothing(_: bytes) -> bytes:
    return None  # type: ignore[return-value]


async def returns_every_other_byte(_: bytes) -> bytes:
    return memoryview(b"boom")[::2]  # type: ignore[return-value]


async def returns_text(_: bytes) -> bytes:
    return "boom"  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("respond", "cause"),
    [
        (raises, "ValueError: boom"),
        (raises_a_group, "ValueError: boom"),
        (breaks_a_stream_of_its_own, "BrokenResourceError: boom"),
        (returns_nothing, "TypeError: memoryview: a bytes-like object is required"),
        (returns_every_other_byte, "TypeError: memoryview: casts are restricted to C-contiguous"),
        (returns_text, "TypeError: memoryview: a bytes-like object is required"),
    ],
)
async def test_a_responder_that_fails_ends_its_connection_with_a_traceback(
    respond: Responder,
    cause: str,
    nursery: trio.Nursery,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, respond)
    assert await ask(client, b"hi") == b""
    assert await trial.end() == (Outcome.FAILED, 0)
    assert "ERROR" in caplog.text
    assert "Traceback" in caplog.text
    assert cause in caplog.text


async def test_a_responder_that_fails_while_it_is_cancelled(
    nursery: trio.Nursery, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail_on_the_way_out() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("boom")

    async def respond(_: bytes) -> bytes:
        async with trio.open_nursery() as children:
            children.start_soon(fail_on_the_way_out)
            await trio.sleep_forever()
        raise AssertionError

    client, server = memory_stream_pair()
    trial = Trial(nursery, server, respond)
    await client.send_all(b"hi")
    await wait_all_tasks_blocked()
    trial.scope.cancel()
    assert await trial.end() == (Outcome.FAILED, 0)
    assert trial.scope.cancelled_caught
    assert "ValueError: boom" in caplog.text


@pytest.mark.parametrize(
    ("stage", "request_bytes", "respond", "outcome"),
    [
        ("receive", b"", hello_world, Outcome.SENT_NOTHING),
        ("respond", b"hi", never, Outcome.CUT_OFF),
        ("reply", b"hi", echo, Outcome.CUT_OFF),
        ("drain", b"hi", echo, Outcome.ANSWERED),
    ],
)
async def test_cancellation_in_each_stage(
    stage: str,
    request_bytes: bytes,
    respond: Responder,
    outcome: Outcome,
    nursery: trio.Nursery,
    autojump_clock: MockClock,
) -> None:
    client, server = lockstep_stream_pair() if stage == "reply" else memory_stream_pair()
    trial = Trial(nursery, server, respond)
    if request_bytes:
        await client.send_all(request_bytes)
    await wait_all_tasks_blocked()
    assert trial.connections.in_flight == (stage in ("respond", "reply"))
    trial.scope.cancel()
    assert await trial.end() == (outcome, 0)
    assert trial.scope.cancelled_caught


class CancelAt(trio.abc.Instrument):
    """Cancels a scope when a task is about to run for the nth time."""

    def __init__(self, task: trio.lowlevel.Task, scope: trio.CancelScope, number: int) -> None:
        self.task, self.scope, self.left = task, scope, number

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            self.left -= 1
            if self.left == 0:
                self.scope.cancel()


async def exchange_cancelled_at(number: int) -> bool:
    """Do a whole exchange, cancelled at its nth step; return whether it had so many."""
    client, server = memory_stream_pair()
    connections, limiter, shutdown = Connections(), trio.CapacityLimiter(1), Shutdown()
    scope = trio.CancelScope()
    returned = False

    async def serve(*, task_status: trio.TaskStatus[None]) -> None:
        nonlocal returned
        instrument = CancelAt(trio.lowlevel.current_task(), scope, number)
        trio.lowlevel.add_instrument(instrument)
        task_status.started()
        try:
            with scope:
                await serve_connection(
                    server,
                    hello_world,
                    limiter=limiter,
                    shutdown=shutdown,
                    connections=connections,
                )
                returned = True
        finally:
            trio.lowlevel.remove_instrument(instrument)

    async with trio.open_nursery() as nursery:
        await nursery.start(serve)
        with suppress(trio.BrokenResourceError):
            await client.send_all(b"x" * 1500)
            reply = await read_all(client)
            assert reply in (b"", REPLY)
            await client.aclose()
    assert not connections.open
    assert connections.outcomes.total() == 1
    assert limiter.borrowed_tokens == 0
    assert await is_closed(server)
    # A cancellation is either delivered, or comes when there is no checkpoint left.
    assert returned != scope.cancelled_caught
    return scope.cancel_called


async def test_a_cancellation_at_any_checkpoint_leaks_nothing_and_is_not_swallowed(
    autojump_clock: MockClock,
) -> None:
    number = 1
    while await exchange_cancelled_at(number):
        number += 1
    assert number > 8


@pytest.mark.parametrize(
    ("request_bytes", "respond", "end"),
    [
        (b"", echo, (Outcome.SENT_NOTHING, CLOSING_TIME + LAST_LOOK)),
        (b"hi", hello_world, (Outcome.ANSWERED, DELAY + CLOSING_TIME + LAST_LOOK)),
        (b"hi", echo, (Outcome.ANSWERED, CLOSING_TIME + LAST_LOOK)),
    ],
    ids=["receive", "respond", "drain"],
)
async def test_a_shutdown_shortens_the_waits_but_not_the_work(
    request_bytes: bytes,
    respond: Responder,
    end: tuple[Outcome, float],
    nursery: trio.Nursery,
    autojump_clock: MockClock,
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, respond)
    if request_bytes:
        await client.send_all(request_bytes)
    await wait_all_tasks_blocked()
    trial.shutdown.begin()
    assert await trial.end() == end


async def test_a_shutdown_leaves_the_client_its_time_to_take_the_reply(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = lockstep_stream_pair()
    trial = Trial(nursery, server, hello_world)
    await client.send_all(b"hi")
    await wait_all_tasks_blocked()
    trial.shutdown.begin(math.inf)
    assert await trial.end() == (Outcome.TIMED_OUT, DELAY + CLIENT_TIMEOUT)


async def test_a_client_that_never_stops_sending_holds_a_shutdown_up_for_a_second(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, echo)
    nursery.start_soon(send_for_ever, client)
    await trio.sleep(5.5)
    trial.shutdown.begin()
    assert await trial.end() == (Outcome.ANSWERED, 5.5 + CLOSING_TIME + LAST_LOOK)


async def test_a_client_whose_time_is_over_during_a_shutdown_has_timed_out(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    _, server = memory_stream_pair()
    trial = Trial(nursery, server, echo)
    await trio.sleep(CLIENT_TIMEOUT - CLOSING_TIME / 2)
    trial.shutdown.begin()
    assert await trial.end() == (Outcome.TIMED_OUT, CLIENT_TIMEOUT + LAST_LOOK)


async def test_one_line_at_info_says_how_long_the_reply_took(
    nursery: trio.Nursery, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="trio_server")
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, hello_world)
    await trio.sleep(5)  # Neither the silence before the request counts, …
    await client.send_all(b"hi\n")
    assert await read_all(client) == REPLY
    await trio.sleep(1)  # … nor that after the reply.
    await client.aclose()
    await trial.end()
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert lines == [
        ("DEBUG", "client connected"),
        ("DEBUG", "client sent 3 bytes"),
        ("INFO", f"client answered in 4.000 s: 3 bytes in, {len(REPLY)} out, hi"),
    ]


class OneAtATime:
    """Clients whose responders share one permit."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.limiter = trio.CapacityLimiter(1)

    async def join(self, request: bytes = b"hi") -> tuple[trio.abc.HalfCloseableStream, Trial]:
        client, server = memory_stream_pair()
        trial = Trial(self.nursery, server, hello_world, limiter=self.limiter)
        if request:
            await client.send_all(request)
        await wait_all_tasks_blocked()
        return client, trial


async def test_with_a_limiter_requests_are_worked_on_in_order_of_arrival(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    queue = OneAtATime(nursery)
    members = [await queue.join() for _ in range(4)]
    for place, (client, trial) in enumerate(members, start=1):
        assert trial.connections.in_flight == 1
        assert await read_all(client) == REPLY
        await client.aclose()
        assert await trial.end() == (Outcome.ANSWERED, place * DELAY)
    assert queue.limiter.borrowed_tokens == 0


async def test_silent_clients_and_those_that_drain_need_no_permit(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    queue = OneAtATime(nursery)
    for _ in range(10):
        await queue.join(b"")
    answered, draining = await queue.join()
    assert await read_all(answered) == REPLY
    client, trial = await queue.join()
    assert await ask(client, b"") == REPLY
    assert await trial.end() == (Outcome.ANSWERED, DELAY)
    await draining.end()
    nursery.cancel_scope.cancel()


async def test_cancellation_while_waiting_for_a_permit(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    queue = OneAtATime(nursery)
    await queue.join()
    _, trial = await queue.join()
    trial.scope.cancel()
    assert await trial.end() == (Outcome.CUT_OFF, 0)
    assert queue.limiter.statistics().tasks_waiting == 0
    nursery.cancel_scope.cancel()


async def test_a_responder_that_fails_gives_its_permit_back(
    nursery: trio.Nursery, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    limiter = trio.CapacityLimiter(1)
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, raises, limiter=limiter)
    await client.send_all(b"hi")
    assert await trial.end() == (Outcome.FAILED, 0)
    assert limiter.borrowed_tokens == 0


class NoHalfClose(trio.abc.Stream):
    """What TLS is: a stream that can only be closed as a whole."""

    def __init__(self, inner: trio.abc.Stream) -> None:
        self.inner = inner
        self.receive_some = inner.receive_some  # type: ignore[method-assign]
        self.send_all = inner.send_all  # type: ignore[method-assign]
        self.aclose = inner.aclose  # type: ignore[method-assign]

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray: ...  # type: ignore[empty-body]
    async def send_all(self, data: bytes | bytearray | memoryview) -> None: ...
    async def wait_send_all_might_not_block(self) -> None: ...
    async def aclose(self) -> None: ...


async def test_a_stream_that_cannot_be_half_closed_is_closed(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, NoHalfClose(server), hello_world)
    await client.send_all(b"hi")
    assert await read_all(client) == REPLY
    assert await trial.end() == (Outcome.ANSWERED, DELAY)


async def test_a_reply_that_was_sent_counts_though_the_half_close_takes_too_long(
    nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = memory_stream_pair()
    monkeypatch.setattr(server, "send_eof", trio.sleep_forever)
    trial = Trial(nursery, server, echo, client_timeout=1)
    await client.send_all(b"hi")
    await client.send_eof()
    assert await trial.end() == (Outcome.ANSWERED, 1)
