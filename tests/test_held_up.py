"""A process that is held up, as on a paused machine, for longer than its clients' time."""

import signal
import socket
import time

from process import Process, Start, receive_all

from trio_server.responder import REPLY
from trio_server.shutdown import CLOSING_TIME


def accepted(process: Process, number: int) -> list[socket.socket]:
    """Connect; return when the server has accepted."""
    before = process.descriptors
    clients = [process.connect() for _ in range(number)]
    process.wait_until(lambda: process.descriptors == before + number)
    return clients


def send_while_held_up(process: Process, clients: list[socket.socket], seconds: float) -> None:
    process.freeze()
    for client in clients:
        client.sendall(b"hi\n")
    time.sleep(seconds)
    process.thaw()
    for client in clients:
        with client:
            assert receive_all(client) == REPLY


def test_requests_that_arrive_while_held_up_during_a_shutdown_are_answered(serve: Start) -> None:
    process = serve("--delay", "0.1")
    clients = accepted(process, 10)
    before = process.descriptors
    process.kill(signal.SIGTERM)
    process.wait_until(lambda: process.descriptors < before)  # Its listener is closed.
    send_while_held_up(process, clients, CLOSING_TIME + 0.2)
    assert process.wait() == 0
    assert "10 answered, 0 sent nothing, " in process.stderr


def test_requests_that_arrive_while_held_up_past_the_client_timeout_are_answered(
    serve: Start,
) -> None:
    process = serve("--delay", "0.1", "--client-timeout", "0.5")
    send_while_held_up(process, accepted(process, 50), 0.7)
    assert process.stop() == 0
    assert "50 answered, 0 sent nothing, 0 went away, 0 timed out" in process.stderr


def test_silent_clients_still_time_out_after_the_process_was_held_up(serve: Start) -> None:
    process = serve("--client-timeout", "0.5")
    [client] = accepted(process, 1)
    process.freeze()
    time.sleep(0.7)
    process.thaw()
    with client:
        assert receive_all(client) == b""
    assert process.stop() == 0
    assert "0 answered, 0 sent nothing, 0 went away, 1 timed out" in process.stderr
