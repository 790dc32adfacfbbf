"""Settings: the UPPER_CASE constants at the top of a script, each of them also a command-line flag.

A script holds one block, from a line that starts with `# ---- Settings` to the next line that starts with `# ----`:

    # ---- Settings: edit here, or override on the command line (--learning-rate 1e-5) ----
    LEARNING_RATE = 2e-5                  # full fine-tuning; LoRA takes about ten times this
    # ----

and calls `settings = parse_settings(__file__)`, then reads `settings.LEARNING_RATE`. The block is read as text
(ast.literal_eval), so `--help` needs no heavy import and nothing is executed.

Paths: a constant whose name ends in _DIR, _FILE or _FILES is a path. Written in the script it is relative to the
repository, given as a flag it is relative to the folder the user stands in. A name that is or ends in MODEL(S) may be a
folder or a Hub id: what exists as a folder becomes its path, anything else stays as it is.
"""

import argparse
import ast
import difflib
import itertools
import math
import re
import shlex
import sys
import textwrap
from pathlib import Path

from utils.errors import UserError, complain

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 2**31 - 1

# Endings of the names of constants that are texts whatever they look like, and of those that count something.
TEXTS = ("_DIR", "_FILE", "MODEL", "PROMPT", "SYSTEM", "_KEY", "HOST", "COLUMNS")
COUNTS = (
    "_STEPS",
    "_STEP",
    "_ROWS",
    "_LENGTH",
    "_TOKENS",
    "_SIZE",
    "_CHECKPOINTS",
    "SEED",
    "EVALUATIONS",
    "WORKERS",
)

# Least and most of a number, by the name of its constant. Where the comment of one names -1, that is allowed as well.
LIMITS = {
    **dict.fromkeys(
        "EPOCHS MAX_LENGTH ROWS_PER_STEP KEEP_CHECKPOINTS RANK SAMPLES MAX_NEW_TOKENS BATCH_SIZE MAX_CHARACTERS VOCABULARY "
        "WIDTH LAYERS FEED_FORWARD TOKENS_PER_STEP".split(),
        (1, LARGEST),
    ),
    **dict.fromkeys(
        "MAX_STEPS EVAL_ROWS SHOW_EXAMPLE SHOW GENERATE EXAM_ROWS LETTER_ROWS MAX_TRAIN MAX_EVAL MAX_EVAL_ROWS TOKEN_ROWS "
        "WORKERS PROMPTS WARMUP_STEPS COPIES NAMES".split(),
        (0, LARGEST),
    ),
    **dict.fromkeys("LEARNING_RATE WEIGHT_DECAY BETA SFT_WEIGHT ALPHA".split(), (0, math.inf)),
    "WARMUP": (0, 1),
    "TEMPERATURE": (0.01, 100),
    "SEED": (0, 2**32 - 1),  # numpy takes no larger one
}


class Settings(argparse.Namespace):
    """The resolved constants as attributes. `overridden` names the flags that the command line gave."""

    overridden: set
    verbose: bool

    def __getattr__(self, name):
        """Only asked for what is not there: a constant that was misspelt, or left out, at the top of the script."""
        if not name.isupper():
            raise AttributeError(name)
        near = difflib.get_close_matches(name, self.as_dict(), n=1, cutoff=0.5)
        hint = f"; is {near[0]} meant for it?" if near else ""
        raise UserError(f"the settings at the top of the script have no {name}{hint}")

    def as_dict(self) -> dict:
        """{name: value}, with paths inside the repository written relative to it (for printing and run.json)."""
        return {name: _plain(value) for name, value in vars(self).items() if name.isupper()}

    def show(self) -> None:
        """Print the settings that the command line gave; with --verbose all, those marked with a star."""
        everything = self.as_dict()
        if self.verbose:
            shown = [
                f"{name}={value!r}{'*' if name in self.overridden else ''}"
                for name, value in everything.items()
            ]
            line = "settings (* from the command line): " + "  ".join(shown)
        else:
            shown = [f"{name}={value!r}" for name, value in everything.items() if name in self.overridden]
            line = f"settings: {'  '.join([*shown, ''])}{'the rest ' if shown else ''}as in the script (--verbose shows all)"
        whole_words = {"break_long_words": False, "break_on_hyphens": False}
        print(textwrap.fill(line, 118, subsequent_indent="  ", **whole_words))


def parse_settings(script: str | Path, argv: list | None = None, positional: str = "") -> Settings:
    """Read the settings block of `script` and the flags in `argv` (default: sys.argv[1:]) into a Settings object.

    `positional` names the one constant that may also be given without its flag. Exits 0 after --help; exits 2, with one
    line, on an unknown flag (the nearest is named) or on a value of the wrong type.
    """
    source = Path(script).read_text(encoding="utf-8")
    try:
        constants = read_constants(source)
    except UserError as error:
        sys.exit(complain(error, 2))
    parser = _make_parser(script, ast.get_docstring(ast.parse(source)), constants, positional)
    given = _read_flags(parser, sys.argv[1:] if argv is None else argv, constants, positional)
    settings = Settings(verbose=given.pop("verbose"), overridden=set(given))
    here = _current_folder(parser)
    for name, (value, _) in constants.items():
        resolved = _resolve(name, given.get(name, value), here if name in given else ROOT)
        _refuse_number(parser, name, resolved, constants[name][1])
        if name.endswith("_DIR") and resolved:
            _refuse_file_in_path(parser, name, resolved)
        setattr(settings, name, resolved)
    return settings


def command(script: str, **values: str | Path) -> str:
    """The command that runs `script` of this repository with these constants: a flag for each that its own default is not.

    command("model_finetune/finetune_sft.py", TRAIN_FILE=path) -> "python model_finetune/finetune_sft.py --train-file ..."
    """
    constants = read_constants((ROOT / script).read_text(encoding="utf-8"))
    words = ["python", script]
    for name, value in values.items():
        default = constants[name][0]
        default = default[0] if isinstance(default, list) and default else default
        if (ROOT / str(value)).resolve() != (ROOT / str(default)).resolve():
            words += [_flag(name), str(_plain(value))]
    return shlex.join(words)


def read_constants(source: str) -> dict[str, tuple]:
    """{NAME: (value, comment)} of the settings block in a script's source text, in order."""
    lines = source.splitlines()
    start, end = _settings_block(lines)
    return {
        node.targets[0].id: (_value_of(node), _comment_of(node, lines[:end]))
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and start < node.lineno <= end and node.targets[0].id.isupper()
    }


def _value_of(node):
    """The value of an assignment in the settings block. UserError where it is none that a flag could have as well."""
    name = node.targets[0].id
    try:
        value = ast.literal_eval(node.value)
    except ValueError:
        raise UserError(
            f"line {node.lineno} of the script: {name} is a calculation, wanted a plain value"
        ) from None
    wanted = _wanted(name, value)
    if wanted:
        raise UserError(f"line {node.lineno} of the script: {name} is {value!r}, wanted {wanted}")
    return value


def _wanted(name, value) -> str:
    """What a constant should be instead; "" where it may be what it is. Told by its name, which also says how it is used."""
    if name.endswith(("_FILES", "MODELS")):
        return (
            ""
            if isinstance(value, list) and all(isinstance(item, str) for item in value)
            else '["a list", "of texts"]'
        )
    if name.endswith(TEXTS):
        return "" if isinstance(value, str) else 'a text, as in "text"'
    if isinstance(value, str) and _is_quoted(value):
        return f"{value.strip()} without the quotes"
    if isinstance(value, float) and name.endswith(COUNTS):
        return "a whole number"
    return "" if type(value) in (bool, int, float, str, list) else "a number, a text in quotes, True or False"


def _is_quoted(text):
    """Whether a text is a number or a truth value that was put in quotes."""
    return text.strip() in ("True", "False") or bool(
        re.fullmatch(r"[-+]?\d*\.?\d+([eE][-+]?\d+)?", text.strip())
    )


def _settings_block(lines):
    """The indices of the two lines that begin with # ---- around the settings."""
    rules = [index for index, line in enumerate(lines) if line.startswith("# ----")]
    start = next(index for index in rules if lines[index].startswith("# ---- Settings"))
    return start, next(index for index in rules if index > start)


def _comment_of(node, lines):
    """The comment behind an assignment (an ast node, which counts in bytes) and in the indented lines below it."""
    behind = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
    below = itertools.takewhile(re.compile(r"\s+#").match, lines[node.end_lineno :])
    return " ".join(line.partition("#")[2].strip() for line in (behind, *below))


def _make_parser(script, description, constants, positional):
    parser = _Parser(
        prog=f"python {_plain(Path(script).resolve())}",
        usage="%(prog)s [flags]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.flags = [*(_flag(name) for name in constants), "--verbose"]
    for name, (value, comment) in constants.items():
        help_line = f"{comment} [{value!r}]".replace("%", "%%")
        parser.add_argument(
            _flag(name), dest=name, default=argparse.SUPPRESS, help=help_line, **_value_options(value)
        )
    parser.add_argument(
        "--verbose", action="store_true", help="print every setting at the start, not only what was given"
    )
    if positional:
        parser.add_argument("positional", nargs="?", default=None, help=argparse.SUPPRESS)
    return parser


def _value_options(value):
    """What argparse has to know to read a value of the same type as a constant's."""
    if isinstance(value, bool):
        return {"type": _boolean, "nargs": "?", "const": True, "metavar": "true|false"}
    if isinstance(value, list):
        return {"nargs": "+", "metavar": "TEXT"}
    metavar = {int: "N", float: "X", str: "TEXT"}[type(value)]
    return {"type": _typed(type(value)), "metavar": metavar}


def _read_flags(parser, argv, constants, positional):
    """{NAME: value} of the constants that the command line gives."""
    given = vars(parser.parse_args(_switched_on(argv, constants) if positional else argv))
    first = given.pop("positional", None)
    return given if first is None else {**given, positional: first}


def _current_folder(parser):
    try:
        return Path.cwd()
    except FileNotFoundError:
        parser.error("the folder that this was started in has been deleted; go to one that is there, with cd")


def _refuse_number(parser, name, value, comment):
    """Refuse a number that no run could use: nan, inf, or one beyond its limits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    least, most = LIMITS.get(name, (-math.inf, math.inf))
    if isinstance(value, float):
        least = min(least, 0)  # half an epoch
    unset = value == -1 and re.search(r"(?<![\w.])-1\b", comment)
    if not math.isfinite(value) or not (unset or least <= value <= most):
        wanted = f"{least:,} to {most:,}" if most < math.inf else f"a number from {least:,}"
        wanted = "a finite number" if least == -math.inf else wanted
        parser.error(f"{_flag(name)}: wanted {wanted}, got {value:,}")


def _refuse_file_in_path(parser, name, folder):
    for path in (folder, *folder.parents):
        if path.is_file():
            parser.error(f"{_flag(name)}: {path} is a file, wanted a folder")
        if path.is_symlink() and not path.exists():
            parser.error(f"{_flag(name)}: {path} is a link to something that is not there")


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors and the nearest flag for an unknown one."""

    flags = []

    def parse_args(self, argv=None):
        known, unknown = self.parse_known_args(argv)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self.flags, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"{self.prog} --help lists the flags"
            self.error(f"unknown argument {unknown[0]}; {hint}")
        return known

    def error(self, message):
        sys.exit(complain(message.removeprefix("argument "), 2))


def _flag(name):
    return "--" + name.lower().replace("_", "-")


def _switched_on(argv, constants):
    """argv with =true added to true-or-false flags without a value: the word after them may be the model folder."""
    switches = {_flag(name) for name, (value, _) in constants.items() if isinstance(value, bool)}
    return [
        f"{word}=true" if word in switches and after.lower() not in BOOLEANS else word
        for word, after in itertools.zip_longest(argv, argv[1:], fillvalue="")
    ]


BOOLEANS = ("true", "false", "yes", "no", "1", "0")


def _boolean(text):
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"wanted true or false, got {text!r}")
    return text.lower() in ("true", "yes", "1")


def _typed(kind):
    wanted = {int: "a whole number", float: "a number such as 2e-5", str: "a text"}[kind]

    def convert(text):
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"wanted {wanted}, got {text!r}") from None

    return convert


def _resolve(name, value, base):
    if name.endswith("_FILES"):
        return [base / _at_home(item) for item in value]
    if name.endswith(("_DIR", "_FILE")):
        return base / _at_home(value) if value else None
    if name.endswith("MODELS"):
        return [_folder_or_id(item, base) for item in value]
    if name.endswith("MODEL"):
        return _folder_or_id(value, base)
    return value


def _at_home(text):
    """The path in `text`, with ~ for a home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~somebody who is not there
        sys.exit(complain(f"{text}: {error}", 2))


def _folder_or_id(value, base):
    path = base / _at_home(value)
    return str(path) if value and path.exists() else value


def _plain(value):
    if isinstance(value, list):
        return [_plain(item) for item in value]
    path = Path(value) if isinstance(value, (str, Path)) and str(value).startswith(str(ROOT)) else None
    if path is not None and path.is_relative_to(ROOT):
        return path.relative_to(ROOT).as_posix()
    return str(value) if isinstance(value, Path) else value
