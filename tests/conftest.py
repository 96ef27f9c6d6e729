"""Settings for all tests: CPU, strict promotion, a compilation cache that persists."""

import importlib.metadata
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import types

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# All compiled programs are kept, however small: most of the time went to compiling
# thousands of them again. The processes that tests start keep theirs there too.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get(
    "CVJAX_TEST_CACHE", f"{tempfile.gettempdir()}/cvjax-test-xla"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# A third of the tests' time would go to XLA's optimisations, and to emitters of fusions
# that JAX 0.12 cannot leave out. There programs are compiled as users have them, and here
# with XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true".
if importlib.metadata.version("jaxlib").startswith("0.10."):
    quick = (
        "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
        "--xla_cpu_parallel_codegen_split_count=1"  # which alone saves an eighth
    )
    os.environ["XLA_FLAGS"] = f"{quick} {os.environ.get('XLA_FLAGS', '')}"
# A shell has SIGINT ignored in what it starts in the background, and so in all processes
# that these tests start and stop.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# As cvjax sets it; but a test may import diffrax first.
os.environ.setdefault("EQX_ON_ERROR", "nan")

import jax
import numpy as np
import pytest

from cvjax.errors import InterruptedRun
from cvjax.storage import checkpoint
from cvjax.training import train_and_evaluate, trainer
from cvjax.training.trained_network import load_network

jax.config.update("jax_numpy_rank_promotion", "raise")
ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="session")
def tfds_dir() -> pathlib.Path:
    """The folder of prepared TFDS data sets; without one the test is skipped."""
    folder = os.environ.get("TFDS_DATA_DIR")
    if not folder or not pathlib.Path(folder).is_dir():
        pytest.skip("needs real data: set TFDS_DATA_DIR to prepared TFDS data sets")
    return pathlib.Path(folder).resolve()


@pytest.fixture(scope="session")
def call_program():
    """Runs a command line in a process that need not import everything again.

    `call_program("-m", "cvjax.predict", "x.png")` has the `returncode`, `stdout` and
    `stderr` that `subprocess.run` gives; what takes too long is killed (-SIGALRM). It runs
    in the repository if `cwd` is not given.
    """
    server = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "program_server.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def call(*arguments, cwd=ROOT, seconds=100):
        arguments = [str(argument) for argument in arguments]
        job = {"arguments": arguments, "folder": str(cwd), "seconds": seconds}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f"the server of programs has ended: {server.wait()}"
        return types.SimpleNamespace(**json.loads(answer))

    yield call
    server.kill()
    server.communicate()


@pytest.fixture(scope="session", autouse=True)
def no_curves():
    """Runs in this process leave out their figure; those of the command line have it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "draw_curves", lambda *_: None)
        yield


@pytest.fixture
def interrupt_once(monkeypatch):
    """Call it with a step: a run that saves this step before others is interrupted."""
    real, saved = checkpoint.save, []

    def interrupt(at: int) -> None:
        def save(root, step, *others):
            real(root, step, *others)
            saved.append(step)
            if saved == [at]:
                raise InterruptedRun("here")

        monkeypatch.setattr(checkpoint, "save", save)

    return interrupt


@pytest.fixture
def check_resumed(tmp_path, interrupt_once):
    """Stops a run at a step, goes on, and compares it with one that was never stopped."""

    def check(config, folder, summary, step: int) -> None:
        interrupt_once(step)
        with pytest.raises(InterruptedRun):
            train_and_evaluate(config, tmp_path)
        assert train_and_evaluate(config, tmp_path) == summary
        ours, theirs = (load_network(path).variables for path in (folder, tmp_path))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)

    return check
