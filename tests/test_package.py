import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import trio

import trio_server

PACKAGE = Path(trio_server.__file__).parent
MODULES = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}


def run(program: str) -> str:
    return subprocess.check_output([sys.executable, "-c", program], text=True)


def test_every_public_name_is_there_and_no_other() -> None:
    for name in trio_server.__all__:
        assert getattr(trio_server, name) is not None
    names = {name for name in dir(trio_server) if not name.startswith("_")}
    assert names - MODULES == set(trio_server.__all__)


@pytest.mark.parametrize("module", ["trio_server", "trio_server.__main__"])
def test_importing_changes_nothing_in_the_process(module: str) -> None:
    program = """
import gc, logging, os, resource, signal, sys, threading
import {0}

def state():
    return (
        [signal.getsignal(number) for number in signal.valid_signals()],
        signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        resource.getrlimit(resource.RLIMIT_NOFILE),
        gc.get_threshold(), gc.get_freeze_count(), gc.isenabled(),
        logging.root.handlers, logging.root.level, logging.raiseExceptions,
        logging.getLogger("trio_server").handlers, dict(os.environ),
        threading.active_count(),
    )

before = state()
import {1}
print(state() == before)
"""
    assert run(program.format("trio, argparse", module)) == "True\n"


def test_help_knows_the_public_names_and_what_they_need() -> None:
    text = run("import pydoc, trio_server; print(pydoc.plain(pydoc.render_doc(trio_server)))")
    for shown in (
        "class Outcome(",
        "class Shutdown(",
        "class Connections(",
        "serve_connection(",
        "serve_tcp(",
        "serve_listeners(",
        "hello_world(",
        "with shutdown.move_on_after(30) as idle:",
        "begin(self, grace_period",
    ):
        assert shown in text, shown


@pytest.mark.parametrize("name", ["serve_tcp", "serve_listeners"])
def test_they_take_what_trio_takes_and_a_shutdown(name: str) -> None:
    def parameters(function: object) -> list[str]:
        return list(inspect.signature(function).parameters)  # type: ignore[arg-type]

    theirs = parameters(getattr(trio, name))
    ours = parameters(getattr(trio_server, name))
    theirs[theirs.index("handler_nursery")] = "shutdown"
    assert ours == theirs


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.walk(ast.parse(path.read_text()))
    return [node for node in tree if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_the_package_is_small() -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in PACKAGE.glob("*.py")}
    core = ("responder.py", "connection.py", "shutdown.py", "server.py")
    assert sum(lines[name] for name in core) < 450
    assert sum(lines.values()) < 1600
    assert lines["watch.py"] < 120
    long = {
        function.name
        for path in PACKAGE.glob("*.py")
        for function in functions(path)
        if (function.end_lineno or 0) - function.lineno >= 45
    }
    assert long <= {"parse_arguments"}  # which lists the options
