"""Chat templates of strangers: what never ends, grows or fails is refused within seconds, what people publish is taken."""

import shutil
import time

import pytest
from tiny_model import TEMPLATE

from utils.errors import UserError
from utils.model.chat_format import encode_prompt, with_default_mode
from utils.model.folder import load_tokenizer
from utils.model.template_check import problem_of

QWEN3 = TEMPLATE.read_text(encoding="utf-8")
LOOPS = "".join("{% for x in range(100000) %}" for _ in range(4)) + "{% endfor %}" * 4
HOSTILE = {
    "loops": LOOPS,
    "loops in a history": "{% if messages|length > 20 %}" + LOOPS + "{% endif %}",
    "conditions": "{% if a %}b{% endif %}" * 500_000,
    "nested conditions": "{% if a %}" * 3000 + "{% endif %}" * 3000,
    "product": "{{ 'a' * 3000000000 }}",
    "product of a variable": "{% set n = 3000000000 %}{{ 'a' * n }}",
    "list": "{{ [1] * 3000000000 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "doubling": "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "width": "{{ '%3000000000d' % 1 }}",
    "long text": "{% for x in range(99999) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}",
    "syntax": "{% if %}",
    "no end": "{% for m in messages %}",
    "type": "{{ messages + 1 }}",
    "zero": "{{ 1 / 0 }}",
    "undefined": "{{ a.b.c }}",
    "refusing": "{{ raise_exception('no') }}",
    "sandbox": "{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__.os }}",
    "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(tiny_folder, tmp_path, name):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(HOSTILE[name], encoding="utf-8")
    start = time.monotonic()
    with pytest.raises(UserError, match="chat_template.jinja") as error:
        load_tokenizer(str(folder))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert time.monotonic() - start < 30


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        QWEN3 + "{# changed #}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m.content }}{% endfor %}",
        "{{ strftime_now('%Y') }}{{ messages | tojson(indent=2) }}{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
        "{{ '-' * 20 }}{{ 2 ** 3 * 4 }}",
    ],
)
def test_honest(template):
    assert problem_of(template) == ""


def test_qwens_own_template_needs_no_trial(tiny_folder, tmp_path, monkeypatch):
    """In either mode: another process would cost every start 0.1 s."""
    monkeypatch.setattr("utils.model.template_check.subprocess", None)
    problem_of.cache_clear()
    for thinking in (True, False):
        folder = shutil.copytree(tiny_folder, tmp_path / str(thinking))
        (folder / "chat_template.jinja").write_text(with_default_mode(QWEN3, thinking), encoding="utf-8")
        load_tokenizer(str(folder))


def test_a_refused_conversation_is_told(chat_model, monkeypatch):
    monkeypatch.setattr(chat_model.tokenizer, "chat_template", "{{ raise_exception('no') }}")
    with pytest.raises(UserError, match="does not render this conversation \\(no\\)"):
        encode_prompt(chat_model.tokenizer, [{"role": "user", "content": "?"}])
