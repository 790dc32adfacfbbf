"""Tokens are made once, and made again wherever what was kept is not whole or was made for anything else."""

import errno
import os
import random

import pytest
from small_runs import make_place, train
from tiny_model import make_tiny_tokenizer
from tokenizers import AddedToken
from transformers import AutoTokenizer

from utils.errors import UserError
from utils.files import read_jsonl, sample_by_id, write_jsonl
from utils.model.chat_format import encode_answer, encode_prompt
from utils.model.chat_format import encode_turns as chat_turns
from utils.model.packing import PackedRows, item_length
from utils.training import rows as rows_module
from utils.training.rows import load_conversations, load_pairs, tell_shared_rows

WORDS = "麻黄 桂枝 <think> 甘草 <|im_end|> 人参 白术\n\n 茯苓 黄芪 🌿 温。"


def some_rows(count, seed=0):
    """Conversations of one to three turns, some with a system text, some with reasoning, some with typed control tokens."""
    draw, rows = random.Random(seed), []

    def text():
        return " ".join(draw.choices(WORDS.split(" "), k=draw.randint(1, 30)))

    for number in range(count):
        messages = [{"role": "system", "content": text()}] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 3)):
            messages.append({"role": "user", "content": text()})
            messages.append({"role": "assistant", "content": text()})
            if draw.random() < 0.5:
                messages[-1]["reasoning_content"] = text()
        rows.append({"id": f"{seed}-{number}", "messages": messages})
    return rows


def some_pairs(count):
    pairs = []
    for row in some_rows(count, seed=1):
        *prompt, chosen = row["messages"]
        rejected = {"role": "assistant", "content": f"不知道{row['id']}"}
        pairs.append({"id": row["id"], "prompt": prompt, "chosen": [chosen], "rejected": [rejected]})
    return pairs


def items_of(rows):
    return [
        {"id": item["id"], "documents": [tuple(document) for document in item["documents"]]}
        for item in rows.items
    ]


def direct(path, tokenizer):
    """The items as chat's own path encodes them, in a list."""
    return [
        {"id": row["id"], "documents": [turn]}
        for row in read_jsonl(path)
        for turn in chat_turns(tokenizer, row["messages"])
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def path(tmp_path):
    write_jsonl(tmp_path / "sft_train.jsonl", some_rows(60))
    return tmp_path / "sft_train.jsonl"


@pytest.fixture
def made(monkeypatch):
    """made() -> how many times tokens were made since it was last asked."""
    calls, encode = [], rows_module.encode_turns
    monkeypatch.setattr(rows_module, "encode_turns", lambda *given: calls.append(given) or encode(*given))

    def count():
        found = len(calls)
        calls.clear()
        return found

    return count


def kept(path):
    return sorted(
        file.name for file in (path.parent / ".tokens").iterdir() if file.name.startswith(path.name)
    )


def test_tokens_are_those_of_chat(tokenizer, path, made):
    """The first time and later, for several batches of rows, and whatever is typed in them."""
    for times in (1, 0):
        rows, thinking, *_ = load_conversations(path, tokenizer, 4096)
        assert made() == times
        assert items_of(rows) == direct(path, tokenizer)
        assert thinking == (
            sum("reasoning_content" in message for row in some_rows(60) for message in row["messages"])
            > len(rows.items) / 2
        )


def test_tokens_of_pairs_are_those_of_chat(tokenizer, path):
    pairs = some_pairs(20)
    write_jsonl(path, pairs)
    expected = []
    for pair in pairs:
        prompt = encode_prompt(tokenizer, pair["prompt"], "reasoning_content" in pair["chosen"][0])
        answers = [encode_answer(tokenizer, pair[side][0]) for side in ("chosen", "rejected")]
        expected.append({"id": pair["id"], "documents": [(prompt, answer) for answer in answers]})
    for _ in range(2):
        rows = load_pairs(path, tokenizer, 4096).rows
        assert items_of(rows) == expected
        assert rows.lengths.tolist() == [item_length(item) for item in expected]


def test_rows_are_packed_as_from_a_list(tokenizer, path, made):
    """The same items in the same rows in the same order, at any MAX_LENGTH, which makes nothing again."""
    everything = direct(path, tokenizer)
    for max_length in (4096, 300, 150):
        cached = load_conversations(path, tokenizer, max_length).rows
        listed = PackedRows([item for item in everything if item_length(item) <= max_length], max_length)
        assert list(cached.rows) == list(listed.rows) and 1 < len(cached)
        texts = [[cached.items[number]["documents"] for number in row] for row in cached.rows]
        assert texts == [[[list(pair) for pair in item["documents"]] for item in row] for row in listed]
        assert (cached.tokens, cached.trained_tokens) == (listed.tokens, listed.trained_tokens)
        assert cached.fullest(3) == listed.fullest(3)
    assert made() == 1


def test_the_drawn_rows_are_those_of_sample_by_id(tokenizer, path):
    for count in (0, 1, 7, 59, 60, 100):
        drawn = {row["id"] for row in sample_by_id(read_jsonl(path), count)}
        rows = load_conversations(path, tokenizer, 4096, count).rows
        assert items_of(rows) == [item for item in direct(path, tokenizer) if item["id"] in drawn]


CHANGES = {
    "data": lambda path, tokenizer, patch: write_jsonl(path, some_rows(59)),
    "tokens": lambda path, tokenizer, patch: tokenizer.add_tokens([AddedToken("桂枝", normalized=False)]),
    "template": lambda path, tokenizer, patch: setattr(
        tokenizer, "chat_template", tokenizer.chat_template.replace("<|im_start|>", "<|im_start|> ")
    ),
    "format": lambda path, tokenizer, patch: patch.setattr(rows_module, "FORMAT", rows_module.FORMAT + 1),
    "versions": lambda path, tokenizer, patch: patch.setattr(rows_module.tokenizers, "__version__", "0.0.1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_the_tokens_makes_them_again(path, tmp_path, made, monkeypatch, capsys, change):
    tokenizer, other = make_tiny_tokenizer(tmp_path / "tokenizer"), change in ("tokens", "template")
    load_conversations(path, tokenizer, 4096)
    before = kept(path)
    CHANGES[change](path, tokenizer, monkeypatch)
    assert made() == 1 and not capsys.readouterr().out
    rows = load_conversations(path, tokenizer, 4096).rows
    assert made() == 1 and items_of(rows) == direct(path, tokenizer)
    assert (f"is of other {change}; making it again" in capsys.readouterr().out) == (not other)
    assert len(kept(path)) == (4 if other else len(before))  # another tokenizer's run may come again


def test_a_flipped_byte_is_found_and_said(tokenizer, path, made, capsys):
    load_conversations(path, tokenizer, 4096)
    [damaged] = (path.parent / ".tokens").glob("*.arrow")
    content = bytearray(damaged.read_bytes())
    content[int(0.6 * len(content))] ^= 0x10
    damaged.write_bytes(content)
    assert made() == 1
    rows = load_conversations(path, tokenizer, 4096).rows
    assert "; making it again" in capsys.readouterr().out
    assert made() == 1 and items_of(rows) == direct(path, tokenizer) and len(kept(path)) == 2


def die_in_the_third_batch(path, folder):
    encode, calls = rows_module.encode_turns, []

    def encode_some(*given):
        calls.append(given)
        return os._exit(9) if len(calls) == 3 else encode(*given)

    rows_module.encode_turns, rows_module.ROWS_AT_ONCE = encode_some, 10
    load_conversations(path, AutoTokenizer.from_pretrained(folder), 4096)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_kill_leaves_nothing_that_is_taken_for_whole(tokenizer, path, tmp_path, made):
    from processes import fork

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    process = fork(die_in_the_third_batch, path, tmp_path / "tokenizer")
    process.join()
    assert process.exitcode == 9
    assert not kept(path) and len(list((path.parent / ".tokens").iterdir())) == 1
    rows = load_conversations(path, tokenizer, 4096).rows
    assert made() and items_of(rows) == direct(path, tokenizer)
    assert [file.name for file in sorted((path.parent / ".tokens").iterdir())] == kept(path)


def test_nothing_is_kept_of_an_attempt_that_failed(tokenizer, path, monkeypatch):
    """A full disk, and a bad row, which is told as ever."""

    def full(*given):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(rows_module.ArrowWriter, "write_table", full)
        with pytest.raises(OSError, match="No space left"):
            load_conversations(path, tokenizer, 4096)
    with open(path, "a", encoding="utf-8") as file:
        file.write("{\n")
    with pytest.raises(UserError, match="line 61: not JSON"):
        load_conversations(path, tokenizer, 4096)
    assert not list((path.parent / ".tokens").iterdir())


@pytest.mark.slow
def test_every_way_to_start_takes_what_is_kept(tmp_path, made, capsys):
    """Examples make the tokens; the estimate and the run read them."""
    place = make_place(tmp_path)
    assert train("sft", place, place / "out", "--show-example", 1) == 0
    assert made() == 1
    assert train("sft", place, place / "out", "--estimate") == 0
    assert made() == 1  # of the evaluation file
    assert train("sft", place, place / "out", "--max-steps", 1) == 0
    assert made() == 0


def single_rows(count):
    return [
        {
            "id": f"{number}",
            "messages": [
                {"role": "user", "content": f"问{number}"},
                {"role": "assistant", "content": f"答{number}"},
            ],
        }
        for number in range(count)
    ]


@pytest.mark.parametrize("join", [0.0, 0.3, 1.0])
def test_single_questions_are_put_behind_others(tokenizer, path, join, capsys):
    """Every answer is trained once, in its own place; a share of the questions has one to three other rows before it, whole."""
    rows = single_rows(200)
    write_jsonl(path, rows)
    alone = items_of(load_conversations(path, tokenizer, 4096).rows)
    loaded = load_conversations(path, tokenizer, 4096, join=join)
    joined = items_of(loaded.rows)
    assert loaded.conversations == ("several" if join else "single")
    assert [(item["id"], item["documents"][0][1]) for item in joined] == [
        (item["id"], item["documents"][0][1]) for item in alone
    ]
    later = [number for number in range(200) if joined[number] != alone[number]]
    assert len(later) == round(join * 200)
    counts = set()
    for number in later:
        [(prompt, _)] = joined[number]["documents"]
        text = tokenizer.decode(prompt)
        before = text.split("<|im_start|>user\n")[1:-1]
        counts.add(len(before))
        for turn in before:
            question, _, answer = turn.partition("<|im_end|>\n<|im_start|>assistant\n")
            other = rows[int(question.removeprefix("问"))]
            assert answer.startswith(other["messages"][1]["content"]) and other["id"] != str(number)
    assert counts == ({1, 2, 3} if join else set())
    lengths = [sum(len(item["documents"][0][0]) for item in items) for items in (joined, alone)]
    costs = f"which costs {lengths[0] - lengths[1]:,} tokens"
    assert (costs in capsys.readouterr().out) == bool(join)
    again = items_of(load_conversations(path, tokenizer, 4096, join=join).rows)
    assert again == joined


def test_rows_that_are_tied_to_a_place_stay_there_and_none_gets_too_long(tokenizer, path):
    tied = [
        {**row, "messages": [{"role": "system", "content": "你是医生。"}, *row["messages"]]}
        for row in single_rows(40)
    ]
    write_jsonl(path, tied)
    assert items_of(load_conversations(path, tokenizer, 4096, join=1.0).rows) == direct(path, tokenizer)
    write_jsonl(path, single_rows(40))
    longest = max(item_length(item) for item in direct(path, tokenizer))
    loaded = load_conversations(path, tokenizer, longest, join=1.0)
    assert items_of(loaded.rows) == direct(path, tokenizer) and loaded.conversations == "single"


def test_rows_to_evaluate_on_that_are_trained_are_counted_by_what_they_say(tokenizer, tmp_path, capsys):
    def load(name, *numbers):
        rows = [{**single_rows(12)[number], "id": f"{name}{number}"} for number in numbers]
        write_jsonl(tmp_path / name, rows)
        return tmp_path / name, load_conversations(tmp_path / name, tokenizer, 4096)

    train = load("train", *range(9))
    tell_shared_rows(*train, *load("eval", 7, 8, 9, 10))
    assert "note: 2 of the rows of" in capsys.readouterr().out
    tell_shared_rows(*train, *load("other", 9, 10, 11))
    assert not capsys.readouterr().out
    tell_shared_rows(*train, *train)
    assert "no evaluation file: the loss is measured on rows that are trained" in capsys.readouterr().out
