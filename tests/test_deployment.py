"""The files of `deployment`: they are valid, and a restart behind them loses no request."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from process import tool

FOLDER = Path(__file__).with_name("deployment")
UNITS = ("trio-server.socket", "trio-server@.service")


def test_a_restart_behind_each_load_balancer_loses_no_request() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a network")
    for name in ("ip", "haproxy", "nginx"):
        tool(name)
    command = [sys.executable, str(FOLDER / "try_balancer.py"), "--delay", "0.1"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=50)
    assert result.returncode == 0, result.stdout + result.stderr
    requests = re.findall(r"(\d+) requests, 0 lost", result.stdout)
    assert len(requests) == 3
    assert min(map(int, requests)) > 200


def test_systemd_accepts_the_units_without_a_warning(tmp_path: Path) -> None:
    # A folder that looks like a machine on which the server is installed.
    shutil.copytree("/usr/lib/systemd/system", tmp_path / "usr/lib/systemd/system", symlinks=True)
    program = tmp_path / "opt/trio_server/.venv/bin/trio-server"
    program.parent.mkdir(parents=True)
    shutil.copy("/bin/true", program)
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    for name in UNITS:
        shutil.copy(FOLDER / name, units)
    verify = [tool("systemd-analyze"), "verify", "--man=no", f"--root={tmp_path}"]
    command = [*verify, "trio-server.socket", "trio-server@1.service", "trio-server@2.service"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


def number(name: str, pattern: str) -> int:
    """Return a number of a file."""
    found = re.search(pattern, (FOLDER / name).read_text())
    assert found, pattern
    return int(found[1])


def test_no_process_manager_kills_before_the_grace_period_is_over() -> None:
    grace_period = number("trio-server@.service", r"--grace-period (\d+)")
    assert number("trio-server@.service", r"TimeoutStopSec=(\d+)") > grace_period
    assert number("Dockerfile", r"--stop-timeout (\d+)") > 30  # the default

    grace_period = number("kubernetes.yaml", r'"--grace-period", "(\d+)"')
    pause = number("kubernetes.yaml", r"sleep: {seconds: (\d+)}")
    longest = number("kubernetes.yaml", r"terminationGracePeriodSeconds: (\d+)")
    assert longest > pause + grace_period


def test_the_kubernetes_file_has_all_that_a_rollout_without_loss_needs() -> None:
    documents = (FOLDER / "kubernetes.yaml").read_text().split("---\n")
    kinds = [
        match[1] for text in documents if (match := re.search(r"^kind: (\w+)", text, re.MULTILINE))
    ]
    assert kinds == ["Deployment", "Service", "PodDisruptionBudget"]
    for document in documents:
        assert "app: trio-server" in document  # the label by which they find each other
    for needed in (
        "maxUnavailable: 0",
        "readinessProbe:",
        "runAsNonRoot: true",
        "readOnlyRootFilesystem: true",
        "capabilities: {drop: [ALL]}",
        "limits: {memory:",
    ):
        assert needed in documents[0], needed
