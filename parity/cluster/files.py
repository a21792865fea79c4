"""Arrays that every host has made for itself, held against rank 0's; lessons, which rank 0 alone can make, as bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from parity.arrays import ArrayRef

PIECE_BYTES = 1 << 24


class Digests:
    """Digests of arrays; a file that cases share is read once."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def of(self, refs: Mapping[str, ArrayRef]) -> dict[str, str]:
        """The digest of each array: its dtype, its shape and every bit."""
        return {name: self._one(ref) for name, ref in refs.items()}

    def _one(self, ref: ArrayRef) -> str:
        if ref.path not in self._known:
            found = hashlib.blake2b(f"{ref.dtype} {ref.shape}".encode(), digest_size=16)
            with open(ref.path, "rb") as file:
                while piece := file.read(PIECE_BYTES):
                    found.update(piece)
            self._known[ref.path] = found.hexdigest()
        return self._known[ref.path]


class Lessons:
    """Lessons as they came from rank 0, a folder for each case's; those that are no longer wanted are removed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._refs: dict[int, dict[str, ArrayRef]] = {}

    def keep(self, key: int, name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> None:
        """Write one lesson.

        Raises:
          ValueError: its name is no name.
          OSError: no room.
        """
        if not name.isidentifier():
            raise ValueError(f"{name!r} is no name of a lesson")
        path = self.folder / str(int(key)) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self._refs.setdefault(key, {})[name] = ArrayRef(str(path), dtype, shape)

    def forget(self, key: int) -> None:
        for ref in self._refs.pop(key, {}).values():
            Path(ref.path).unlink(missing_ok=True)

    def refs(self, key: int | None) -> dict[str, ArrayRef] | None:
        return None if key is None else self._refs[key]
