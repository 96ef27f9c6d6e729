"""Checks of model fields, each with a sentence for the user."""

import difflib
from collections.abc import Sequence

from cvjax.errors import UserError


def check_positive(**values: int | Sequence[int]) -> None:
    """Raises UserError for a width, depth or count below 1, naming it."""
    for name, value in values.items():
        numbers = value if isinstance(value, Sequence) else (value,)
        if any(number < 1 for number in numbers):
            raise UserError(f"{name} must be 1 or more, got {value}.")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises UserError for a value that is not among the choices, naming the nearest."""
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}{hint}")
