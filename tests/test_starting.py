"""Clients that are there before a server has started."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from process import Start


def test_a_start_that_fails_does_not_wait_for_a_client(start: Start) -> None:
    with socket.socket(socket.AF_INET6) as taken:
        try:
            taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            taken.bind(("::", 0))
        except OSError:
            pytest.skip("no IPv6 on this machine")
        taken.listen()
        port = taken.getsockname()[1]
        with silent_client(port):
            for process in [start("--host", "", "--port", str(port)) for _ in range(3)]:
                assert process.wait() == 1  # in less than the client timeout
                assert process.stdout == ""
                assert process.stderr.endswith(
                    f"ERROR port {port} is already in use: stop the program that listens "
                    "on it, or choose another port with --port\n"
                )


@contextmanager
def silent_client(port: int) -> Iterator[None]:
    """Connect in a loop to 127.0.0.1, and send nothing."""
    stop = threading.Event()

    def connect() -> None:
        while not stop.wait(0.001):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=2) as client:
                    client.recv(1)
            except OSError:
                pass

    thread = threading.Thread(target=connect)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
