"""Checks of model fields, each with a sentence for the user."""

import difflib
from collections.abc import Sequence
from typing import Any, get_args, get_origin

from cvjax.errors import UserError


def check_positive(**values: int | Sequence[int]) -> None:
    """Raises UserError for a width, depth or count below 1, naming it."""
    for name, value in values.items():
        numbers = value if isinstance(value, Sequence) else (value,)
        if any(number < 1 for number in numbers):
            raise UserError(f"{name} must be 1 or more, got {value}.")


def as_type(name: str, value: Any, wanted: Any) -> Any:
    """The value as what its field is declared to be: a simple type, or a tuple of such.

    Lists are taken for tuples and whole numbers for floats.

    Raises:
      UserError: for a value of another type, naming it.
    """
    if get_origin(wanted) is tuple:
        element = get_args(wanted)[0]
        kinds = get_args(element) or (element,)
        if isinstance(value, list | tuple) and all(type(item) in kinds for item in value):
            return tuple(value)
        what = f"several values of type {' or '.join(kind.__name__ for kind in kinds)}"
    else:
        if wanted is float and type(value) is int:
            return float(value)
        if type(value) is wanted:
            return value
        what = f"a value of type {wanted.__name__}"
    raise UserError(f"{name} takes {what}, got {value!r}.")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises UserError for a value that is not among the choices, naming the nearest."""
    if value in choices:
        return
    closest = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {closest[0]!r}?" if closest else "."
    raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}{hint}")
