"""A conversation and its commands as people type them: what the model is shown, what is kept, and that no command ends it."""

import json
import re
import shutil

import pytest
from chat_helpers import CPU, Echo, damaged, plain, talk
from conftest import ROOT

from utils.chat.model import RULES, ChatModel, Options
from utils.chat.session import COMMANDS, TYPED, Chat, Turn, as_messages
from utils.chat.terminal import completions, loading, read_message
from utils.model.chat_format import encode_turns
from utils.model.generate import TokenStream


def rows_of(path):
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


# ---- What is typed


@pytest.mark.parametrize("line", ["/exit", "exit", "quit", "／exit"])
def test_words_that_leave(chat, line):
    assert not chat.handle(line)
    talk(chat, f"what does {line} mean?")
    assert len(chat.turns) == 1


@pytest.mark.parametrize(
    "typed", [["你好"], ['"""一', "二", "", '三"""'], ['"""', "/undo", '"""'], ['"""一"""']]
)
def test_messages_of_several_lines(monkeypatch, typed):
    lines = iter(typed)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert read_message() == "\n".join(typed) and next(lines, None) is None


def test_a_question_in_quotes_is_text(chat):
    talk(chat, '"""\n第一行\n/undo\n"""', '"""/help"""')
    assert [turn.question for turn in chat.turns] == ["第一行\n/undo", "/help"]


def test_tab_completes_commands():
    assert completions("/s", TYPED) == ["/system", "/set", "/save"]
    assert completions("你", TYPED) == completions("", TYPED) == completions("/nothing", TYPED) == []


def test_help_in_the_language_of_the_user(chat, capsys, monkeypatch):
    for file in ("help.en.txt", "help.zh.txt"):
        text = (ROOT / "utils/chat" / file).read_text(encoding="utf-8")
        assert re.findall("^  /([a-z]+)", text, re.MULTILINE) == COMMANDS
        assert (
            set(RULES) <= set(re.findall(r"\w+_\w+|[a-z]+", text)) and max(map(len, text.splitlines())) < 100
        )
    for all_, lang, said in (
        ("", "zh_CN.UTF-8", "撤回上一个问题"),
        ("zh_TW.UTF-8", "de_DE.UTF-8", "撤回上一个问题"),
        ("en_US.UTF-8", "zh_CN.UTF-8", "take back the last question"),
        ("", "C", "take back the last question"),
    ):
        monkeypatch.setenv("LC_ALL", all_)
        monkeypatch.setenv("LANG", lang)
        talk(chat, "/help")
        assert said in capsys.readouterr().err


def test_loading_is_announced_at_a_terminal_only(capsys, monkeypatch):
    loading("the model")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    loading("\x1b[2Ja folder")
    assert capsys.readouterr().err == "loading \ufffd[2Ja folder ...\n"


# ---- The turns


def test_commands_that_change_the_conversation(chat, capsys):
    talk(chat, "一", "二", "", "/undo", "三", "/retry")
    assert plain(chat) == [("一", "答1"), ("三", "答4")]
    talk(chat, "/system 你是中医。", "四")
    assert chat.chat_model.seen[-1] == (
        "<|im_start|>system\n你是中医。<|im_end|>\n<|im_start|>user\n一<|im_end|>\n<|im_start|>assistant\n答1<|im_end|>\n"
        "<|im_start|>user\n三<|im_end|>\n<|im_start|>assistant\n答4<|im_end|>\n<|im_start|>user\n四<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    talk(chat, "/clear", "/undo", "/retry", "/nonsense", "/retri", "／help")
    said = capsys.readouterr().err
    assert not chat.turns and chat.system
    assert "nothing to take back" in said and "nothing to answer again" in said
    assert "no command /nonsense" in said and "did you mean /retry?" in said and "/model FOLDER" in said


def test_reasoning_is_kept_apart_and_not_shown_to_the_next_turn(chat):
    talk(chat, "/think on", "一", "二")
    assert chat.turns[0] == Turn("一", "答1", "想", True)
    assert "想" not in chat.chat_model.seen[1]
    assert chat.chat_model.seen[1].endswith("<|im_start|>assistant\n")


def test_a_stopped_answer_stays_and_an_empty_one_takes_its_question_back(chat, capsys):
    talk(chat, "一", "stop", "early stop")
    assert plain(chat) == [("一", "答1"), ("stop", "答2")] and not chat.turns[1].whole
    assert "the question is not kept" in capsys.readouterr().err


def test_save_writes_rows_to_train_on(chat, chat_model, tmp_path, capsys):
    path = tmp_path / "我的对话.jsonl"
    path.write_text('{"messages": []}', encoding="utf-8")  # no line break at its end
    talk(chat, f"/save {path}", "/save", f"/save {tmp_path}/x.py")
    said = capsys.readouterr().err
    assert "nothing to save" in said and said.count("needs the name of a .jsonl file") == 2
    talk(
        chat,
        "/system 你是中医。",
        "一",
        "stop",
        "/think on",
        "二",
        f"/save {path}",
        f"/save {tmp_path}/none/x.jsonl",
    )
    said = capsys.readouterr().err
    assert "2 turns appended" in said and "1 with a cut answer left out" in said
    assert "No such file or directory" in said
    row = rows_of(path)[1]
    assert [message["role"] for message in row] == ["system", *2 * ["user", "assistant"]]
    assert row[4] == {"role": "assistant", "content": "答3", "reasoning_content": "想"}
    prompt, answer = encode_turns(chat_model.tokenizer, row)[1]
    assert chat_model.tokenizer.decode(prompt).endswith("二<|im_end|>\n<|im_start|>assistant\n")
    assert chat_model.tokenizer.decode(answer) == "<think>\n想\n</think>\n\n答3<|im_end|>"


def test_oldest_turns_are_left_out_whole(chat, chat_model, capsys):
    chat.chat_model = Echo(chat_model, context=256)
    talk(chat, "/system 你是中医。", *[f"问题{number}：麻黄汤由哪些药组成？" for number in range(8)])
    last, left_out = chat.chat_model.seen[-1], chat.start
    assert last.startswith("<|im_start|>system\n你是中医。<|im_end|>\n<|im_start|>user\n问题")
    assert 0 < left_out < 7 and f"问题{left_out - 1}" not in last
    assert all(f"问题{number}" in last for number in range(left_out, 8))
    assert len(chat_model.tokenizer(last)["input_ids"]) + 64 <= 256
    assert f"the oldest {left_out} of 7 turns are left out" in capsys.readouterr().err
    assert len(chat.turns) == 8  # /save and /undo still know them
    talk(chat, "长" * 10_000, "/undo", "短")
    assert "the context window takes 256" in capsys.readouterr().err and chat.turns[-1].question == "短"


def test_a_long_conversation_takes_a_handful_of_renderings(chat, chat_model, monkeypatch):
    """200 turns, in a window that takes some 15 of them."""
    chat.chat_model, renderings = Echo(chat_model, context=512), []
    chat.turns = [
        Turn(f"问题{number}：麻黄汤由哪些药组成？", "麻黄、桂枝、杏仁。", "", True) for number in range(200)
    ]
    monkeypatch.setattr(Echo, "encode", lambda *args: (renderings.append(1), ChatModel.encode(*args))[1])
    for line in ("一", "二", "三"):
        renderings.clear()
        talk(chat, line)
        assert len(renderings) <= 11
    prompts = [
        ChatModel.encode(chat_model, as_messages("", chat.turns[first:-1], "三"), chat.options)
        for first in (chat.start - 1, chat.start)
    ]
    assert len(prompts[0]) + 64 > 512 >= len(prompts[1]) + 64  # not a turn more was left out than had to be


# ---- Settings and models


def test_set(chat, capsys):
    talk(chat, "/set temperature=0.3", "/set top_p  0.5", "/set max_new_tokens 9", "/set seed=7", "/set")
    assert chat.options.numbers == {"temperature": 0.3, "top_p": 0.5, "max_new_tokens": 9, "seed": 7}
    assert chat.options.generator().initial_seed() == 7
    assert capsys.readouterr().err.count("temperature 0.3, top_p 0.5") == 4
    for wrong in ("presence_penalty=1", "top_k=many", "top_p=0", "temperature=nan", "top_k", "seed=-1"):
        talk(chat, f"/set {wrong}")
        assert "error: /set" in capsys.readouterr().err
    talk(chat, "/set temperature=0", "/set repetition_penalty=1.2", "/think maybe", "/think")
    said = capsys.readouterr().err
    assert "greedy, repetition_penalty 1.2" in said
    assert "on, off or auto" in said and "thinking off; " in said and chat.options.thinking is False
    talk(chat, "/think auto")
    assert "(the folder's own mode)" in capsys.readouterr().err and chat.options.thinking is None


def test_lowest_temperature_still_answers(chat_model):
    for value, drawn in ((0.01, True), (0.009, False), (1e-40, False)):  # below 0.01 scores would overflow
        decoding = chat_model.decoding(Options(numbers={"temperature": value}))
        assert decoding.do_sample == drawn
        assert len(list(TokenStream(chat_model.model, set()).answer([1, 2, 3], decoding, 5))) == 5


def test_model_changes_and_the_conversation_goes_on(chat, tiny_folder, capsys, monkeypatch):
    monkeypatch.setattr("utils.chat.session.find_models", lambda: [tiny_folder])
    talk(chat, "一", "/model", "/model 1", "二")
    said = capsys.readouterr().err
    assert (
        "  1  " in said
        and "(echo is answering; /model FOLDER" in said
        and f"{tiny_folder} on cpu, fp32" in said
    )
    assert [turn.question for turn in chat.turns] == ["一", "二"] and chat.chat_model.name != "echo"
    talk(chat, "/model 7", "/model no/such/folder")
    said = capsys.readouterr().err
    assert "7 does not exist" in said and "no/such/folder does not exist" in said
    assert chat.chat_model.name == str(tiny_folder)


WRONG = [
    "/save ~nobody_here/x.jsonl",
    "/model ~nobody_here/x",
    "/save a\0b.jsonl",
    f"/save {'x' * 300}.jsonl",
]
WRONG += [
    f"/model {'x' * 5000}",
    "/set temperature=1e40",
    "/set top_k=" + "9" * 5000,
    "/model BROKEN",
    "/model CUT",
]


@pytest.mark.parametrize("line", WRONG, ids=lambda line: line[:30])
def test_no_command_ends_the_chat(chat, tiny_folder, tmp_path, capsys, line):
    broken = damaged(tiny_folder, tmp_path / "BROKEN")  # its chat template raises an error of its own
    (broken / "chat_template.jinja").write_text("{{ 1 / 0 }}", encoding="utf-8")
    (damaged(tiny_folder, tmp_path / "CUT") / "model.safetensors").write_bytes(b"\0" * 100)
    talk(chat, "一", re.sub("BROKEN|CUT", lambda found: str(tmp_path / found[0]), line), "二")
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert plain(chat) == [("一", "答1"), ("二", "答2")]


def test_a_bug_in_an_answer_does_not_end_the_chat(chat, capsys, monkeypatch):
    monkeypatch.setattr(Echo, "answer", lambda *_: 1 / 0)
    talk(chat, "一")
    assert "error: that failed: ZeroDivisionError: division by zero" in capsys.readouterr().err
    monkeypatch.undo()
    talk(chat, "二")
    assert [turn.question for turn in chat.turns] == ["二"]


# ---- What the model was trained on

SINGLE = {"single": True, "system": "你是中医师。"}


def test_a_model_of_single_questions_starts_each_afresh(chat_model, tmp_path, capsys):
    path, model = tmp_path / "x.jsonl", Echo(chat_model, **SINGLE)
    chat = Chat(model, Options(False), lambda name: Echo(chat_model))
    said = capsys.readouterr().err
    assert said.count("/history on") == 1 and "system text: 你是中医师。" in said
    talk(chat, "一", "二", f"/save {path}")
    system = "<|im_start|>system\n你是中医师。<|im_end|>\n<|im_start|>user\n"
    assert [seen.split(system)[1][:1] for seen in model.seen] == ["一", "二"]
    rows = [[message["content"] for message in row] for row in rows_of(path)]
    assert rows == [["你是中医师。", "一", "答1"], ["你是中医师。", "二", "答2"]]
    talk(chat, "/retry", "/undo", "/history on", "三")
    assert "一<|im_end|>" in model.seen[-1] and "二" not in model.seen[-1]
    talk(chat, "/history off", "四", "/history maybe", "/history")
    said = capsys.readouterr().err
    assert "三" not in model.seen[-1] and "takes on or off" in said
    assert said.count("is asked by itself") == 2


def test_another_model_brings_its_own_ways_unless_a_command_has_set_them(chat, chat_model):
    chat.load = lambda name: Echo(chat_model, **SINGLE)
    talk(chat, "/model x")
    assert chat.afresh and chat.system == "你是中医师。"
    talk(chat, "/history on", "/system", "/model x")
    assert not chat.afresh and chat.system == ""


def test_the_record_of_a_merged_or_damaged_run(tiny_folder, tmp_path, capsys):
    record = {"status": "finished", "identity": {}, "settings": {"MODEL": "x"}, "results": {}}
    whole = json.dumps(record | {"conversations": "single", "system": "你是中医师。"})
    cases = [
        ("merged", whole, True),
        ("checkpoint-20", whole, True),
        ("elsewhere", whole, False),
        ("merged", "{", False),
    ]
    for number, (inside, content, found) in enumerate(cases):
        folder = tmp_path / str(number) / inside
        shutil.copytree(tiny_folder, folder)
        (folder.parent / "run.json").write_text(content, encoding="utf-8")
        model = ChatModel(str(folder), CPU)
        assert (model.single, model.system) == (found, "你是中医师。" if found else "")
        assert ChatModel(str(folder), CPU, "自己的").system == "自己的"
    told = capsys.readouterr()
    assert told.out == "" and "run.json" in told.err
