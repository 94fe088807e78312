import gc
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from process import Process, Start


@pytest.fixture(autouse=True, scope="session")
def default_signals() -> None:
    """Let the processes start with the usual signals, though these tests may run under nohup."""
    for signum in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the command with options. A process that still runs when the test ends is killed."""
    processes = []

    def start_process(*options: str, **settings: Any) -> Process:
        processes.append(Process(tmp_path, options, **settings))
        return processes[-1]

    yield start_process
    for process in processes:
        if process.popen.poll() is None:
            process.stop(signal.SIGKILL)


@pytest.fixture
def serve(start: Start) -> Start:
    """Start the command on a free port of 127.0.0.1, and wait until it accepts connections."""

    def serve_process(*options: str, **settings: Any) -> Process:
        process = start("--host", "127.0.0.1", "--port", "0", *options, **settings)
        process.wait_for_banner()
        return process

    return serve_process


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for what happens side by side: clients, or steps of a test for several servers."""
    with ThreadPoolExecutor(200) as pool:
        yield pool


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()
