"""BatchNorm as the networks use it."""

from functools import partial

from flax import linen as nn

from cvjax.nn.conv import DTYPES
from cvjax.nn.norm import BatchNorm


def batch_norm(net: nn.Module, train: bool, epsilon: float = 1e-5) -> partial[BatchNorm]:
    """Makes the BatchNorms of a network, called with `name`.

    Args:
      net: its fields `norm_momentum`, `norm_group` and `dtype` are used.
      train: whether the statistics are those of the batch.
      epsilon: added to the variance.
    """
    return partial(
        BatchNorm,
        use_running_average=not train,
        momentum=net.norm_momentum,
        group=net.norm_group,
        epsilon=epsilon,
        dtype=DTYPES[net.dtype],
    )
