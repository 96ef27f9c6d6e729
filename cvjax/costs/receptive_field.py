"""What of the images an array sees, operation by operation.

Position i of a map sees the pixels i * jump + low ... i * jump + high; its receptive field
is high - low + 1. With both ends kept, and not only their difference, the union of several
paths is exact also where they are shifted against each other.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Span:
    """What the positions of a map see along the height or the width of the images.

    Attributes:
      low, high: ends of what position 0 sees; padding lies outside of the image.
      jump: pixels between what two neighbours see.
      axis: of the array; None once the map has become a vector.
    """

    low: int
    high: int
    jump: int
    axis: int | None

    @property
    def field(self) -> int:
        return int(self.high - self.low + 1)  # padding may be NumPy's integers

    def slide(self, size: int, stride: int, before: int, dilation: int = 1) -> "Span":
        """After a window over the map, with `before` rows of padding in front of it."""
        return dataclasses.replace(
            self,
            low=self.low - before * self.jump,
            high=self.high + ((size - 1) * dilation - before) * self.jump,
            jump=self.jump * stride,
        )

    def gather(self, size: int) -> "Span":
        """After all `size` positions of the map have been made one vector."""
        return dataclasses.replace(self, high=self.high + (size - 1) * self.jump, axis=None)


Spans = tuple[Span, ...]


def field_and_jump(spans: Spans) -> tuple[int | None, int | None]:
    """Of the larger side; the jump is None where the map has ended, both where none was."""
    jumps = [span.jump for span in spans if span.axis is not None]
    field = max((span.field for span in spans), default=None)
    return field, max(jumps, default=None)


def output_spans(equation, inputs: Sequence[Spans]) -> Spans:
    """The spans of an equation's output, from those of its inputs.

    Where several inputs have been made from the images, it is their union, but of those
    only that are still maps: a statistic or a gate that multiplies a map is left out.
    """
    found = [
        tuple(_move(equation, span, var.aval.shape) for span in spans)
        for var, spans in zip(equation.invars, inputs, strict=True)
        if spans
    ]
    most = max((_count_maps(spans) for spans in found), default=0)
    groups = zip(*(spans for spans in found if _count_maps(spans) == most), strict=True)
    return tuple(
        dataclasses.replace(
            group[0],
            low=min(span.low for span in group),
            high=max(span.high for span in group),
            jump=max(span.jump for span in group),
        )
        for group in groups
    )


def _count_maps(spans: Spans) -> int:
    return sum(span.axis is not None for span in spans)


def _move(equation, span: Span, shape: tuple[int, ...]) -> Span:
    name, params, axis = equation.primitive.name, equation.params, span.axis
    out = equation.outvars[0].aval.shape
    if axis is None:
        return span
    if name == "convolution":  # of nn/conv.py, its kernel is HWIO
        kernel, i = equation.invars[1].aval.shape, axis - 1
        stride, (before, _) = params["strides"][i], params["padding"][i]
        return span.slide(kernel[i], stride, before)
    if name == "conv_general_dilated":
        lhs, rhs, _ = params["dimension_numbers"]
        i = lhs[2:].index(axis)
        size = equation.invars[1].aval.shape[rhs[2 + i]]
        stride, dilation = params["window_strides"][i], params["rhs_dilation"][i]
        return span.slide(size, stride, params["padding"][i][0], dilation)
    if name.startswith("reduce_window"):
        size, stride = params["window_dimensions"][axis], params["window_strides"][axis]
        dilation = params["window_dilation"][axis]
        return span.slide(size, stride, params["padding"][axis][0], dilation)
    if name == "slice":
        stride = 1 if params["strides"] is None else params["strides"][axis]
        return span.slide(1, stride, -params["start_indices"][axis])
    if name == "pad":
        return span.slide(1, 1, params["padding_config"][axis][0])
    if name == "transpose":
        return dataclasses.replace(span, axis=params["permutation"].index(axis))
    if name == "broadcast_in_dim":
        new = params["broadcast_dimensions"][axis]
        stays = out[new] == shape[axis]
        return dataclasses.replace(span, axis=new) if stays else span.gather(1)
    if name.startswith("reduce_") and "axes" in params:
        if axis in params["axes"]:
            return span.gather(shape[axis])
        before = sum(reduced < axis for reduced in params["axes"])
        return dataclasses.replace(span, axis=axis - before)
    # Elementwise, or a change of shape: the map stays if its side is found in its place.
    stays = axis < len(out) and out[axis] == shape[axis]
    return span if stays else span.gather(shape[axis])
