"""What is to be measured, what was, and how it is shown: as Markdown."""

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

from measure import CLIENTS, CROWD_LOADS, Crowd, Held, Load, Rate
from servers import FIFTEEN, Kind

NOTHING = "–"  # noqa: RUF001 - a dash is what tables have where a number is missing


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        rounds: How often.
        delay: Seconds that a server works on each held connection.
        held: Connections held at once.
        growth: More numbers of them, measured in the first round only: they take long.
        requests: Requests to measure the rate with.
        shared: How often in a round to measure processes that share a socket, as these times
            vary more than others: ab and both processes compete for the cores.
        many: Connections at once on several processes.
    """

    rounds: int
    delay: float
    held: int
    growth: tuple[int, ...]
    requests: int
    shared: int
    many: int


FULL = Plan(
    rounds=3,
    delay=4,
    held=10_000,
    growth=(1_000, 5_000),
    requests=20_000,
    shared=3,
    many=50_000,
)
SMALL = Plan(rounds=1, delay=0.5, held=200, growth=(50,), requests=1_000, shared=1, many=400)


@dataclass(frozen=True)
class Results:
    """What was measured: by server and size, by server, by processes, by server."""

    held: dict[tuple[str, int], list[Held]] = field(default_factory=lambda: defaultdict(list))
    rates: dict[str, list[Rate]] = field(default_factory=lambda: defaultdict(list))
    shared: dict[int, list[Load]] = field(default_factory=lambda: defaultdict(list))
    crowds: dict[str, list[Crowd]] = field(default_factory=lambda: defaultdict(list))


def say(text: str) -> None:
    """Tell about the progress."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def print_report(kinds: list[Kind], plan: Plan, results: Results, left_out: list[str]) -> None:
    """Print all of it as Markdown."""
    print(
        f"Medians, rounds: {plan.rounds}, on {os.cpu_count()} cores that the servers share with "
        f"ab. Held: {plan.held:,} connections at once, {plan.delay:g} s of work each; times are "
        f"beyond these {plan.delay:g} s. Rate: no work, {CLIENTS} at once, {plan.requests:,} "
        f"requests. In parentheses: the ratio to {FIFTEEN.name}. Queue full: how often the "
        "kernel let a client of the held ones wait a second, as the accept queue was full.\n"
    )
    print_servers(kinds, plan, results)
    print_growth(kinds, plan, results)
    print_chart(kinds, plan, results)
    one, two = (median(load.rate for load in results.shared[number]) for number in (1, 2))
    print(f"trio_server on one inherited socket: one process {cell(one)} requests/s,", end=" ")
    print(f"two processes {cell(two)} requests/s{ratio(two, one)}.\n")
    print_crowds(plan, results)
    for sentence in left_out:
        print(f"{sentence}.\n")
    go = shutil.which("go")
    go_version = subprocess.check_output((go, "version"), text=True).split()[2] if go else "no Go"
    print(f"{environment()}, {go_version}")


def environment() -> str:
    """Say when and with what it was measured."""
    if "--enable-optimizations" in str(sysconfig.get_config_var("CONFIG_ARGS")):
        build = "built with --enable-optimizations"
    elif sys.base_prefix == "/usr":
        build = "the distribution's own, which is optimized by profiles"
    else:
        build = "built without --enable-optimizations, so slower than a distribution's"
    return (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()} ({build}), Trio {version('trio')}"
    )


def print_servers(kinds: list[Kind], plan: Plan, results: Results) -> None:
    """Print the table of everything but the growth."""
    measured = ("p50 ms", "p99 ms", "max ms", "KB each", "requests/s", "CPU µs")
    print_row("server", *measured, "failed", "queue full")
    print_row("---", *["---:"] * 8)
    fifteen = summary(FIFTEEN.name, plan, results)
    for kind in kinds:
        held, rates = results.held[kind.name, plan.held], results.rates[kind.name]
        loads = [*(one.load for one in held), *(one.load for one in rates)]
        failures = sum(load.failures for load in loads)
        of_all = f"{failures:,} of {sum(load.requests for load in loads):,}" if failures else "0"
        cells = [
            cell(value) + ratio(value, of_fifteen)
            for value, of_fifteen in zip(summary(kind.name, plan, results), fifteen, strict=True)
        ]
        drops = cell(median(one.dropped for one in held))
        print_row(kind.name, *cells, of_all, drops)
    print()


def summary(name: str, plan: Plan, results: Results) -> list[float | None]:
    """Compute the medians of a server, in the units and the order of the table."""
    held, rates = results.held[name, plan.held], results.rates[name]
    return [
        median(beyond(one.load.p50, plan) for one in held),
        median(beyond(one.load.p99, plan) for one in held),
        median(beyond(one.load.longest, plan) for one in held),
        median(scale(one.memory, 1 / 1024) for one in held),
        median(one.load.rate for one in rates),
        median(scale(one.cpu, 1e6) for one in rates),
    ]


def print_growth(kinds: list[Kind], plan: Plan, results: Results) -> None:
    """Print how the p99 beyond the delay grows with the number of connections."""
    sizes = sorted((plan.held, *plan.growth))
    print(f"p99 in ms beyond the {plan.delay:g} s; the sizes other than {plan.held:,}: one run.\n")
    print_row("connections at once", *(f"{size:,}" for size in sizes))
    print_row("---", *["---:"] * len(sizes))
    for kind in kinds:
        if kind.sleeps:
            print_row(kind.name, *(cell(p99(kind.name, size, plan, results)) for size in sizes))
    print()


def p99(name: str, size: int, plan: Plan, results: Results) -> float | None:
    """Compute the median p99 of a server, in milliseconds beyond the delay."""
    return median(beyond(one.load.p99, plan) for one in results.held[name, size])


def print_chart(kinds: list[Kind], plan: Plan, results: Results) -> None:
    """Print the p99 as a bar for each server that failed no request."""
    bars = {kind.name: p99(kind.name, plan.held, plan, results) for kind in kinds}
    shown = {name: value for name, value in bars.items() if value is not None}
    print("```mermaid\nxychart-beta")
    print(f'    title "p99 beyond the {plan.delay:g} s, {plan.held:,} connections at once"')
    print("    x-axis [" + ", ".join(f'"{name}"' for name in shown) + "]")
    print('    y-axis "ms"')
    print("    bar [" + ", ".join(f"{value:.0f}" for value in shown.values()) + "]\n```\n")


def print_crowds(plan: Plan, results: Results) -> None:
    """Print what several processes did that share a socket."""
    print(
        f"Many: {plan.many:,} connections at once on four processes that share a socket, from "
        f"{CROWD_LOADS} ab, which take most of the processor themselves.\n"
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
    """Compute the median; None if there is nothing, or something that was not measured."""
    numbers = []
    for value in values:
        if value is None:
            return None
        numbers.append(value)
    return statistics.median(numbers) if numbers else None


def beyond(seconds: float | None, plan: Plan) -> float | None:
    """Turn the duration of a request into milliseconds beyond its work."""
    return None if seconds is None else 1000 * (seconds - plan.delay)


def scale(value: float | None, factor: float) -> float | None:
    """Turn a value, if there is one, into another unit."""
    return None if value is None else value * factor


def cell(value: float | None) -> str:
    """Write a value."""
    if value is None:
        return NOTHING
    return f"{value:,.1f}" if 0 < abs(value) < 100 else f"{value:,.0f}"


def ratio(value: float | None, base: float | None) -> str:
    """Write the ratio to a base, to follow the value."""
    if value is None:
        return ""
    return f" ({value / base:.2f})" if base else f" ({NOTHING})"
