"""Tests of a responder and of a handler, without a socket and without waiting.

Run ``pip install pytest pytest-trio``, then ``pytest -o trio_mode=true test_handler.py``. The
option belongs in pyproject.toml: ``trio_mode = true`` in ``[tool.pytest.ini_options]``.
"""

import trio
from trio.testing import MockClock, memory_stream_pair

from trio_server import Outcome, Shutdown, serve_connection


async def shout(request: bytes) -> bytes:  # the responder
    await trio.sleep(4)
    return request.upper()


async def test_the_responder_works_for_four_seconds(autojump_clock: MockClock) -> None:
    assert await shout(b"hello") == b"HELLO"
    assert trio.current_time() == 4  # The argument installs a clock that jumps over each sleep.


async def test_the_handler_answers(autojump_clock: MockClock) -> None:
    client, server = memory_stream_pair()
    await client.send_all(b"hello")
    await client.send_eof()  # Otherwise the server drains for 2 more seconds.
    assert await serve_connection(server, shout) is Outcome.ANSWERED
    assert await client.receive_some() == b"HELLO"


async def test_an_idle_client_delays_a_shutdown_by_a_second(autojump_clock: MockClock) -> None:
    _client, server = memory_stream_pair()
    stop = Shutdown()
    stop.begin()
    assert await serve_connection(server, shout, shutdown=stop) is Outcome.SENT_NOTHING
    assert trio.current_time() == 1
