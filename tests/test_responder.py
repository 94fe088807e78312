import trio
from trio.testing import MockClock

from trio_server.responder import DELAY, REPLY, REPLY_HEAD, hello_world


async def test_reply_byte_for_byte(autojump_clock: MockClock) -> None:
    assert await hello_world(b"GET / HTTP/1.1\r\n\r\n") == (
        b"HTTP/1.1 200 OK\r\n"
        b"Content-Type: text/plain; charset=utf-8\r\n"
        b"Content-Length: 12\r\n"
        b"Connection: close\r\n"
        b"\r\n"
        b"Hello World!"
    )


async def test_any_request_gets_the_same_reply(autojump_clock: MockClock) -> None:
    assert await hello_world(b"\x00\xff") == await hello_world(b"hi\n") == REPLY


async def test_head_gets_the_header_section_only(autojump_clock: MockClock) -> None:
    assert await hello_world(b"HEAD / HTTP/1.1\r\n\r\n") == REPLY_HEAD
    assert await hello_world(b"HEADER") == REPLY


async def test_it_works_for_four_seconds_by_default(autojump_clock: MockClock) -> None:
    before = trio.current_time()
    await hello_world(b"hi")
    assert trio.current_time() - before == DELAY == 4
    await hello_world(b"hi", delay=0)
    assert trio.current_time() - before == 4
