"""The commands of a chat as people type them, and that none of them ends it."""

import json
import re
import shutil
import time

import pytest
from chat_helpers import CPU, Echo, damaged, plain, talk
from conftest import ROOT

from utils.chat.model import ChatModel, Options
from utils.chat.session import COMMANDS, TYPED, Chat, Turn
from utils.chat.terminal import completions, goes_on, loading, read_message
from utils.model.generate import TokenStream


@pytest.mark.parametrize("line", ["/bye", "/exit", "/quit", "exit", "quit", "／bye"])
def test_words_that_leave(chat, line):
    assert not chat.handle(line)
    talk(chat, f"what does {line} mean?")
    assert len(chat.history.turns) == 1


def test_other_names(chat, capsys):
    talk(chat, "一", "/?", "/clear", "二", "/reset")
    assert not chat.history.turns and "/load FILE.jsonl" in capsys.readouterr().err


def test_a_question_in_quotes_is_text(chat):
    talk(chat, '"""\n第一行\n/undo\n"""', '"""/help"""')
    assert [turn.question for turn in chat.history.turns] == ["第一行\n/undo", "/help"]


@pytest.mark.parametrize(
    "typed, message",
    [
        (["你好"], "你好"),
        (["一\\", "二\\", "三"], "一\n二\n三"),
        (['"""一', "二\\", "", '三"""'], '"""一\n二\\\n\n三"""'),
        (['"""', "/undo", '"""'], '"""\n/undo\n"""'),
        (['"""一"""'], '"""一"""'),
        (['""" '], None),
    ],
)
def test_messages_of_several_lines(monkeypatch, typed, message):
    lines = iter(typed)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    if message is None:
        assert goes_on(typed[0])
    else:
        assert read_message() == message and next(lines, None) is None


def test_set_with_a_space(chat, capsys):
    talk(chat, "/set temperature 0.5", "/set top_p = 0.8 top_k 7")
    assert chat.options.decoding == {"do_sample": True, "temperature": 0.5, "top_p": 0.8, "top_k": 7}
    assert "temperature 0.5, top_p 0.8, top_k 7" in capsys.readouterr().err
    talk(chat, "/set temperature")
    assert "error: /set temperature is '', wanted a number: 0 to 10" in capsys.readouterr().err


def test_bare_think_tells_the_mode(chat, capsys):
    talk(chat, "/think")
    assert "thinking off; " in capsys.readouterr().err and chat.options.thinking is False
    talk(chat, "/think auto", "/think")
    assert capsys.readouterr().err.count("(the folder's own mode)") == 2 and chat.options.thinking is None


def test_load_goes_on_where_save_ended(chat, chat_model, tmp_path, capsys):
    path = tmp_path / "对话.jsonl"
    talk(
        chat,
        "别的",
        f"/save {path}",
        "/clear",
        "/system 你是中医。",
        "/think on",
        "一",
        "二",
        f"/save {path}",
    )
    before = chat.history
    chat.handle("/clear")
    chat.history.system = ""
    talk(chat, f"/load {path}")
    assert chat.history.turns == before.turns and chat.history.system == "你是中医。"
    assert "2 turns from" in capsys.readouterr().err
    talk(chat, "三")
    assert "你是中医。" in chat.chat_model.seen[-1] and "二" in chat.chat_model.seen[-1]


@pytest.mark.parametrize(
    "content, told",
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b"\xff", "not UTF-8"),
        (b"{}\n", "no field messages"),
        (b'{"messages": []}\n', "messages is not a list of"),
        (b'{"messages": [{"role": "user", "content": "a"}]}\n', "with a user and after it an assistant"),
        (
            json.dumps({"messages": [{"role": role, "content": "a"} for role in "uau"]}).encode(),
            "with a user and after it an assistant",
        ),
        (
            json.dumps(
                {"messages": [{"role": role, "content": "a"} for role in ("user", "user", "assistant")]}
            ).encode(),
            "wanted questions and answers in turn",
        ),
    ],
)
def test_load_of_what_is_no_conversation(chat, tmp_path, capsys, content, told):
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_bytes(content)
    talk(chat, "一", f"/load {path}")
    assert told in capsys.readouterr().err and plain(chat) == [("一", "答1")]


def test_model_changes_and_the_conversation_goes_on(chat, tiny_folder, capsys, monkeypatch):
    monkeypatch.setattr("utils.chat.session.find_models", lambda: [tiny_folder])
    talk(chat, "一", "/model", "/model 1", "二")
    said = capsys.readouterr().err
    assert (
        "  1  " in said and "(echo is answering; /model FOLDER" in said and f"({tiny_folder} goes on)" in said
    )
    assert [turn.question for turn in chat.history.turns] == ["一", "二"] and chat.chat_model.name != "echo"
    talk(chat, "/model 7", "/model no/such/folder")
    said = capsys.readouterr().err
    assert "the model folder 7 does not exist" in said and "no/such/folder does not exist" in said
    assert chat.chat_model.name == str(tiny_folder)


def broken(tiny_folder, where):
    """A model folder whose chat template raises an error of its own."""
    shutil.copytree(tiny_folder, where)
    (where / "chat_template.jinja").write_text("{{ 1 / 0 }}", encoding="utf-8")
    return where


@pytest.mark.parametrize(
    "line",
    [
        "/save ~nobody_here/x.jsonl",
        "/load ~nobody_here/x.jsonl",
        "/model ~nobody_here",
        "/save a\0b.jsonl",
        f"/save {'x' * 300}.jsonl",
        f"/model {'x' * 5000}",
        "/set temperature=1e40",
        "/set repetition_penalty=1e-40",
        "/set top_k=" + "9" * 5000,
        "/set temperature=nan",
        "/model BROKEN",
        "/model CUT",
    ],
    ids=lambda line: line[:30],
)
def test_no_command_ends_the_chat(chat, tiny_folder, tmp_path, capsys, line):
    cut = damaged(tiny_folder, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes(b"\0" * 100)
    line = line.replace("BROKEN", str(broken(tiny_folder, tmp_path / "broken"))).replace("CUT", str(cut))
    talk(chat, "一", line, "二")
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert plain(chat) == [("一", "答1"), ("二", "答2")]


def test_a_bug_in_an_answer_does_not_end_the_chat(chat, capsys, monkeypatch):
    talk(chat, "一")
    monkeypatch.setattr(Echo, "answer", lambda *_: 1 / 0)
    talk(chat, "二")
    assert "error: that failed: ZeroDivisionError: division by zero" in capsys.readouterr().err
    monkeypatch.undo()
    talk(chat, "/retry")
    assert [turn.question for turn in chat.history.turns] == ["一", "二"]


def test_lowest_temperature_still_answers(chat_model):
    options = Options()
    for value, drawn in ((0.01, True), (0.009, False), (1e-40, False)):  # below 0.01 scores would overflow
        options.apply("temperature", value)
        decoding = chat_model.decoding(options)
        assert decoding.do_sample == drawn
        assert len(list(TokenStream(chat_model.model, set()).answer([1, 2, 3], decoding, 5))) == 5


# ---- Fitting into the context window


@pytest.fixture
def long_chat(chat, chat_model, monkeypatch):
    """1,000 turns, in a window that takes some 30 of them; `renderings` counts how often the template was rendered."""
    chat.chat_model = Echo(chat_model, context=1024)
    chat.history.turns = [
        Turn(f"问题{n}：麻黄汤由哪些药组成？", "麻黄、桂枝、杏仁、甘草。", "", True) for n in range(1000)
    ]
    chat.renderings = []
    encode = ChatModel.encode
    monkeypatch.setattr(Echo, "encode", lambda *args: (chat.renderings.append(1), encode(*args))[1])
    return chat


def test_a_long_history_takes_a_handful_of_renderings(long_chat, chat_model):
    began = time.perf_counter()
    talk(long_chat, "一")
    assert len(long_chat.renderings) <= 12 and time.perf_counter() - began < 10
    start = long_chat.history.start
    lengths = [
        len(
            ChatModel.encode(
                chat_model, long_chat.history.messages(long_chat.history.turns[n:-1], "一"), long_chat.options
            )
        )
        for n in (start - 1, start)
    ]
    assert lengths[0] + 64 > 1024 >= lengths[1] + 64  # not a turn more was left out than had to be
    long_chat.renderings.clear()
    talk(long_chat, "二")
    assert len(long_chat.renderings) <= 12
    long_chat.renderings.clear()
    talk(long_chat, "/undo")
    talk(long_chat, "三")
    assert len(long_chat.renderings) <= 12


def test_a_question_that_cannot_fit_is_refused_at_once(long_chat, capsys):
    talk(long_chat, "长" * 10_000)
    assert len(long_chat.renderings) == 1 and "the context window takes 1024" in capsys.readouterr().err
    assert len(long_chat.history.turns) == 1000


# ---- Tab and help


def test_tab_completes_commands():
    assert completions("/s", TYPED) == ["/system", "/set", "/save"]
    assert completions("/cl", TYPED) == ["/clear"] and completions("/by", TYPED) == ["/bye"]
    assert completions("你", TYPED) == completions("", TYPED) == completions("/nothing", TYPED) == []


def test_help_and_notice_in_the_language_of_the_user(chat, capsys, monkeypatch):
    for file in ("help.en.txt", "help.zh.txt"):
        listed = re.findall(
            "^  /([a-z]+)", (ROOT / "utils/chat" / file).read_text(encoding="utf-8"), re.MULTILINE
        )
        assert listed == COMMANDS
    for language, said in (("zh_CN.UTF-8", "撤回上一个问题"), ("en_US.UTF-8", "take back the last question")):
        monkeypatch.delenv("LC_ALL")
        monkeypatch.setenv("LANG", language)
        talk(chat, "/help")
        assert said in capsys.readouterr().err
        monkeypatch.setenv("LC_ALL", language)
        monkeypatch.setenv("LANG", "de_DE.UTF-8")
        talk(chat, "/help")
        assert said in capsys.readouterr().err


# ---- What the model was trained on


SINGLE = {"conversations": "single", "system": "你是中医师。"}


def test_a_model_of_single_questions_starts_each_afresh(chat_model, tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    chat = Chat(Echo(chat_model, record=SINGLE), Options(False, 64), None, lambda name: Echo(chat_model))
    said = capsys.readouterr().err
    assert said.count("/history on") == 1 and "the system text of its training is used: 你是中医师。" in said
    talk(chat, "一", "二", f"/save {path}")
    system = "<|im_start|>system\n你是中医师。<|im_end|>\n<|im_start|>user\n"
    assert [seen.split(system)[1][:1] for seen in chat.chat_model.seen] == ["一", "二"]
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert [[message["content"] for message in row] for row in rows] == [
        ["你是中医师。", "一", "答1"],
        ["你是中医师。", "二", "答2"],
    ]
    talk(chat, "/retry", "/undo", "/history on", "三")
    assert "一<|im_end|>" in chat.chat_model.seen[-1] and "二" not in chat.chat_model.seen[-1]
    talk(chat, "/history off", "四", "/history maybe", "/history")
    said = capsys.readouterr().err
    assert "三" not in chat.chat_model.seen[-1] and "takes on or off" in said
    assert said.count("is shown no earlier question") == 2


def test_another_model_brings_its_own_system_text_unless_one_was_given(chat, chat_model, capsys):
    chat.load = lambda name: Echo(chat_model, record=SINGLE)
    talk(chat, "/model x")
    assert chat.history.afresh and not chat.history.system  # it was given: none
    chat.system_is_given = False
    talk(chat, "/history on", "/model x")
    assert not chat.history.afresh and chat.history.system == "你是中医师。"


def test_the_record_of_a_merged_or_damaged_run(tiny_folder, tmp_path, capsys):
    record = {"status": "finished", "identity": {}, "settings": {"MODEL": "x"}, "results": {}, **SINGLE}
    for inside, content, expected in (
        ("merged", json.dumps(record), record),
        ("checkpoint-20", json.dumps(record), record),
        ("elsewhere", json.dumps(record), {}),
        ("merged", "{", {}),
        ("merged", None, {}),
    ):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}" / inside
        shutil.copytree(tiny_folder, folder)
        if content is not None:
            (folder.parent / "run.json").write_text(content, encoding="utf-8")
        assert ChatModel(str(folder), CPU).record == expected
    told = capsys.readouterr()
    assert told.out == "" and "run.json" in told.err


# ---- What takes a while


def test_loading_is_announced_at_a_terminal_only(capsys, monkeypatch):
    loading("the model")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    loading("\x1b[2Ja folder")
    assert capsys.readouterr().err == "loading \ufffd[2Ja folder ...\n"
