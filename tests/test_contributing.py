"""The experiment that CONTRIBUTING.md shows is complete, short, and runs."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments import runner

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_the_experiment_runs(tmp_path):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (program,) = [part[7:] for part in text.split("```") if part.startswith("python\n")]
    assert len(program.splitlines()) <= 80
    (tmp_path / "widths.py").write_text(program)
    flags = [f"--workdir={tmp_path / 'runs'}", "--seeds=1", "--steps=4"]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "widths.py"), *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert results.keys() == set(runner.RESULTS)
    assert [row["width"] for row in results["table"]] == [1, 4, 16]
    assert [claim["n"] for claim in results["claims"]] == [[1, 1]]
    assert "training error, 16 less 1 hidden units, in points: " in done.stdout
    assert (tmp_path / "runs" / "widths.png").stat().st_size > 5_000
