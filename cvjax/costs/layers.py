"""A row of an account; see `accounting` for what is counted."""

import dataclasses

COUNTED_IN_PLACE = ("input", "conv", "pool", "dense", "matmul")


@dataclasses.dataclass
class Layer:
    """A row of the table; the module docstring says what is counted.

    Attributes:
      name: path of the module, blocks of a stacked stage numbered from 1.
      kind: "input", "conv", "norm", "pool", "dense", "matmul", "weights" or "unused".
      output: shape for one image.
      values, kept: activations, in place and stored.
      itemsize: bytes of a value.
      parameters, macs: of this layer.
      field, jump: receptive field and its step; None where there is no map.
      reads_images: whether the input is the network's input.
    """

    name: str
    kind: str
    output: tuple[int, ...]
    values: int = 0
    kept: int = 0
    itemsize: int = 4
    parameters: int = 0
    macs: int = 0
    field: int | None = None
    jump: int | None = None
    reads_images: bool = False

    @property
    def bytes(self) -> int:
        return self.values * self.itemsize
