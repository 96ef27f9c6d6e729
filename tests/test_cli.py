"""What a program calls itself, in messages and in the record of a run."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SHOW = "from cvjax import cli\nprint(cli.command_name())\n"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["room/script.py"], "script.py"),
        (["-m", "room.script"], "python -m room.script"),
        (["-m", "room"], "python -m room"),
    ],
)
def test_a_module_is_called_by_its_name(arguments, name, tmp_path):
    room = tmp_path / "room"
    room.mkdir()
    for file in ("__init__.py", "__main__.py", "script.py"):
        (room / file).write_text("" if file == "__init__.py" else SHOW)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{name}\n", done.stderr
