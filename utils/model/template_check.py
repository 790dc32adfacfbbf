"""A chat template is a program of the folder's author: tried in a process of its own before this one renders with it.

There, time and size have limits, so that loops, huge texts and conditions without end stop that process and not the chat. Qwen's
own template is known and needs no trial; any other costs about 0.1 s, once per process.

What is tried is a question, and a long conversation in every mode: a template that waits for its 1,000th turn passes.
"""

import functools
import hashlib
import json
import subprocess
import sys

from utils.errors import UserError
from utils.settings import ROOT
from utils.text import shorten

LONGEST = 200_000  # characters; Qwen3's template has 4,168
SECONDS = 30  # on the clock: a busy machine takes a while
CPU_SECONDS = 2  # of work, where the system can limit it; good templates take 0.2
MEMORY = 1 << 30  # bytes that the trial may take, where the system can limit it
TURNS, GROWTH = 50, 20  # of the long conversation; characters rendered for each one in it
QWEN3 = "a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8"
CHILD = (
    "import sys; sys.path.insert(0, sys.argv[1]); from utils.model.template_check import try_out; try_out()"
)


@functools.lru_cache(maxsize=64)
def problem_of(template: str) -> str:
    """What is wrong with a chat template, in words; "" where it renders within the limits."""
    if len(template) > LONGEST:
        return f"has {len(template)} characters; at most {LONGEST} are taken"
    if hashlib.sha256(template.encode("utf-8", "replace")).hexdigest() == QWEN3:
        return ""
    command = [sys.executable, "-I", "-X", "utf8", "-c", CHILD, str(ROOT)]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(template),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return "does not end"
    if done.returncode == 2:
        return done.stdout
    return "" if done.returncode == 0 else "does not end, or takes too much memory"


def try_out() -> None:
    """The trial, in the child: reads a template from stdin, ends with code 2 and one line where it cannot be used."""
    template = json.loads(sys.stdin.read())
    _limit_this_process()
    try:
        _render_all(template)
    except UserError as error:
        print(error, end="")
        sys.exit(2)


def _limit_this_process():
    try:
        import resource
    except ImportError:  # Windows: the clock alone
        return
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    if sys.platform == "linux":  # macOS does not keep to it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _render_all(text):
    question = [{"role": "user", "content": "甘草？"}]
    turns = [{"role": role, "content": "甘草调和诸药。" * 10} for role in ("user", "assistant")] * TURNS
    long = [{"role": "system", "content": "中医"}, *turns, *question]
    try:
        template = _environment().from_string(text)
        template.render(messages=question, add_generation_prompt=True)
    except MemoryError:
        raise UserError("takes too much memory") from None
    except Exception as error:  # a template can run into any
        why = shorten(f"{type(error).__name__}: {error}", 200)
        raise UserError(f"does not render a question ({why})") from None
    longest = 10_000 + GROWTH * sum(len(message["content"]) for message in long)
    for mode in ({}, *({"enable_thinking": mode, "force_thinking": mode} for mode in (True, False))):
        size = 0
        for piece in _pieces(template, messages=long, add_generation_prompt=True, **mode):
            size += len(piece)
            if size > longest:
                raise UserError(f"makes more than {longest} characters of {len(long)} messages")


def _pieces(template, **values):
    """The parts of the rendered text; a conversation that the template refuses has no more of them."""
    try:
        yield from template.generate(**values)
    except MemoryError:
        raise UserError("takes too much memory") from None
    except Exception:  # told when somebody writes such a conversation
        return


def _environment():
    """The environment in which transformers renders, with products of texts refused, as systems without a memory limit need."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context, operator, left, right):
            for one, other in ((left, right), (right, left)):
                if isinstance(one, (str, list, tuple)) and len(one) * other > LONGEST:
                    raise TemplateError("a text is repeated too often")
            if operator == "**" and abs(right) > 100:
                raise TemplateError("a power is too high")
            return super().call_binop(context, operator, left, right)

    class Generation(Extension):  # transformers' tag around what a model has said
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message):
        raise TemplateError(message)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals.update(raise_exception=refuse, strftime_now=lambda form: "2026-01-01")
    return environment
