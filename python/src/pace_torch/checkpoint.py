"""Files that a run goes on from: whole, or not there, whenever the process or the machine stops, and read only if they are whole."""

import os
import zipfile
from pathlib import Path
from typing import Any, Optional

import torch

from ._errors import PaceError


def save(path: Path, state: Any, previous: Optional[Path] = None) -> None:
    """Writes what `torch.load` reads. Until it is on the disk, `path` is what it was; then that becomes `previous`, if it is named.

    If the process ends in between, there is `previous` and no `path`. Raises `OSError`; where the file
    cannot be written, as on a full disk, all is as before.
    """
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            _write(file, state)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            path.replace(previous)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        # The new names as well; elsewhere a folder cannot be opened.
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def _write(file, state: Any) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        # PyTorch's own writer hides the reason when it cannot end the file either.
        while error and not isinstance(error, OSError):
            error = error.__context__
        if error:
            raise error from None
        raise


def load(path: Path) -> Any:
    """What `save` wrote, on the CPU.

    Raises `PaceError` if anything in the file is not what was written, which `torch.load` does not notice, and `OSError` if it cannot be
    opened.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # Whatever these two raise for any file at all.
            raise PaceError(f"{path} is not whole: {error or type(error).__name__}") from error
