"""A conversation: its history and its commands."""

import json

from chat_helpers import Echo, plain, talk

from utils.model.chat_format import encode_turns


def test_history_commands(chat, capsys):
    talk(chat, "一", "二", "", "/undo", "三", "/retry")
    assert plain(chat) == [("一", "答1"), ("三", "答4")]
    talk(chat, "/system 你是中医。", "四")
    assert chat.chat_model.seen[-1] == (
        "<|im_start|>system\n你是中医。<|im_end|>\n<|im_start|>user\n一<|im_end|>\n<|im_start|>assistant\n答1<|im_end|>\n"
        "<|im_start|>user\n三<|im_end|>\n<|im_start|>assistant\n答4<|im_end|>\n<|im_start|>user\n四<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    talk(chat, "/reset", "/undo", "/retry", "/nonsense", "/rest", "／help")
    said = capsys.readouterr().err
    assert not chat.history.turns and chat.history.system
    assert "nothing to take back" in said and "nothing to answer again" in said
    assert "no command /nonsense" in said and "did you mean /reset?" in said and "/model FOLDER" in said
    assert not chat.handle("/exit")


def test_reasoning_is_kept_apart_and_not_shown_to_the_next_turn(chat):
    talk(chat, "/think on", "一", "二")
    assert chat.history.turns[0].messages()[1] == {
        "role": "assistant",
        "content": "答1",
        "reasoning_content": "想",
    }
    assert "想" not in chat.chat_model.seen[1]
    assert chat.chat_model.seen[1].endswith("<|im_start|>assistant\n")


def test_a_stopped_answer_stays_and_an_empty_one_takes_its_question_back(chat, capsys):
    talk(chat, "一", "stop", "early stop")
    assert plain(chat) == [("一", "答1"), ("stop", "答2")] and not chat.history.turns[1].whole
    assert "/retry asks it again" in capsys.readouterr().err
    talk(chat, "/retry", "/undo", "二", "/retry")
    assert plain(chat) == [("一", "答1"), ("二", "答6")]


def test_set(chat, capsys):
    talk(chat, "/set temperature=0.3 top_p=0.5 max_new_tokens=9 seed=7")
    assert chat.options.decoding == {"do_sample": True, "temperature": 0.3, "top_p": 0.5}
    assert chat.options.max_new_tokens == 9 and chat.options.generator.initial_seed() == 7
    for wrong in (
        "heat=1",
        "top_k=many",
        "top_p=0",
        "temperature=nan",
        "top_k",
        "seed=-1",
        "top_p=0.9 temperature=11",
    ):
        capsys.readouterr()
        talk(chat, f"/set {wrong}")
        assert "error: /set" in capsys.readouterr().err
    assert chat.options.decoding["top_p"] == 0.5  # of a line with a mistake nothing is taken
    talk(chat, "/set temperature=0", "/set")
    assert "greedy" in capsys.readouterr().err and not chat.options.decoding["do_sample"]
    talk(chat, "/think maybe", "/think off")
    assert "on, off or auto" in capsys.readouterr().err and chat.options.thinking is False


def test_save_writes_rows_to_train_on(chat, chat_model, tmp_path, capsys):
    path = tmp_path / "我的对话.jsonl"
    path.write_text('{"messages": []}', encoding="utf-8")  # no line break at its end
    talk(chat, f"/save {path}", "/save", f"/save {tmp_path}/x.py", f"/save {tmp_path}/none/x.jsonl")
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
        "/reset",
        "/system",
        "三",
        f"/save {path}",
    )
    said = capsys.readouterr().err
    assert "1 with a cut answer left out" in said and "No such file or directory" in said
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [message["role"] for message in rows[1]["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert rows[2] == {
        "messages": [
            {"role": "user", "content": "三"},
            {"role": "assistant", "content": "答4", "reasoning_content": "想"},
        ]
    }
    prompt, answer = encode_turns(chat_model.tokenizer, rows[1]["messages"])[1]
    assert chat_model.tokenizer.decode(prompt).endswith("二<|im_end|>\n<|im_start|>assistant\n")
    assert chat_model.tokenizer.decode(answer) == "<think>\n想\n</think>\n\n答3<|im_end|>"


def test_oldest_turns_are_left_out_whole(chat, chat_model, capsys):
    chat.chat_model = Echo(chat_model, context=256)
    talk(chat, "/system 你是中医。", *[f"问题{number}：麻黄汤由哪些药组成？" for number in range(8)])
    last = chat.chat_model.seen[-1]
    assert last.startswith("<|im_start|>system\n你是中医。<|im_end|>\n<|im_start|>user\n问题")
    left_out = chat.history.start
    assert 0 < left_out < 7 and f"问题{left_out - 1}" not in last
    assert all(f"问题{number}" in last for number in range(left_out, 8))
    assert len(chat_model.tokenizer(last)["input_ids"]) + 64 <= 256
    assert f"the oldest {left_out} of 7 turns are left out" in capsys.readouterr().err
    assert len(chat.history.turns) == 8  # /save and /undo still know them
    talk(chat, "长" * 300)
    assert "the context window takes 256" in capsys.readouterr().err and len(chat.history.turns) == 8
    talk(chat, "/undo", "短")
    assert chat.history.turns[-1].question == "短"
