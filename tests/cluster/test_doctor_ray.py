"""`moray doctor --address`: the node of a server's Ray, with the command in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import ray

import moray
from moray.cluster.run_state import RunState

from .serve_process import Serve

pytestmark = pytest.mark.ray

DOCTOR_S = 150.0
"""It takes eight seconds on two idle cores."""

DEPLOYMENT = "{model: tiny-r1, device: cpu, experts: {hosts: 200, resources: {moray_expert: 1}}}"


def test_the_node_of_a_server(shm_server: Serve, tmp_path: Path) -> None:
    (record,) = RunState(shm_server.runtime / "moray").records()
    file = tmp_path / "deployment.yaml"
    file.write_text(DEPLOYMENT)
    command = [sys.executable, "-m", "moray.cluster.cli", "doctor", "--address", record.ray_address]
    ended = subprocess.run(
        [*command, "--json", "--config", str(file)],
        env=shm_server.environment,
        capture_output=True,
        text=True,
        timeout=DOCTOR_S,
        check=False,
    )
    assert ended.stdout, ended.stderr
    report = json.loads(ended.stdout)
    (facts,) = report["nodes"]
    assert facts["node"] == record.ray_address.rpartition(":")[0]
    assert facts["versions"]["moray"] == moray.__version__
    assert facts["versions"]["ray"] == ray.__version__
    assert facts["network"]["address"] == facts["node"]
    assert facts["model"]["problem"] == ""
    assert {("access", "ok")} <= {(finding["check"], finding["level"]) for finding in report["findings"]}
    assert {"deployment", "plan"} <= {finding["check"] for finding in report["findings"]}
    assert not {"answers", "links", "clock"} & {finding["check"] for finding in report["findings"]}
    missing = [finding["what"] for finding in report["findings"] if finding["level"] == "fail"]
    assert any("201 CPUs, there are" in what for what in missing), missing
    assert any("200 of the resource 'moray_expert', the nodes offer 0" in what for what in missing), missing
    assert (ended.returncode, report["failed"]) == (1, True)
