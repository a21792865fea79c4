"""Signals that a process handles for a while."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence


@contextlib.contextmanager
def handled(numbers: Sequence[signal.Signals], handler: Callable[[int, object], None]) -> Iterator[None]:
    """Have these signals handled inside of the block, and as before after it."""
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, earlier in zip(numbers, before, strict=True):
            signal.signal(number, earlier)
