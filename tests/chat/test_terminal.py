"""What chat prints, and a session in a pseudo-terminal."""

import json
import os
import re
import select
import shutil
import sys
import time

import psutil
import pytest
from chat_helpers import prompts_of, reference
from conftest import ROOT

from utils.chat.terminal import AnswerPrinter
from utils.model.chat_format import encode_prompt

SCRIPT = ROOT / "model_download/load_local_model.py"


def test_thinking_goes_to_stderr(capsys, monkeypatch):
    printer = AnswerPrinter()
    for text in ("", "想一", "想\n", ""):
        printer(text, True)
    for text in ("", "甘草", "\x1b[2J。"):
        printer(text, False)
    assert capsys.readouterr() == ("甘草\x1b[2J。", "想一想\n\n\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    AnswerPrinter()("\x1b[2J。", False)
    assert capsys.readouterr().out == "\ufffd[2J。"  # a terminal is not to be controlled by a model


class Terminal:
    """The script in a pseudo-terminal: type(text), then read on until a pattern has been seen."""

    def __init__(self, *command, **environment):
        import pty

        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.execve(command[0], command, {**os.environ, "TERM": "xterm", **environment})
        self.screen = b""

    def type(self, text, wanted=r"> $"):
        """Returns what was printed from then on, up to the regular expression `wanted`."""
        start = len(self.screen)
        os.write(self.file, text if isinstance(text, bytes) else text.encode())
        return self.read(wanted, start)

    def read(self, wanted, start=0):
        deadline = time.monotonic() + 180
        while not re.search(wanted, self.said(start)):
            assert time.monotonic() < deadline, f"no {wanted!r} in {self.said(start)!r}"
            if select.select([self.file], [], [], 0.1)[0]:
                try:
                    self.screen += os.read(self.file, 65536)
                except OSError:  # Linux says EIO once the other end is closed
                    break
        return self.said(start)

    def said(self, start=0):
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", self.screen[start:].decode("utf-8", "ignore"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pty")
def test_session_in_a_terminal(tiny_folder, chat_model, tmp_path):
    # A folder whose answer to the first question ends soon: the tenth token of that answer becomes an end token.
    own = shutil.copytree(tiny_folder, tmp_path / "中医模型")
    settings = json.loads((tiny_folder / "generation_config.json").read_text(encoding="utf-8"))
    end = reference(chat_model, prompts_of(chat_model)[0], 40)[9]
    settings["eos_token_id"].append(end)
    (own / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    question = "麻黄\n\\\n汤"  # whose answer, for Ctrl-C, does not end soon
    prompt = encode_prompt(chat_model.tokenizer, [{"role": "user", "content": question}], thinking=False)
    assert end not in reference(chat_model, prompt, 500)
    flags = "--greedy --precision fp32 --max-new-tokens 3000".split()
    command = [sys.executable, str(ROOT / SCRIPT), str(own), *flags]
    terminal = Terminal(*command, OMP_NUM_THREADS="1", LC_ALL="C.UTF-8")
    assert "not medical advice" in terminal.read(r"> $")
    saved, answered = tmp_path / "saved.jsonl", r"tokens/s.*\n> $"

    assert "/undo" in terminal.type("/help\n")
    terminal.type("甘草\n", answered)
    terminal.type("/retry\n", answered)
    assert "1 turn appended" in terminal.type(f"/save {saved}\n")
    assert "set" in terminal.type("/system 你是中医师。\n")
    assert "thinking off" in terminal.type("/think off\n")
    # three steps left, two typed, one deleted
    left = "\x1b[D\x1b[D\x1b[D"
    assert "no command /麻黄汤的功效; /help" in terminal.type(f"/麻黄的功效{left}汤龘\x7f\n")
    # a paste of two lines is one message
    assert "no command /合谷 为什么？; /help" in terminal.type("\x1b[200~/合谷\n为什么？\x1b[201~\n")
    assert "thinking off" in terminal.type("/thi\t\n")  # Tab makes it /think
    terminal.type("龘", "龘$")
    # CPython loses a Ctrl-C that comes in the microseconds between the echo and its wait for the next key.
    time.sleep(0.5)
    while psutil.Process(terminal.pid).status() != psutil.STATUS_SLEEPING:
        time.sleep(0.1)
    assert "stopped" in terminal.type("\x03", r"stopped; .*\n> $")  # it drops what is being typed
    terminal.type("/system\n", r"removed.*\n> $")
    terminal.type("/clear\n")

    # Ctrl-C in the middle of an answer; afterwards the same question as in the beginning gets the same answer.
    terminal.type(f'"""{question}"""\n', r'汤"""\n+[^\n]{5}')
    assert "stopped by Ctrl-C" in terminal.type("\x03", answered)
    assert f"taken back: {question})" in terminal.type("/undo\n")
    terminal.type("/think auto\n")
    terminal.type("甘草\n", answered)
    assert "1 turn appended" in terminal.type(f"/save {saved}\n")
    terminal.type(b"/system \xe7\x94\xb2\xe7\n", r"set.*\n> $")  # half a character
    terminal.type("/exit\n", r"\n$")
    assert os.waitpid(terminal.pid, 0)[1] == 0
    assert "Traceback" not in terminal.said()
    first, second = (json.loads(line)["messages"] for line in saved.read_text(encoding="utf-8").splitlines())
    assert first == second and first[0] == {"role": "user", "content": "甘草"} and len(first) == 2
