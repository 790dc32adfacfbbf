"""How a script ends: one clear line and an exit code, never a traceback for anything foreseeable.

Exit codes: 0 done, 1 something failed underway, 2 what the user gave (arguments, data, a missing input), 130 Ctrl-C.
"""

import contextlib
import errno
import os
import sys


class UserError(Exception):
    """What the user gave cannot be used. The text says what is wrong, where, and the command that mends it."""

    exit_code = 2


class RunError(Exception):
    """Something failed underway that was not the user's doing (network, disk, memory, a diverged run)."""

    exit_code = 1


def run(main):
    """Call `main()` and return the exit code, with foreseeable failures told in one line on stderr."""
    if (
        sys.getfilesystemencoding() == "ascii"
    ):  # LANG=C with PYTHONUTF8=0: neither file names nor libraries could hold Chinese
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if (
            getattr(sys, name) is None
        ):  # closed by what started this (cron, `>&-`): or a data file would get its number
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(
            encoding="utf-8", errors="replace"
        )  # LANG=C and cp936 terminals cannot hold Chinese
    if os.name == "nt" and sys.stdout.isatty():
        os.system(
            ""
        )  # makes older Windows consoles understand the codes for dim text and lines rewritten in place
    first = (
        int(os.environ.get("RANK", 0)) == 0
    )  # of several processes (torchrun, accelerate launch) only the first speaks
    done = None
    try:
        with (
            contextlib.nullcontext()
            if first
            else contextlib.redirect_stdout(open(os.devnull, "w", encoding="utf-8"))
        ):
            done = _exit_code_of(main)
        sys.stdout.flush()
        return done
    except UserError as error:
        return complain(error, error.exit_code) if first else error.exit_code  # the same in every process
    except RunError as error:
        return complain(error, error.exit_code)
    except KeyboardInterrupt as stop:
        return complain(str(stop) or "stopped by Ctrl-C; the same command starts it again", 130)
    except (
        BrokenPipeError
    ):  # `script | head`: the reader has left. No fault where only the last lines went unread
        return (
            done
            if done is not None
            else complain(
                "stopped, because the program that read this output has ended; the same command without it does the rest",
                1,
            )
        )
    except MemoryError:
        return complain(MORE_MEMORY, 1)
    except OSError as error:
        return complain(explain_os_error(error), 1)
    except Exception as error:
        for sign, meaning in SIGNS.items():
            if sign in str(error):
                return complain(meaning, 1)
        raise
    finally:
        try:
            sys.stdout.flush()
        except (
            OSError
        ):  # nothing more can be said there; or the interpreter would try once more, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _exit_code_of(main):
    try:
        return main() or 0
    except SystemExit as end:  # --help was shown, or a flag refused
        return end.code


FULL = "the disk is full{where}; free some space and run the same command again"


TOO_LARGE = "this disk, or a limit set here, takes no file so large{where}; choose another folder"  # FAT32 ends at 4 GB


# torch on a GPU, on a CPU; the system; Python, whose threads need memory too
NO_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory", "can't start new thread")


MORE_MEMORY = "not enough memory; close other programs or choose a smaller model or batch, or --device cpu"


# What is meant where a library (safetensors, torch) has words for it but no OSError.
SIGNS = {
    **dict.fromkeys(
        (
            "No space left on device",
            "Disk quota exceeded",
            "PytorchStreamWriter failed writing",
            "unexpected pos",
        ),
        FULL.format(where=""),
    ),
    "File too large": TOO_LARGE.format(where=""),
    **dict.fromkeys(NO_MEMORY, MORE_MEMORY),
}


def complain(message, exit_code):
    """Print one line on stderr and return `exit_code`."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    return exit_code


def explain_os_error(error):
    """One line for an OSError: the cause, the path, and what to do."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):  # Windows has no quotas of this name
        return FULL.format(where=where)
    if error.errno == errno.ENOMEM or any(sign in str(error) for sign in NO_MEMORY):
        return MORE_MEMORY
    if error.errno == errno.EFBIG:
        return TOO_LARGE.format(where=where)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        mend = "close the program that has it open, or " if os.name == "nt" else ""
        return f"no permission to write or read{where}; {mend}choose another folder or change its owner"
    return f"{error.strerror or error}{where}"
