"""The package's error, and checks of settings, which raise it or return the setting."""

import re
from collections.abc import Iterable
from math import inf
from numbers import Integral, Real
from sys import float_info
from typing import Any, Optional, Union

Names = Union[str, Iterable[str]]


class PaceError(ValueError):
    """A wrong argument, or a device that cannot be used. `status` is the library's name of the error."""

    def __init__(self, message: str, status: str = "PACE_ERROR_ARGUMENT"):
        super().__init__(message)
        self.status = status

    def __reduce__(self):
        return PaceError, (str(self), self.status)


def check_number(name: str, value: Any, low: float = -inf, high: float = inf) -> float:
    """A setting that has to be a finite number from `low` to `high`; a bool is none."""
    return float(_in_range(name, value, low, high, Real, "a finite number"))


def check_integer(name: str, value: Any, low: int, high: float = inf) -> int:
    """A setting that has to be an integer from `low` to `high`; a bool is none."""
    return int(_in_range(name, value, low, high, Integral, "an integer"))


def _in_range(name: str, value: Any, low: float, high: float, kind: type, expected: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, kind) or not (low <= value <= high and abs(value) <= float_info.max):
        allowed = f" from {low} to {high}" if high < inf else f" of at least {low}" if low > -inf else ""
        raise PaceError(f"`{name}` is {value!r}, expected {expected}{allowed}")
    return value


def check_choice(name: str, value: Any, choices: tuple) -> Any:
    """A setting that has to be one of `choices`."""
    try:
        # By hash: comparing a tensor gives another tensor.
        if value in frozenset(choices):
            return value
    except TypeError:
        pass
    raise PaceError(f"`{name}` is {value!r}, expected one of {', '.join(map(str, choices))}")


def check_names(name: str, value: Any) -> Optional[Names]:
    """A setting that has to be None, a regular expression or a list of names."""
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise PaceError(f"`{name}` is {value!r}, which is no regular expression ({error}): to give names, give a list") from error
    elif value is not None:
        value = list(value) if isinstance(value, Iterable) else [value]
        if not all(isinstance(item, str) for item in value):
            raise PaceError(f"`{name}` is {value!r}, expected a regular expression or a list of names")
    return value
