"""Putting a function in another's place, and taking it out again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

Bug = Callable[[], list[tuple[Any, str, Callable]]]
"""Makes a bug: which attribute of which module or class to replace, and by what."""


@contextlib.contextmanager
def replaced(changes: list[tuple[Any, str, Callable]]) -> Iterator[None]:
    """Hold the replacements in place.

    Raises:
      AttributeError: there is no such function to replace: the framework has moved on, and the bug with it.
    """
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def find(bugs: dict[str, Bug], name: str) -> Bug:
    """The bug by name.

    Raises:
      LookupError: there is none.
    """
    if name not in bugs:
        raise LookupError(f"unknown bug {name!r}; allowed: {', '.join(bugs)}")
    return bugs[name]
