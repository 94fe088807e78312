"""What to measure, the results, and how they are printed: as Markdown."""

import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version

from instructions import CLIENTS as COUNTED_CLIENTS
from measure import CLIENTS, CROWD_LOADS, AtOnce, Crowd, Load, Rate
from servers import FIFTEEN, Kind
from stops import STOP_DELAY, Stop

NOTHING = "–"  # noqa: RUF001 - a dash is what tables have where a number is missing


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        rounds: How often speed and memory are measured.
        delay: Seconds that a server works on each of many connections at once.
        at_once: How many connections at once.
        growth: More such numbers, measured in the first round only, as they need much time.
        requests: Requests to measure the rate with.
        shared: How often per round processes that share a socket are measured. Their times vary
            more than others, as ab and the processes compete for the cores.
        many: Connections at once on several processes.
        stops: How often each server is stopped under load.
        stop_clients: The clients of such a server.
        load_time: Seconds from the first request until such a server receives SIGTERM.
        counted_requests: The small and the large number of requests for the instructions.
        counted_servers: Only the first servers have their instructions counted; None for all.
    """

    rounds: int
    delay: float
    at_once: int
    growth: tuple[int, ...]
    requests: int
    shared: int
    many: int
    stops: int
    stop_clients: int
    load_time: float
    counted_requests: tuple[int, int]
    counted_servers: int | None


FULL = Plan(
    rounds=5,
    delay=4,
    at_once=10_000,
    growth=(1_000, 5_000),
    requests=20_000,
    shared=3,
    many=50_000,
    stops=3,
    stop_clients=200,
    load_time=1.5,
    counted_requests=(300, 1_500),
    counted_servers=None,
)
SMALL = Plan(
    rounds=1,
    delay=0.25,
    at_once=200,
    growth=(),
    requests=1_000,
    shared=1,
    many=400,
    stops=1,
    stop_clients=20,
    load_time=0.3,
    counted_requests=(50, 150),
    counted_servers=1,
)


@dataclass(frozen=True)
class Results:
    """What was measured, by server; by server and number of connections; by processes."""

    stops: dict[str, list[Stop]] = field(default_factory=lambda: defaultdict(list))
    instructions: dict[str, float | None] = field(default_factory=dict)
    rates: dict[str, list[Rate]] = field(default_factory=lambda: defaultdict(list))
    at_once: dict[tuple[str, int], list[AtOnce]] = field(default_factory=lambda: defaultdict(list))
    shared: dict[int, list[Load]] = field(default_factory=lambda: defaultdict(list))
    crowds: dict[str, list[Crowd]] = field(default_factory=lambda: defaultdict(list))


def say(text: str) -> None:
    """Print a line about the progress."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def print_report(kinds: list[Kind], plan: Plan, results: Results, left_out: list[str]) -> None:
    """Print all results as Markdown."""
    go = shutil.which("go")
    go_version = subprocess.check_output((go, "version"), text=True).split()[2] if go else "no Go"
    print(f"{environment()}, {go_version}.\n")
    for sentence in left_out:
        print(f"{sentence}.\n")
    if results.stops:
        print_stops(plan, results)
    if results.instructions:
        print_instructions(plan, results)
    if results.rates or results.at_once:
        print_speed(kinds, plan, results)
    if any(results.at_once.values()):
        print_growth(kinds, plan, results)
    if results.shared:
        print_shared(results)
    if results.crowds:
        print_crowds(plan, results)


def environment() -> str:
    """Return when, and with what, the figures were measured."""
    if "--enable-optimizations" in str(sysconfig.get_config_var("CONFIG_ARGS")):
        build = "built with --enable-optimizations"
    elif sys.base_prefix == "/usr":
        build = "the distribution's own, optimized with profiles"
    else:
        build = "built without --enable-optimizations, so slower than a distribution's"
    return (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()} ({build}), Trio {version('trio')}"
    )


def print_stops(plan: Plan, results: Results) -> None:
    """Print the requests that each server lost when it was stopped, as a table and a chart."""
    print(
        "### Requests lost at a stop\n\n"
        f"Each of {plan.stop_clients} clients sends one request after another. Each request has "
        f"a connection of its own and takes {STOP_DELAY:g} s of work. After {plan.load_time:g} s "
        "the server receives SIGTERM. The clients continue until the port refuses connections. "
        "A request is lost if its connection was established and its reply did not arrive "
        "in full.\n"
    )
    print_row("server", "lost, in each stop", "answered, in all", "seconds until it ended")
    print_row("---", *["---:"] * 3)
    for name, stopped in results.stops.items():
        lost = ", ".join(f"{stop.lost:,}" for stop in stopped)
        answered = sum(stop.answered for stop in stopped)
        seconds = median(stop.seconds for stop in stopped)
        print_row(name, lost, f"{answered:,}", NOTHING if seconds is None else f"{seconds:.1f}")
    medians = [statistics.median(stop.lost for stop in one) for one in results.stops.values()]
    print("\n```mermaid\nxychart-beta horizontal")
    print(f'    title "Requests lost when a server with {plan.stop_clients} clients stops"')
    print("    x-axis [" + ", ".join(f'"{name}"' for name in results.stops) + "]")
    print('    y-axis "requests"')
    print("    bar [" + ", ".join(f"{value:.0f}" for value in medians) + "]\n```\n")


def print_instructions(plan: Plan, results: Results) -> None:
    """Print the instructions per connection."""
    few, many = plan.counted_requests
    print(
        "### Instructions per connection\n\n"
        f"valgrind counts the instructions in user space of {few:,} and of {many:,} requests from "
        f"{COUNTED_CLIENTS} clients, without work. The table shows the difference divided by "
        f"{many - few:,}. The ratio to the {FIFTEEN.name} is in parentheses.\n"
    )
    print_row("server", "thousands of instructions")
    print_row("---", "---:")
    base = results.instructions.get(FIFTEEN.name)
    for name, number in results.instructions.items():
        print_row(name, cell(scale(number, 1e-3)) + ratio(number, base))
    print()


def print_speed(kinds: list[Kind], plan: Plan, results: Results) -> None:
    """Print the table of speed and memory."""
    print(
        "### Speed and memory\n\n"
        f"The table shows medians of {plan.rounds} rounds. The servers share the cores with ab. "
        f"The ratio to the {FIFTEEN.name} is in parentheses.\n\n"
        f"- p50, p99, max, KB: {plan.at_once:,} connections at once, {plan.delay:g} s of work "
        "each. 99 of 100 requests take less than p99, and half take less than p50. The times "
        "exclude the work. KB is the memory per connection.\n"
        "- Queue full: how often the kernel ignored one of these clients, because the accept "
        "queue was full. The client tries again a second later.\n"
        f"- Requests/s and CPU: {plan.requests:,} requests, {CLIENTS} at once, without work. "
        "The C floor is what the kernel alone costs.\n"
    )
    measured = ("p50 ms", "p99 ms", "max ms", "KB", "requests/s", "CPU µs")
    print_row("server", *measured, "failed", "queue full")
    print_row("---", *["---:"] * 8)
    fifteen = summary(FIFTEEN.name, plan, results)
    for kind in kinds:
        at_once, rates = results.at_once[kind.name, plan.at_once], results.rates[kind.name]
        loads = [*(one.load for one in at_once), *(one.load for one in rates)]
        if not loads:
            continue
        failures = sum(load.failures for load in loads)
        of_all = f"{failures:,} of {sum(load.requests for load in loads):,}" if failures else "0"
        cells = [
            cell(value) + ratio(value, of_fifteen)
            for value, of_fifteen in zip(summary(kind.name, plan, results), fifteen, strict=True)
        ]
        drops = cell(median(one.dropped for one in at_once))
        print_row(kind.name, *cells, of_all, drops)
    print()


def summary(name: str, plan: Plan, results: Results) -> list[float | None]:
    """Return the medians of a server, in the units and the order of the table."""
    at_once, rates = results.at_once[name, plan.at_once], results.rates[name]
    return [
        median(beyond(one.load.p50, plan) for one in at_once),
        median(beyond(one.load.p99, plan) for one in at_once),
        median(beyond(one.load.longest, plan) for one in at_once),
        median(scale(one.memory, 1 / 1024) for one in at_once),
        median(one.load.rate for one in rates),
        median(scale(one.cpu, 1e6) for one in rates),
    ]


def print_growth(kinds: list[Kind], plan: Plan, results: Results) -> None:
    """Print how the p99 grows with the number of connections."""
    sizes = sorted((plan.at_once, *plan.growth))
    print(
        "### The p99 by number of connections\n\n"
        f"The times are in milliseconds and exclude the {plan.delay:g} s of work. The column for "
        f"{plan.at_once:,} is the median of all rounds, and the others are from one round.\n"
    )
    print_row("connections at once", *(f"{size:,}" for size in sizes))
    print_row("---", *["---:"] * len(sizes))
    for kind in kinds:
        if results.at_once[kind.name, plan.at_once]:
            loads = ((one.load for one in results.at_once[kind.name, size]) for size in sizes)
            p99s = (median(beyond(load.p99, plan) for load in of_size) for of_size in loads)
            print_row(kind.name, *map(cell, p99s))
    print()


def print_shared(results: Results) -> None:
    """Print the rates of one process and of two that share a socket."""
    one, two = (median(load.rate for load in results.shared[number]) for number in (1, 2))
    print(
        "### Several processes\n\n"
        f"On one inherited socket, one process of trio_server answers {cell(one)} requests per "
        f"second, and two answer {cell(two)}{ratio(two, one)}.\n"
    )


def print_crowds(plan: Plan, results: Results) -> None:
    """Print the results of several processes that share a socket."""
    print(
        f"Four processes share a socket and get {plan.many:,} connections at once. The "
        f"{CROWD_LOADS} ab use most of the processor.\n"
    )
    print_row("four processes", "p99 ms", "MB in all", "CPU µs", "failed")
    print_row("---", *["---:"] * 4)
    for name, crowds in results.crowds.items():
        p99 = median(beyond(one.p99, plan) for one in crowds)
        memory = median(one.memory / 1e6 for one in crowds)
        cpu = median(1e6 * one.cpu for one in crowds)
        failed = sum(one.failures for one in crowds)
        print_row(name, cell(p99), cell(memory), cell(cpu), f"{failed:,}")
    print()


def print_row(*cells: str) -> None:
    """Print a row of a Markdown table."""
    print("|", " | ".join(cells), "|")


def median(values: Iterable[float | None]) -> float | None:
    """Return the median; None if there are no values, or if one was not measured."""
    numbers = []
    for value in values:
        if value is None:
            return None
        numbers.append(value)
    return statistics.median(numbers) if numbers else None


def beyond(seconds: float | None, plan: Plan) -> float | None:
    """Convert the duration of a request to milliseconds beyond its work."""
    return None if seconds is None else 1000 * (seconds - plan.delay)


def scale(value: float | None, factor: float) -> float | None:
    """Convert a value, if there is one, to another unit."""
    return None if value is None else value * factor


def cell(value: float | None) -> str:
    """Format a value."""
    if value is None:
        return NOTHING
    return f"{value:,.1f}" if 0 < abs(value) < 100 else f"{value:,.0f}"


def ratio(value: float | None, base: float | None) -> str:
    """Format the ratio to a base, which follows the value."""
    if value is None:
        return ""
    return f" ({value / base:.2f})" if base else f" ({NOTHING})"
