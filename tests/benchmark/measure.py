"""The measurements: load from ab, memory and processor time from /proc."""

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from servers import HOST, Running

from trio_server.responder import BODY

CLIENTS = 64
"""Connections at once when the rate is measured: enough to keep a server busy all the time."""

AB_TIMEOUT = 90.0
"""Seconds until ab is ended and its requests count as failed: several times what a server
needs that answers 1,000 requests a second."""

LOOKS = 20
"""How often in a delay to look at the descriptors of a server. Counting 10,000 of them takes
milliseconds of a core, so not more often."""

PAGE = os.sysconf("SC_PAGE_SIZE")  # bytes
TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds


CROWD_LOADS = 4
"""How many ab make a crowd."""


@dataclass(frozen=True)
class Load:
    """What ab says about its requests. Where some failed, there are no times and no rate.

    Attributes:
        requests: How many were to be made.
        failures: How many of them were not answered, or not with a 200 and the right body.
        rate: Requests a second.
        p50: Seconds from connecting to the end of the reply, for the median request.
        p99: Likewise, for the one that 99 % are not slower than.
        longest: Likewise, for the slowest one.
    """

    requests: int
    failures: int
    rate: float | None = None
    p50: float | None = None
    p99: float | None = None
    longest: float | None = None


@dataclass(frozen=True)
class Held:
    """Connections held at once.

    Attributes:
        load: What their clients saw.
        memory: Bytes that each takes in the server; None if they were never held all at once.
        dropped: How often the kernel found the accept queue full and let a client wait. It
            tries again after a second, so this is where large times beyond the delay come from.
    """

    load: Load
    memory: float | None
    dropped: int


@dataclass(frozen=True)
class Rate:
    """Connections as many as possible.

    Attributes:
        load: What their clients saw.
        cpu: Seconds of processor time that each takes in the server, in user and system mode.
    """

    load: Load
    cpu: float | None


@dataclass(frozen=True)
class Crowd:
    """More connections at once than one process may have.

    Attributes:
        failures: How many requests failed.
        p99: Seconds for the one that 99 % are not slower than, of the slowest ab; None if
            some failed.
        memory: Bytes of all the processes, at most.
        cpu: Seconds of processor time for each connection.
    """

    failures: int
    p99: float | None
    memory: int
    cpu: float


def hold(server: Running, connections: int, delay: float) -> Held:
    """Make connections all at once to a fresh server that answers after ``delay`` seconds."""
    # One more: ab makes its first request alone, and the others when that was answered.
    requests = connections + 1
    resident_before, files_before = resident(server.pid), descriptors(server.pid)
    looks = []
    dropped_before = dropped()
    with ab(server.port, requests, connections) as client:
        give_up = time.monotonic() + AB_TIMEOUT
        while client.poll() is None and time.monotonic() < give_up:
            # As many descriptors as connections: all were accepted, none was closed.
            if descriptors(server.pid) >= files_before + connections:
                looks.append((resident(server.pid) - resident_before) / connections)
            time.sleep(delay / LOOKS)
        load = report(client, requests, give_up)
    # In the middle of that time all handlers had the time to start, and none to answer.
    memory = None if load.failures or not looks else statistics.median(looks)
    return Held(load, memory, dropped() - dropped_before)


def hurry(server: Running, requests: int) -> Rate:
    """Make requests as fast as a server without delay answers them."""
    before = cpu_time(server.pid)
    load = burst(server.port, requests)
    cpu = (cpu_time(server.pid) - before) / requests
    return Rate(load, None if load.failures else cpu)


def burst(port: int, requests: int) -> Load:
    """Make requests as fast as whoever serves a port answers them."""
    with ab(port, requests, CLIENTS) as client:
        return report(client, requests, time.monotonic() + AB_TIMEOUT)


def crowd(servers: Sequence[Running], connections: int, delay: float) -> Crowd:
    """Make connections all at once to processes that share a port.

    Each of several ab has an address of its own, as one address has 28,000 ports, and one ab may
    not have more than 20,000 connections.
    """
    each = connections // CROWD_LOADS
    cpu_before = sum(cpu_time(server.pid) for server in servers)
    resident_most = 0
    with ExitStack() as stack:
        clients = [
            stack.enter_context(ab(servers[0].port, each + 1, each, f"127.0.0.{2 + number}"))
            for number in range(CROWD_LOADS)
        ]
        give_up = time.monotonic() + AB_TIMEOUT
        while any(client.poll() is None for client in clients) and time.monotonic() < give_up:
            resident_most = max(resident_most, sum(resident(server.pid) for server in servers))
            time.sleep(delay / LOOKS)
        loads = [report(client, each + 1, give_up) for client in clients]
    cpu = sum(cpu_time(server.pid) for server in servers) - cpu_before
    p99s = [load.p99 for load in loads if load.p99 is not None]
    return Crowd(
        sum(load.failures for load in loads),
        max(p99s) if len(p99s) == len(loads) else None,
        resident_most,
        cpu / connections,
    )


@contextmanager
def ab(
    port: int, requests: int, clients: int, address: str = HOST
) -> Iterator[subprocess.Popen[str]]:
    """Run ab until the block ends."""
    # -r: go on after an error, to count them. -q: no progress. -B: where it comes from.
    numbers = ("-n", str(requests), "-c", str(clients))
    command = ("ab", "-r", "-q", "-B", address, *numbers, f"http://{HOST}:{port}/")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def report(client: subprocess.Popen[str], requests: int, give_up: float) -> Load:
    """Wait for ab, until a time of `time.monotonic`, and read what it says."""
    try:
        text, _ = client.communicate(timeout=max(0, give_up - time.monotonic()))
    except subprocess.TimeoutExpired:
        return Load(requests, failures=requests)
    load = parse(text, requests)
    if load.failures:
        print(text, file=sys.stderr)
    return load


def parse(text: str, requests: int) -> Load:
    """Read the report of ab about a number of requests."""

    def number(pattern: str) -> float | None:
        found = re.search(pattern, text, re.MULTILINE)
        return float(found[1]) if found else None

    def seconds(percentage: int) -> float | None:
        milliseconds = number(rf"^ +{percentage}% +(\d+)")
        return None if milliseconds is None else milliseconds / 1000

    transferred = number(r"^HTML transferred: +(\d+)")
    if transferred is None:  # It gave up: after a while without an answer, for example.
        completed = number(r"^Total of (\d+) requests completed") or 0
        return Load(requests, requests - int(completed))
    # It takes the first body for the right one.
    if number(r"^Document Length: +(\d+)") != len(BODY):
        return Load(requests, requests)
    # A bad reply may count as more than one failure; one without a body may count as none.
    complaints = (number(r"^Failed requests: +(\d+)"), number(r"^Non-2xx responses: +(\d+)"))
    complained = sum(int(complaint or 0) for complaint in complaints)
    unanswered = requests - int(transferred) // len(BODY)
    if failures := min(requests, max(complained, unanswered)):
        return Load(requests, failures)
    rate = number(r"^Requests per second: +([\d.]+)")
    return Load(requests, 0, rate, seconds(50), seconds(99), seconds(100))


def dropped() -> int:
    """Count what the kernel has dropped, since it started, as an accept queue was full."""
    lines = (line.split() for line in Path("/proc/net/netstat").read_text().splitlines())
    for names, numbers in zip(lines, lines, strict=True):  # a line of names, one of numbers
        if "ListenOverflows" in names:
            return int(numbers[names.index("ListenOverflows")])
    return 0


def resident(pid: int) -> int:
    """Measure the memory of a process and its descendants, in bytes."""
    return PAGE * sum(int(text.split()[1]) for text in proc_files(pid, "statm"))


def cpu_time(pid: int) -> float:
    """Measure the processor time that a process and its descendants have used, in seconds."""
    # The name, in parentheses, may hold spaces; user and system time are the fields 14 and 15.
    after_names = (text.rpartition(")")[2].split() for text in proc_files(pid, "stat"))
    return TICK * sum(int(fields[11]) + int(fields[12]) for fields in after_names)


def descriptors(pid: int) -> int:
    """Count the open files of a process and its descendants."""
    number = 0
    for member in family(pid):
        with suppress(OSError):  # It has ended.
            number += len(os.listdir(f"/proc/{member}/fd"))  # noqa: PTH208 - paths take longer
    return number


def proc_files(pid: int, name: str) -> Iterator[str]:
    """Read a file of /proc about a process and each of its descendants."""
    for member in family(pid):
        with suppress(OSError):  # It has ended.
            yield Path(f"/proc/{member}/{name}").read_text()


def family(pid: int) -> Iterator[int]:
    """Find a process and its descendants: some servers work in a child process."""
    yield pid
    with suppress(OSError):  # It has ended.
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from family(int(child))
