"""The small module that every script shares, and below it one folder per thing that a person wants to do."""

import sys

if sys.hexversion < 0x030B0000:  # before anything here is read that an older Python does not understand
    sys.exit(
        "error: Python {}.{}, wanted 3.11 or newer: .venv/bin/python, or python3.11".format(*sys.version_info)
    )
