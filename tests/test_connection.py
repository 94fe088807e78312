import logging
import math
from contextlib import suppress
from functools import partial

import pytest
import trio
from streams import read_all
from trio.testing import (
    MockClock,
    lockstep_stream_pair,
    memory_stream_pair,
    wait_all_tasks_blocked,
)

from trio_server import Outcome, Responder, hello_world, serve_connection
from trio_server.connection import CLIENT_TIMEOUT, CLOSING_TIME, REQUEST_SIZE, Connection
from trio_server.responder import DELAY, REPLY

# `autojump_clock` jumps to the next deadline when all tasks wait: seconds take no time, and
# come out exact.


async def ask(client: trio.abc.HalfCloseableStream, request: bytes) -> bytes:
    """Do what curl does: send, read the reply to its end, close."""
    await client.send_all(request)
    reply = await read_all(client)
    await client.aclose()
    return reply


async def is_closed(stream: trio.abc.HalfCloseableStream) -> bool:
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
        stream: trio.abc.HalfCloseableStream,
        respond: Responder,
        turns: trio.CapacityLimiter | None = None,
    ) -> None:
        self.stream = stream
        self.connection = Connection(stream, respond, turns=turns, peer="the client")
        self.scope = trio.CancelScope()
        self.seconds = math.nan
        self.done = trio.Event()
        nursery.start_soon(self._serve)

    async def _serve(self) -> None:
        before = trio.current_time()
        with self.scope:
            async with self.stream:
                await self.connection.serve()
        self.seconds = trio.current_time() - before
        self.done.set()

    async def end(self) -> tuple[Outcome, float]:
        await self.done.wait()
        return self.connection.outcome, self.seconds


async def test_reply_comes_after_the_delay_to_the_tick(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, hello_world)
    assert await ask(client, b"GET / HTTP/1.1\r\n\r\n") == REPLY
    assert await trial.end() == (Outcome.ANSWERED, DELAY)
    assert trial.connection.bytes_in == 18
    assert trial.connection.bytes_out == len(REPLY)


async def test_serve_connection_closes_the_stream_whatever_happens(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    nursery.start_soon(ask, client, b"hi")
    assert await serve_connection(server, hello_world) is Outcome.ANSWERED
    assert await is_closed(server)

    client, server = memory_stream_pair()
    assert await serve_connection(server, hello_world, client_timeout=1) is Outcome.TIMED_OUT
    assert await is_closed(server)

    client, server = memory_stream_pair()
    with trio.move_on_after(1) as scope:
        await serve_connection(server, hello_world)
    assert scope.cancelled_caught
    assert await is_closed(server)


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
    nursery: trio.Nursery,
    autojump_clock: MockClock,
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, echo)
    assert await ask(client, b"x" * 3000) == b"x" * REQUEST_SIZE == b"x" * 1024
    assert (await trial.end())[0] is Outcome.ANSWERED
    assert trial.connection.bytes_in == 3000


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
    assert await trial.end() == (Outcome.TIMED_OUT, CLIENT_TIMEOUT)


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
    assert trial.connection.bytes_out == 0


async def test_a_reset_after_the_reply_leaves_it_answered(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, echo)

    async def reset() -> None:
        if trial.connection.outcome is Outcome.ANSWERED:
            raise trio.BrokenResourceError

    server.receive_stream.receive_some_hook = reset
    await client.send_all(b"hi")
    assert await trial.end() == (Outcome.ANSWERED, 0)


async def test_a_client_that_does_not_take_the_reply(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = lockstep_stream_pair()
    trial = Trial(nursery, server, hello_world)
    await client.send_all(b"hi")
    assert await trial.end() == (Outcome.TIMED_OUT, DELAY + CLIENT_TIMEOUT)


async def test_a_client_that_never_closes(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, hello_world)
    await client.send_all(b"hi")
    assert await trial.end() == (Outcome.ANSWERED, DELAY + CLIENT_TIMEOUT)


async def test_what_follows_a_long_request_is_read_before_the_lull(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    connection = Connection(server, hello_world)
    await client.send_all(bytes(3 * REQUEST_SIZE))
    with trio.move_on_after(DELAY + 1):
        await connection.serve(lull=trio.sleep_forever)
    assert connection.outcome is Outcome.ANSWERED
    assert connection.bytes_in == 3 * REQUEST_SIZE


async def test_a_client_that_never_stops_sending(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, hello_world)

    async def send_for_ever() -> None:
        with suppress(trio.BrokenResourceError):
            while True:
                await client.send_all(b"x")
                await trio.sleep(1)

    nursery.start_soon(send_for_ever)
    assert await trial.end() == (Outcome.ANSWERED, DELAY + CLIENT_TIMEOUT)


async def test_responding_is_not_the_clients_time(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, partial(hello_world, delay=3 * CLIENT_TIMEOUT))
    assert await ask(client, b"hi") == REPLY
    assert await trial.end() == (Outcome.ANSWERED, 3 * CLIENT_TIMEOUT)


async def test_each_stage_has_the_whole_client_timeout(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, hello_world)
    await trio.sleep(CLIENT_TIMEOUT - 1)
    await client.send_all(b"hi")
    await trio.sleep(DELAY + CLIENT_TIMEOUT - 1)
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
        ("close", b"hi", echo, Outcome.ANSWERED),
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
    assert trial.connection.in_flight == (stage in ("respond", "reply"))
    trial.scope.cancel()
    assert await trial.end() == (outcome, 0)
    assert trial.scope.cancelled_caught


@pytest.mark.parametrize(
    ("request_bytes", "respond", "end"),
    [
        (b"", echo, (Outcome.TIMED_OUT, CLOSING_TIME)),
        (b"hi", hello_world, (Outcome.ANSWERED, DELAY + CLOSING_TIME)),
        (b"hi", echo, (Outcome.ANSWERED, CLOSING_TIME)),
    ],
    ids=["receive", "respond", "close"],
)
async def test_hurry_shortens_the_wait_but_not_the_work(
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
    trial.connection.hurry()
    assert await trial.end() == end


async def test_hurry_leaves_the_client_its_time_to_take_the_reply(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, server = lockstep_stream_pair()
    trial = Trial(nursery, server, hello_world)
    await client.send_all(b"hi")
    await wait_all_tasks_blocked()
    trial.connection.hurry()
    assert await trial.end() == (Outcome.TIMED_OUT, DELAY + CLIENT_TIMEOUT)


async def test_hurry_does_not_lengthen_a_wait_that_is_nearly_over(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    _, server = memory_stream_pair()
    trial = Trial(nursery, server, echo)
    await trio.sleep(CLIENT_TIMEOUT - CLOSING_TIME / 2)
    trial.connection.hurry()
    assert await trial.end() == (Outcome.TIMED_OUT, CLIENT_TIMEOUT)


async def test_one_line_at_info_and_the_stages_at_debug(
    nursery: trio.Nursery, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="trio_server")
    client, server = memory_stream_pair()
    trial = Trial(nursery, server, hello_world)
    await client.send_all(b"hi\n")
    assert await read_all(client) == REPLY
    await trio.sleep(1)  # The time in the log is that until the reply.
    await client.aclose()
    await trial.end()
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert lines == [
        ("DEBUG", "the client sent 3 bytes"),
        ("DEBUG", f"the client was sent {len(REPLY)} bytes, closing"),
        ("INFO", f"the client answered: 3 bytes in, {len(REPLY)} bytes out, 4.000 s"),
    ]


class Line:
    """Clients that take turns, one at a time."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.turns = trio.CapacityLimiter(1)

    async def join(self, request: bytes = b"hi") -> tuple[trio.abc.HalfCloseableStream, Trial]:
        client, server = memory_stream_pair()
        trial = Trial(self.nursery, server, hello_world, self.turns)
        if request:
            await client.send_all(request)
        await wait_all_tasks_blocked()
        return client, trial


async def test_turns_come_in_order_of_arrival(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    line = Line(nursery)
    members = [await line.join() for _ in range(4)]
    for place, (client, trial) in enumerate(members, start=1):
        assert trial.connection.in_flight
        assert await read_all(client) == REPLY
        await client.aclose()
        assert await trial.end() == (Outcome.ANSWERED, place * DELAY)


async def test_the_clients_time_starts_with_its_turn(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    line = Line(nursery)
    _, first = await line.join(b"")
    _, second = await line.join(b"")
    client, third = await line.join(b"")
    assert await first.end() == (Outcome.TIMED_OUT, CLIENT_TIMEOUT)
    assert await second.end() == (Outcome.TIMED_OUT, 2 * CLIENT_TIMEOUT)
    await trio.sleep(CLIENT_TIMEOUT - 1)
    assert await ask(client, b"hi") == REPLY
    assert await third.end() == (Outcome.ANSWERED, 3 * CLIENT_TIMEOUT - 1 + DELAY)
    assert line.turns.borrowed_tokens == 0


async def test_a_waiting_client_that_goes_away_frees_its_place(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    line = Line(nursery)
    first_client, first = await line.join()
    leaving_client, leaving = await line.join(b"")
    last_client, last = await line.join()

    await trio.sleep(1)
    await leaving_client.aclose()
    assert await leaving.end() == (Outcome.SENT_NOTHING, 1)
    assert await ask(first_client, b"") == REPLY
    assert await first.end() == (Outcome.ANSWERED, DELAY)
    assert await ask(last_client, b"") == REPLY
    assert await last.end() == (Outcome.ANSWERED, 2 * DELAY)
    assert line.turns.borrowed_tokens == 0


async def test_a_waiting_client_that_resets_frees_its_place(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    line = Line(nursery)
    await line.join()
    client, server = memory_stream_pair()

    async def reset_after_the_request() -> None:
        if trial.connection.in_flight:
            raise trio.BrokenResourceError

    server.receive_stream.receive_some_hook = reset_after_the_request
    trial = Trial(nursery, server, hello_world, line.turns)
    await client.send_all(b"hi")
    assert await trial.end() == (Outcome.WENT_AWAY, 0)
    assert line.turns.statistics().tasks_waiting == 0
    nursery.cancel_scope.cancel()


async def test_a_waiting_client_that_closes_its_half_keeps_its_place(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    line = Line(nursery)
    first_client, _ = await line.join()
    client, trial = await line.join(b"x" * 3000)
    await client.send_eof()
    assert await ask(first_client, b"more") == REPLY
    assert await read_all(client) == REPLY
    assert await trial.end() == (Outcome.ANSWERED, 2 * DELAY)
    assert trial.connection.bytes_in == 3000


@pytest.mark.parametrize("request_bytes", [b"", b"hi"])
async def test_cancellation_while_waiting(
    request_bytes: bytes, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    line = Line(nursery)
    await line.join()
    _, trial = await line.join(request_bytes)
    trial.scope.cancel()
    outcome = Outcome.CUT_OFF if request_bytes else Outcome.SENT_NOTHING
    assert await trial.end() == (outcome, 0)
    assert line.turns.borrowed_tokens == 1
    nursery.cancel_scope.cancel()


async def test_a_turn_that_comes_as_the_client_resets_is_passed_on(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    line = Line(nursery)
    first_client, first = await line.join()
    client, server = memory_stream_pair()

    async def reset_as_the_turn_comes() -> None:
        if trial.connection.in_flight:
            with trio.CancelScope(shield=True):  # too late to be cancelled
                await first.done.wait()
            raise trio.BrokenResourceError

    server.receive_stream.receive_some_hook = reset_as_the_turn_comes
    trial = Trial(nursery, server, hello_world, line.turns)
    await client.send_all(b"hi")
    last_client, last = await line.join()
    await ask(first_client, b"more")
    assert (await trial.end())[0] is Outcome.WENT_AWAY
    assert await ask(last_client, b"more") == REPLY
    await last.end()
    assert line.turns.borrowed_tokens == 0


async def test_hurry_while_waiting(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    line = Line(nursery)
    first_client, _ = await line.join()
    client, waiting = await line.join()
    _, silent = await line.join(b"")
    waiting.connection.hurry()
    silent.connection.hurry()
    assert await silent.end() == (Outcome.TIMED_OUT, CLOSING_TIME)
    assert await ask(first_client, b"more") == REPLY
    assert await ask(client, b"more") == REPLY
    assert await waiting.end() == (Outcome.ANSWERED, 2 * DELAY)
