"""One run at a time in a folder: a lock file, held while the process lives."""

import errno
import os
from pathlib import Path
from typing import TextIO

from utils.errors import UserError
from utils.files import show_path

NAME = ".lock"
# What systems say where another process has it.
HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)


def lock_folder(folder: Path) -> TextIO:
    """Hold the folder's lock file until the process ends or the returned file is closed.

    UserError where another process holds it, where the file is a link, and where the disk knows no locks.
    """
    path = folder / NAME
    try:
        number = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UserError(f"{show_path(path)} is a link to another file; remove it") from None
    file = os.fdopen(number, "r+", encoding="utf-8")
    try:
        _hold(file)
    except OSError as error:
        file.seek(0)
        owner = file.read(20).strip() or "unknown"
        file.close()
        if error.errno in HELD:
            raise UserError(
                f"{show_path(folder)} is in use by another run (process {owner}); wait for it, or choose another --output-dir"
            ) from None
        raise UserError(
            f"{show_path(folder)} lies on a disk that knows no file locks ({error.strerror}); choose another --output-dir"
        ) from None
    file.seek(0)
    file.truncate()
    file.write(str(os.getpid()))
    file.flush()
    return file


def _hold(file: TextIO) -> None:
    """Lock an open file; OSError where that cannot be."""
    try:
        import fcntl
    except ImportError:
        # Windows locks bytes, which nobody else can read then: one far behind the text, the same for all.
        import msvcrt

        os.lseek(file.fileno(), 1 << 20, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
