"""`parity report`: a page, or tables, from what a run left in its folder."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from parity.launch import InfrastructureError
from parity.records import STORAGE_ERRORS, OutError
from parity.report.folder import load
from parity.report.html import render
from parity.report.terminal import final_table

PAGE = "report.html"


def main(folder: Path, out: Path | None, text: bool, console: Console) -> int:
    """Report on a folder.

    Args:
      folder: what `parity run --out` wrote to.
      out: the page's file; None puts it into the folder.
      text: print tables instead, unless `out` asks for the page too.
      console: where to.

    Returns:
      The exit status, 0: the verdict on the cases is `parity run`'s.

    Raises:
      OutError: the folder cannot be read, or the page not written.
      InfrastructureError: no space is left, or the template engine is missing.
    """
    run = load(folder)
    if text:
        final_table(console, run.ids, run.outcomes, False)
    if out or not text:
        path = out or folder / PAGE
        page = render(run)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(page, encoding="utf-8")
        except OSError as error:
            if error.errno in STORAGE_ERRORS:
                raise InfrastructureError(f"cannot write {str(path)!r}: {error.strerror}") from error
            raise OutError(f"--out {str(path)!r} cannot be written: {error.strerror}; give a file") from error
        console.print(f"{len(run.ids)} cases in {path}", highlight=False, soft_wrap=True)
    return 0
