"""The life of one connection, in memory and on a mock clock."""

import logging
import math
from array import array
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import trio
from streams import never, read_all, tls_contexts
from trio.testing import (
    MockClock,
    lockstep_stream_pair,
    memory_stream_pair,
    wait_all_tasks_blocked,
)

from trio_server import Account, Outcome, Responder, Shutdown, hello_world, serve_connection
from trio_server.connection import CLIENT_TIMEOUT, DRAIN_SILENCE, REQUEST_SIZE
from trio_server.responder import DELAY, REPLY
from trio_server.shutdown import IDLE_TIME

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
        self.account = Account()
        self.shutdown = Shutdown()
        self.scope = trio.CancelScope()
        self.seconds = math.nan
        self.outcome: Outcome | None = None
        self._transport = getattr(stream, "transport_stream", stream)
        self._done = trio.Event()
        self._serve = partial(
            serve_connection,
            stream,
            respond,
            shutdown=self.shutdown,
            account=self.account,
            **settings,
        )
        nursery.start_soon(self._run)

    async def _run(self) -> None:
        before = trio.current_time()
        with self.scope:
            self.outcome = await self._serve()
        self.seconds = trio.current_time() - before
        self._done.set()

    async def end(self) -> tuple[Outcome, float]:
        """Wait for its end; check that it is counted once, and that the stream is closed."""
        await self._done.wait()
        assert not self.account.open
        [(outcome, number)] = self.account.outcomes.items()
        assert number == 1
        assert [exchange.outcome for exchange in self.account.ended] == [outcome]
        assert self.outcome in (outcome, None)
        assert await is_closed(self._transport)
        return outcome, round(self.seconds, 6)


async def test_the_reply_comes_after_the_delay(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, hello_world)
    assert await ask(client, b"GET / HTTP/1.1\r\n\r\n") == REPLY
    assert await trial.end() == (Outcome.ANSWERED, DELAY)


async def test_it_needs_neither_a_shutdown_nor_an_account(
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
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, echo)
    assert await ask(client, b"x" * 3000) == b"x" * REQUEST_SIZE == b"x" * 1024
    assert (await trial.end())[0] is Outcome.ANSWERED


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


async def test_a_silent_client_is_disconnected_after_the_client_timeout(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, hello_world)
    assert await read_all(client) == b""
    assert await trial.end() == (Outcome.TIMED_OUT, CLIENT_TIMEOUT)


async def test_a_client_that_closes_before_a_request_has_sent_nothing(
    nursery: trio.Nursery, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="trio_server")
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, hello_world)
    await client.aclose()
    assert await trial.end() == (Outcome.SENT_NOTHING, 0)
    assert not caplog.records


async def test_a_client_that_half_closes_before_the_reply_receives_it(
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


async def test_a_client_that_closes_during_the_work_went_away(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, hello_world)
    await client.send_all(b"hi")
    await wait_all_tasks_blocked()
    await client.aclose()
    assert await trial.end() == (Outcome.WENT_AWAY, DELAY)


async def test_a_reset_after_the_reply_is_a_client_that_went_away(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, echo)
    received = b""

    async def reset() -> None:
        if received:
            raise trio.BrokenResourceError

    server.receive_stream.receive_some_hook = reset
    await client.send_all(b"hi")
    received = bytes(await client.receive_some())
    await client.send_all(b"more")
    assert await trial.end() == (Outcome.WENT_AWAY, 0)
    assert received == b"hi"


async def test_a_client_that_does_not_read_the_reply_times_out(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = lockstep_stream_pair()
    trial = Trial(nursery, server, hello_world)
    await client.send_all(b"hi")
    assert await trial.end() == (Outcome.TIMED_OUT, DELAY + CLIENT_TIMEOUT)


async def test_a_client_that_is_silent_after_its_reply_is_disconnected_after_two_seconds(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, hello_world)
    await client.send_all(b"hi")
    assert await trial.end() == (Outcome.ANSWERED, DELAY + DRAIN_SILENCE)
    assert DRAIN_SILENCE == 2


async def test_or_after_the_client_timeout_if_that_is_shorter(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, hello_world, client_timeout=0.5)
    await client.send_all(b"hi")
    assert await trial.end() == (Outcome.ANSWERED, DELAY + 0.5)


async def send_for_ever(client: trio.abc.SendStream, interval: float) -> None:
    with suppress(trio.BrokenResourceError):
        while True:
            await client.send_all(b"x")
            await trio.sleep(interval)


@pytest.mark.parametrize(("interval", "seconds"), [(1.9, CLIENT_TIMEOUT), (2.1, DRAIN_SILENCE)])
async def test_a_client_that_never_stops_sending_is_disconnected_after_the_client_timeout(
    interval: float, seconds: float, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, echo)
    nursery.start_soon(send_for_ever, client, interval)
    assert await trial.end() == (Outcome.ANSWERED, seconds)


async def test_the_work_does_not_count_as_the_time_of_the_client(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, partial(hello_world, delay=3 * CLIENT_TIMEOUT))
    assert await ask(client, b"hi") == REPLY
    assert await trial.end() == (Outcome.ANSWERED, 3 * CLIENT_TIMEOUT)


async def test_sending_a_request_and_receiving_the_reply_have_the_client_timeout_each(
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


async def returns_text(_: bytes) -> bytes:
    return "boom"  # type: ignore[return-value]


async def returns_every_second_byte(_: bytes) -> bytes:
    return memoryview(b"boom")[::2]  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("respond", "expected"),
    [
        (raises, ValueError),
        (raises_a_group, ExceptionGroup),
        (breaks_a_stream_of_its_own, trio.BrokenResourceError),
        (returns_nothing, TypeError),
        (returns_text, TypeError),
        (returns_every_second_byte, TypeError),
    ],
)
async def test_a_responder_that_fails_ends_its_connection_with_a_plain_traceback(
    respond: Responder,
    expected: type[Exception],
    nursery: trio.Nursery,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, respond)
    assert await ask(client, b"hi") == b""
    assert await trial.end() == (Outcome.FAILED, 0)
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage() == "client: the responder failed"
    assert record.exc_info
    assert record.exc_info[0] is expected
    assert "Traceback" in caplog.text


async def test_a_responder_that_fails_as_it_is_cancelled_is_logged(
    nursery: trio.Nursery, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails_at_the_end() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("boom")

    async def two_tasks(_: bytes) -> bytes:
        async with trio.open_nursery() as tasks:
            tasks.start_soon(fails_at_the_end)
            tasks.start_soon(trio.sleep_forever)
        return b""

    client, server = memory_stream_pair()
    trial = Trial(nursery, server, two_tasks)
    await client.send_all(b"hi")
    await wait_all_tasks_blocked()
    trial.scope.cancel()
    assert await trial.end() == (Outcome.FAILED, 0)
    assert trial.scope.cancelled_caught
    assert [record.getMessage() for record in caplog.records] == ["client: the responder failed"]
    assert "ValueError: boom" in caplog.text


@pytest.mark.parametrize(
    ("stage", "request_bytes", "respond", "outcome"),
    [
        ("receive", b"", hello_world, Outcome.CUT_OFF),
        ("respond", b"hi", never, Outcome.CUT_OFF),
        ("send", b"hi", echo, Outcome.CUT_OFF),
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
    client, server = lockstep_stream_pair() if stage == "send" else memory_stream_pair()
    trial = Trial(nursery, server, respond)
    if request_bytes:
        await client.send_all(request_bytes)
    await wait_all_tasks_blocked()
    assert trial.account.in_flight == (stage in ("respond", "send"))
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
    """Do a whole exchange, cancelled at its nth step; return whether it had that many."""
    client, server = memory_stream_pair()
    account, shutdown = Account(), Shutdown()
    scope = trio.CancelScope()
    returned = False

    async def serve(*, task_status: trio.TaskStatus[None]) -> None:
        nonlocal returned
        instrument = CancelAt(trio.lowlevel.current_task(), scope, number)
        trio.lowlevel.add_instrument(instrument)
        task_status.started()
        try:
            with scope:
                await serve_connection(server, hello_world, shutdown=shutdown, account=account)
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
    assert not account.open
    assert account.outcomes.total() == 1
    assert await is_closed(server)
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
        (b"", echo, (Outcome.SENT_NOTHING, IDLE_TIME)),
        (b"hi", hello_world, (Outcome.ANSWERED, DELAY + DRAIN_SILENCE)),
        (b"hi", echo, (Outcome.ANSWERED, DRAIN_SILENCE)),
    ],
    ids=["receive", "respond", "drain"],
)
async def test_a_shutdown_shortens_the_wait_for_a_request_and_nothing_else(
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


async def test_a_shutdown_leaves_the_client_its_time_to_receive_the_reply(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = lockstep_stream_pair()
    trial = Trial(nursery, server, hello_world)
    await client.send_all(b"hi")
    await wait_all_tasks_blocked()
    trial.shutdown.begin(math.inf)
    assert await trial.end() == (Outcome.TIMED_OUT, DELAY + CLIENT_TIMEOUT)


async def test_the_log_has_one_line_with_the_time_from_the_request_to_the_reply(
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
        ("INFO", f"client answered in 4.000 s: 3 bytes in, {len(REPLY)} out, hi"),
    ]


async def test_a_reply_of_numbers_is_sent_whole(autojump_clock: MockClock) -> None:
    """Trio counts the numbers that it has to send, and the bytes that it has sent."""

    async def respond(_: bytes) -> Any:
        return array("I", [1] * 1000)

    client, server = memory_stream_pair()
    account = Account()
    await client.send_all(b"hi")
    await client.send_eof()
    await serve_connection(server, respond, account=account)
    assert await client.receive_some() == array("I", [1] * 1000).tobytes()
    assert account.ended[0].reply_size == 4000


async def test_a_line_of_the_log_can_be_formatted_later_and_elsewhere(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="trio_server")
    client, server = memory_stream_pair()
    await client.send_all(b"hi")
    with trio.move_on_after(1):
        await serve_connection(server, never)
    [record] = caplog.records
    line = await trio.to_thread.run_sync(record.getMessage)
    assert line == "client cut off after 1.000 s: 2 bytes in, 0 out, hi"


async def test_a_request_that_was_not_answered_is_logged_with_the_time_since_it_came(
    nursery: trio.Nursery, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="trio_server")
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, never)
    await client.send_all(b"\r\nGET /\x1b[2J\r\n" + b"x" * 100)
    await trio.sleep(2)
    trial.scope.cancel()
    await trial.end()
    assert caplog.messages == [r"client cut off after 2.000 s: 113 bytes in, 0 out, GET /\x1b[2J"]


async def test_a_tls_client_is_answered(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    ours, theirs = tls_contexts()
    transport, server = memory_stream_pair()
    trial = Trial(nursery, trio.SSLStream(server, ours, server_side=True), hello_world)
    client = trio.SSLStream(transport, theirs)
    await client.send_all(b"hi")
    assert await read_all(client) == REPLY
    assert await trial.end() == (Outcome.ANSWERED, DELAY)


async def test_a_silent_tls_client_times_out(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    ours, _ = tls_contexts()
    _, server = memory_stream_pair()
    trial = Trial(nursery, trio.SSLStream(server, ours, server_side=True), hello_world)
    assert await trial.end() == (Outcome.TIMED_OUT, CLIENT_TIMEOUT)


async def test_a_responder_that_fails_disconnects_a_tls_client_at_once(
    nursery: trio.Nursery, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = tls_contexts()
    transport, server = memory_stream_pair()
    trial = Trial(nursery, trio.SSLStream(server, ours, server_side=True), raises)
    await trio.SSLStream(transport, theirs).send_all(b"hi")
    assert await trial.end() == (Outcome.FAILED, 0)
    assert "ValueError: boom" in caplog.text


async def test_a_client_that_does_not_talk_tls_went_away(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    ours, _ = tls_contexts()
    client, server = memory_stream_pair()
    trial = Trial(nursery, trio.SSLStream(server, ours, server_side=True), hello_world)
    await client.send_all(b"GET / HTTP/1.1\r\n\r\n")
    assert await trial.end() == (Outcome.WENT_AWAY, 0)


async def test_a_reply_that_was_sent_counts_though_the_half_close_takes_too_long(
    nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = memory_stream_pair()
    monkeypatch.setattr(server, "send_eof", trio.sleep_forever)
    trial = Trial(nursery, server, echo, client_timeout=1)
    await client.send_all(b"hi")
    assert await trial.end() == (Outcome.ANSWERED, 1)
