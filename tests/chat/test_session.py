"""A conversation and its commands as people type them: what the model is shown, what is kept, and that no command ends it."""

import json
import re
import shutil

from chat_helpers import CPU, Echo, plain, talk
from conftest import ROOT

from utils.chat.model import ChatModel, Options
from utils.chat.session import COMMANDS, Chat
from utils.chat.terminal import read_message
from utils.model.chat_format import encode_turns
from utils.model.generate import TokenStream


def rows_of(path):
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


# ---- What is typed


def test_what_is_typed(chat, monkeypatch):
    for typed in (["你好"], ['"""一', "二", "", '三"""'], ['"""', "/undo", '"""'], ['"""一"""']):
        lines = iter(typed)
        monkeypatch.setattr("builtins.input", lambda prompt, lines=lines: next(lines))
        assert read_message() == "\n".join(typed) and next(lines, None) is None
    assert not any(chat.handle(line) for line in ("/exit", "exit", "quit", "／exit"))
    talk(chat, "what does exit mean?", '"""\n第一行\n/undo\n"""', '"""/help"""')
    assert [asked for asked, _ in plain(chat)] == ["what does exit mean?", "第一行\n/undo", "/help"]


def test_help_in_the_language_of_the_user(chat, capsys, monkeypatch):
    for file in ("help.en.txt", "help.zh.txt"):
        text = (ROOT / "utils/chat" / file).read_text(encoding="utf-8")
        assert re.findall("^  /([a-z]+)", text, re.MULTILINE) == COMMANDS
        assert max(map(len, text.splitlines())) < 100
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
    talk(chat, "/clear", "/undo", "/retry", "/nonsense", "／help")
    said = capsys.readouterr().err
    assert not chat.turns and chat.chat_model.system
    for told in ("nothing to take back", "nothing to answer again", "no command /nonsense", "/model FOLDER"):
        assert told in said


def test_thinking_is_kept_apart_and_not_shown_to_the_next_turn(chat, capsys):
    talk(chat, "/think on", "一", "二")
    assert chat.turns[0].messages[1]["reasoning_content"] == "想" and chat.turns[0].whole
    assert "想" not in chat.chat_model.seen[1]
    assert chat.chat_model.seen[1].endswith("<|im_start|>assistant\n")
    talk(chat, "/think maybe", "/think off", "/think")
    said = capsys.readouterr().err
    assert "on, off or auto" in said and said.count("thinking off; temperature 0.7, top_p 0.8") == 2
    talk(chat, "/think auto")
    assert "(the folder's own mode)" in capsys.readouterr().err and chat.options.thinking is None


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
    talk(chat, "/system 你是中医。", "一", "stop", "/think on", "二")
    talk(chat, f"/save {path}", f"/save {tmp_path}/none/x.jsonl")
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
    chat.chat_model = model = Echo(chat_model, context=256)
    talk(chat, "/system 你是中医。", *[f"问题{number}：麻黄汤由哪些药组成？" for number in range(8)])
    last, left_out = model.seen[-1], chat.start
    assert last.startswith("<|im_start|>system\n你是中医。<|im_end|>\n<|im_start|>user\n问题")
    assert 0 < left_out < 7 and f"问题{left_out - 1}" not in last
    assert all(f"问题{number}" in last for number in range(left_out, 8))
    length = len(chat_model.tokenizer(last)["input_ids"])
    turn = len(chat_model.tokenizer("问题" + last.split("问题")[1])["input_ids"])
    assert length + 64 <= 256 < length + turn + 64  # not a turn more was left out than had to be
    assert f"the oldest {left_out} of 7 turns are left out" in capsys.readouterr().err
    assert len(chat.turns) == 8  # /save and /undo still know them
    talk(chat, "长" * 10_000, "/undo", "短")
    assert "the context window takes 256" in capsys.readouterr().err and plain(chat)[-1][0] == "短"
    assert chat.start == left_out


# ---- Models


def test_lowest_temperature_still_answers(chat_model):
    for value, drawn in ((0.01, True), (0.009, False), (1e-40, False)):  # below 0.01 scores would overflow
        decoding = chat_model.decoding(Options(numbers={"temperature": value}))
        assert decoding.do_sample == drawn
        assert len(list(TokenStream(chat_model.model, set()).answer([1, 2, 3], decoding, 5))) == 5


def test_model_changes_and_the_conversation_goes_on(chat, tiny_folder, capsys, monkeypatch):
    monkeypatch.setattr("utils.chat.session.find_models", lambda: [tiny_folder])
    talk(chat, "/system x", "一", "/model")
    monkeypatch.undo()  # a number is that of the list as it was shown
    talk(chat, "/model 1", "二", "/model 7", "/model no/such/folder")
    said = capsys.readouterr().err
    assert "  1  " in said and "(echo is answering; /model FOLDER" in said
    assert f"{tiny_folder} on cpu, fp32" in said
    assert "7 does not exist" in said and "no/such/folder does not exist" in said
    assert [asked for asked, _ in plain(chat)] == ["一", "二"]
    assert chat.chat_model.name == str(tiny_folder) and chat.chat_model.system == ""


def test_nothing_ends_the_chat(chat, tiny_folder, tmp_path, capsys, monkeypatch):
    broken = shutil.copytree(tiny_folder, tmp_path / "BROKEN")  # its chat template raises an error of its own
    (broken / "chat_template.jinja").write_text("{{ 1 / 0 }}", encoding="utf-8")
    (shutil.copytree(tiny_folder, tmp_path / "CUT") / "model.safetensors").write_bytes(b"\0" * 100)
    wrong = ["/save ~nobody_here/x.jsonl", "/save a\0b.jsonl", f"/save {'x' * 300}.jsonl"]
    wrong += [
        f"/model {name}" for name in ("~nobody_here/x", "x" * 5000, "9" * 5000, broken, tmp_path / "CUT")
    ]
    for number, line in enumerate(wrong, 1):
        talk(chat, "一", line)
        said = capsys.readouterr().err
        assert said.count("error: ") == 1 and "Traceback" not in said, line
        assert plain(chat)[-1] == ("一", f"答{number}")
    monkeypatch.setattr(Echo, "answer", lambda *_: 1 / 0)
    talk(chat, "二")
    assert "error: that failed: ZeroDivisionError: division by zero" in capsys.readouterr().err
    assert len(chat.turns) == len(wrong)


# ---- What the model was trained on


def test_a_model_of_single_questions_starts_each_afresh(chat_model, tmp_path, capsys):
    path, model = tmp_path / "x.jsonl", Echo(chat_model, single=True, system="你是中医师。")
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
