"""The end of a script: one clear line and an exit code, never a traceback for anything foreseeable.

Exit codes: 0 done, 1 something failed underway, 2 what the user gave (arguments, data, a missing input), 130 Ctrl-C.
"""

import contextlib
import errno
import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator

from utils.text import printable, shorten, with_our_python


class UserError(Exception):
    """Something that the user gave cannot be used. The text says what is wrong, where, and the command that mends it."""

    exit_code = 2


class RunError(Exception):
    """Something failed underway that was not the user's doing (network, disk, memory, a diverged run)."""

    exit_code = 1


FULL = "the disk is full{where}; free some space and run the same command again"
TOO_LARGE = "this disk takes no file so large{where}; choose another folder"  # FAT32 ends at 4 GB
MORE_MEMORY = "not enough memory; close other programs or choose a smaller model or batch, or --device cpu"
STOPPED = "stopped by Ctrl-C; the same command starts it again"
READER_LEFT = "stopped: what read this output has ended; the same command without it does the rest"
# torch on a GPU, on a CPU; the system; Python, whose threads and errors need memory too
NO_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory", "can't start new thread")
NO_MEMORY += ("returned NULL without setting an exception",)
# The system's words, which libraries (safetensors, torch) repeat in errors of their own.
SIGNS = {"No space left on device": FULL, "Disk quota exceeded": FULL, "File too large": TOO_LARGE}
SIGNS |= dict.fromkeys(NO_MEMORY, MORE_MEMORY)
SIGNS[" requested and "] = FULL  # numpy: so many items, so many written
CODES = {errno.ENOSPC: FULL, errno.ENOMEM: MORE_MEMORY}  # Windows has other words
OWN_THRESHOLDS = gc.get_threshold()  # Python's
freeze_once = functools.cache(gc.freeze)


@contextlib.contextmanager
def told_in_one_line(what: str) -> Iterator[None]:
    """Turn what the libraries raise for damaged or foreign files (any Exception) into a UserError of one line: `what`, and why."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or any(sign in str(error) for sign in NO_MEMORY):
            raise
        raise UserError(f"{what} ({shorten(str(error) or type(error).__name__, 300)})") from None


def imports_are_done() -> None:
    """From now on garbage is collected as often as Python does by itself, but not looked for among what the imports made."""
    freeze_once()
    gc.set_threshold(*OWN_THRESHOLDS)


def run(main: Callable[[], int | None]) -> int:
    """Call `main()` and return the exit code, with foreseeable failures told in one line on stderr.

    Of several processes (torchrun, accelerate launch) only the first prints; a UserError, the same in all, is told once.
    """
    prepare_streams()
    # The imports make a million objects that stay: looking for garbage among them took a fifth of their time.
    gc.set_threshold(100_000)  # until imports_are_done
    # By default the threads of GCC's OpenMP wait for one another at full speed, which took most of the time beside other
    # programs. torch's import reads this; 20,000 are about 0.1 ms.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    first, code = int(os.environ.get("RANK", 0)) == 0, None
    try:
        with contextlib.redirect_stdout(sys.stdout if first else open(os.devnull, "w", encoding="utf-8")):
            code = main() or 0
        sys.stdout.flush()
        return code
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError) and code is not None:
            return code  # `script | head`: only the last lines went unread
        failure = explain(error)
        if failure is None:
            raise
        return failure[1] if isinstance(error, UserError) and not first else complain(*failure)
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # its reader has left: the interpreter would flush once more, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain(error: BaseException) -> tuple[str, int] | None:
    """(one line, exit code) for a foreseeable failure; None for a bug, whose traceback is wanted."""
    if isinstance(error, (UserError, RunError)):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return str(error) or STOPPED, 130
    if isinstance(error, MemoryError):
        return MORE_MEMORY, 1
    if isinstance(error, BrokenPipeError):
        return READER_LEFT, 1
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("utils"):
        python = ".venv\\Scripts\\python.exe" if os.name == "nt" else ".venv/bin/python"
        mend = f"run the script with {python}, which `python3.11 tasks.py install` makes"
        return f"the package {error.name} is not installed for {sys.executable}; {mend}", 2
    code, name = getattr(error, "errno", None), getattr(error, "filename", None)
    where = f" ({name})" if name else ""
    for line in [CODES.get(code), *(line for sign, line in SIGNS.items() if sign in str(error))]:
        if line:
            return line.format(where=where), 1
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        mend = "close the program that has it open, or " if os.name == "nt" else ""
        return f"no permission to write or read{where}; {mend}choose another folder or change its owner", 1
    return (f"{error.strerror or error}{where}", 1) if isinstance(error, OSError) else None


def prepare_streams() -> None:
    """Make stdin, stdout and stderr usable for Chinese text, whatever started this process."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller (cron, `>&-`): a data file would get its number
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):  # terminals in LANG=C and cp936 cannot show every character
        stream.reconfigure(encoding="utf-8", errors="replace")
    if os.name == "nt" and sys.stdout.isatty():
        os.system("")  # lets older Windows consoles understand escape codes


def complain(message: object, exit_code: int) -> int:
    """Print one line on stderr, whatever the message holds, and return `exit_code`."""
    line = with_our_python(" ".join(str(message).splitlines()))
    print(f"error: {printable(line)}", file=sys.stderr, flush=True)
    return exit_code
