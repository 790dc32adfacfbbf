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
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")  # LANG=C and cp936 terminals cannot hold Chinese
    first = int(os.environ.get("RANK", 0)) == 0     # of several processes (torchrun, accelerate launch) only the first speaks
    try:
        with contextlib.nullcontext() if first else contextlib.redirect_stdout(open(os.devnull, "w", encoding="utf-8")):
            return main() or 0
    except UserError as error:
        return complain(error, error.exit_code) if first else error.exit_code       # the same in every process
    except RunError as error:
        return complain(error, error.exit_code)
    except KeyboardInterrupt as stop:
        return complain(str(stop) or "stopped by Ctrl-C; the same command starts it again", 130)
    except BrokenPipeError:  # `script | head`: the reader has left, nothing more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        return complain("not enough memory; close other programs or choose a smaller model or batch", 1)
    except OSError as error:
        return complain(explain_os_error(error), 1)
    except Exception as error:
        if any(sign in str(error) for sign in DISK_FULL):
            return complain("the disk is full; free some space and run the same command again", 1)
        raise


# How the writers of safetensors and torch say that the disk is full: neither raises an OSError.
DISK_FULL = ("No space left on device", "PytorchStreamWriter failed writing", "unexpected pos")


def complain(message, exit_code):
    """Print one line on stderr and return `exit_code`."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    return exit_code


def explain_os_error(error):
    """One line for an OSError: the cause, the path, and what to do."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"the disk is full{where}; free some space and run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write or read{where}; choose another folder or change its owner"
    return f"{error.strerror or error}{where}"
