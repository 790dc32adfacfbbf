"""Training rows for other trainers: nothing is lost, and TRL trains the tokens that we train, and one final line break."""

import pytest
from tiny_model import make_tiny_model
from transformers import AutoTokenizer

from model_download import export_model
from utils.errors import run
from utils.files import read_jsonl, write_jsonl
from utils.model.chat_format import encode_answer, encode_prompt, encode_turns


def message(role, content, reasoning=None):
    return {"role": role, "content": content, **({"reasoning_content": reasoning} if reasoning else {})}


PLAIN = [message("system", "你是中医。"), message("user", "麻黄？"), message("assistant", "温。")]
LONGER = [*PLAIN, message("user", "归经？"), message("assistant", "肺、膀胱经。")]
THOUGHTFUL = [message("user", "甘草？"), message("assistant", "平。", "问的是药性。"), message("user", "味？"),
              message("assistant", "甘。", "问的是\n味。")]  # fmt: skip
PAIR = {"prompt": PLAIN[:2], "chosen": PLAIN[2:], "rejected": [message("assistant", "寒。")]}


@pytest.fixture
def export(tmp_path):
    """export(form, conversations) -> the folder with the rows in that form"""

    def export(form, conversations, pairs=(PAIR,), code=0):
        rows = [{"id": str(n), "messages": messages} for n, messages in enumerate(conversations)]
        write_jsonl(tmp_path / "sft_train.jsonl", rows)
        if pairs:
            write_jsonl(tmp_path / "dpo_train.jsonl", [{"id": "0", **pair, "kind": ""} for pair in pairs])
        words = ["--form", form, "--data-dir", tmp_path, "--output-dir", tmp_path / form]
        assert run(lambda: export_model.main(["--format", "training-data", *map(str, words)])) == code
        return tmp_path / form

    return export


def test_messages_hold_one_answer_to_train_in_its_context(export):
    output = export("messages", [PLAIN, LONGER])
    rows = [row["messages"] for row in read_jsonl(output / "sft_train.jsonl")]
    marks = [[message.pop("train", False) for message in row] for row in rows]
    assert marks == [[False] * 2 + [True], [False] * 2 + [True], [False] * 4 + [True]]
    assert rows == [PLAIN, PLAIN, LONGER]
    [pair] = read_jsonl(output / "dpo_train.jsonl")
    assert pair == {"messages": PLAIN[:2], "chosen": PAIR["chosen"][0], "rejected": PAIR["rejected"][0]}


def test_reasoning_becomes_text_in_messages(export):
    first, second = read_jsonl(export("messages", [THOUGHTFUL], pairs=()) / "sft_train.jsonl")
    assert first["messages"][-1]["content"] == "<think>\n问的是药性。\n</think>\n\n平。"
    assert second["messages"][1] == message("assistant", "平。")  # history carries no reasoning
    assert second["messages"][-1]["content"] == "<think>\n问的是\n味。\n</think>\n\n甘。"


def test_rows_of_both_modes_are_refused_where_they_cannot_be_trained_so(export, capsys):
    export("messages", [PLAIN, THOUGHTFUL], code=2)
    assert "rows with reasoning and rows without" in capsys.readouterr().err


@pytest.mark.slow
def test_trl_trains_the_same_tokens_and_pairs(export, tmp_path):
    import trl
    from datasets import load_dataset

    folder = make_tiny_model(tmp_path / "tiny")
    tokenizer, made = AutoTokenizer.from_pretrained(folder), {}
    place = export("prompt-completion", [LONGER, THOUGHTFUL])
    for method in ("SFT", "DPO"):
        path = str(place / f"{method.lower()}_train.jsonl")
        rows = load_dataset("json", data_files=path, split="train", cache_dir=tmp_path / "c")
        config, trainer = getattr(trl, f"{method}Config"), getattr(trl, f"{method}Trainer")
        settings = config(str(tmp_path / method), use_cpu=True, bf16=False, report_to="none")
        trained = trainer(str(folder), args=settings, train_dataset=rows, processing_class=tokenizer)
        made[method] = trained.train_dataset
    line_break = tokenizer("\n")["input_ids"]
    expected = [turn for messages in (LONGER, THOUGHTFUL) for turn in encode_turns(tokenizer, messages)]
    assert len(made["SFT"]) == len(expected) == 4
    for row, (prompt, answer) in zip(made["SFT"], expected):
        assert row["input_ids"] == prompt + answer + line_break
        assert row["labels"] == [-100] * len(prompt) + answer + line_break
    [row] = made["DPO"]
    assert row["prompt_ids"] == encode_prompt(tokenizer, PLAIN[:2], thinking=False)
    for side in ("chosen", "rejected"):
        assert row[f"{side}_ids"] == encode_answer(tokenizer, PAIR[side][0]) + line_break
