"""Builds the CPU kernels ahead of their first use, and says which ones will run."""

from absl import logging

from cvjax.nn import onednn

logging.set_verbosity(logging.INFO)
print(f"Convolutions on this CPU: {onednn.kernels()}.")
