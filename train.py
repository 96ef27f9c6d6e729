"""Trains one network: python train.py --config=configs/NAME.py --workdir=DIR.

Any key of the config can be set on the command line (--config.model.depth=56). The same
line again goes on where the run stopped. For the exit codes see cvjax/cli.py.

All devices of the machine are used. Several processes, on one machine or many, join by
themselves under SLURM (srun) and Open MPI (mpirun); elsewhere each is given
--coordinator_address, --process_count and --process_index.
"""

import cvjax  # noqa: F401  (Ctrl-C while the rest is imported)

# isort: split
from absl import flags

from cvjax import command_line

CONFIG = command_line.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder: new, or to be resumed.")
COORDINATOR = flags.DEFINE_string(
    "coordinator_address",
    "",
    "With several processes, HOST:PORT of the first; 'auto' asks the cluster (Cloud TPU).",
)
PROCESSES = flags.DEFINE_integer("process_count", 0, "The number of processes.")
PROCESS = flags.DEFINE_integer("process_index", -1, "Which one this is, from 0.")
PROFILE = flags.DEFINE_string(
    "profile",
    "",
    "START:COUNT of steps to trace into DIR/profile, for ui.perfetto.dev or TensorBoard.",
)


def main(arguments):
    # Imported here: the workers of a stream import this file too, and need no JAX.
    from cvjax import cli
    from cvjax.training import devices, profiling, train_and_evaluate

    cli.refuse_arguments(arguments)
    traced = profiling.parse_steps(PROFILE.value)
    devices.connect(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    train_and_evaluate(CONFIG.value, WORKDIR.value, traced)


if __name__ == "__main__":
    from cvjax import cli

    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
