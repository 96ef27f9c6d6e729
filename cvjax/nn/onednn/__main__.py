"""Builds the CPU kernels ahead of their first use, and says which ones will run."""

from cvjax import cli
from cvjax.nn import onednn


def main(arguments):
    cli.refuse_arguments(arguments)
    print(f"Convolutions on this CPU: {onednn.kernels()}.")


if __name__ == "__main__":
    cli.run(main)
