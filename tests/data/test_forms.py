"""The forms in which rows come, and what becomes of each: read, set aside with a reason, or read with fields that are named."""

import json
import re

import pytest
from data_rows import turns, write_lines

from utils.data.messages import Reject, is_empty
from utils.data.schemas import RowOptions, convert_row, parse_columns
from utils.errors import UserError

STEM, HERBS = "善治项背强痛的药是", ["葛根", "独活", "杜仲", "续断"]
LETTERED = dict(zip("ABCD", HERBS))
BELOW = "\n".join(f"{letter} {text}" for letter, text in LETTERED.items())
ITEM = {"question": STEM, "options": LETTERED, "answer": "A", "subject": ""}


def fields(*names):
    return dict(zip(names, HERBS))


# Exams, all of the same item: what is different is where the options are, and how the right one is named.
EXAMS = [
    {"question": STEM, **fields("opa", "opb", "opc", "opd"), "answer": "opa"},
    {"question": STEM, **fields("opa", "opb", "opc", "opd"), "cop": 0},
    {"题目": STEM, **fields("选项A", "选项B", "选项C", "选项D"), "答案": "A"},
    {"题干": STEM, **fields("选项1", "选项2", "选项3", "选项4"), "正确答案": "1"},
    {"question": STEM, **fields("option_a", "option_b", "option_c", "option_d"), "answer": "A"},
    {"question": STEM, **fields("optionA", "optionB", "optionC", "optionD"), "correct_answer": "optionA"},
    {"stem": STEM, **fields("Option 1", "Option 2", "Option 3", "Option 4"), "key": 1},
    {"question": STEM, **fields("choice_0", "choice_1", "choice_2", "choice_3"), "label": 0},
    {"qtext": STEM, "qtype": "单选题", "options": LETTERED, "answer": "A"},
    {"question": STEM, **fields("A", "B", "C", "D"), "E": "nan", "answer": "a"},
    {"Question": STEM, "Options": BELOW, "Answer": "A"},
    {"Question": STEM, "Options": BELOW.replace("\n", "\\n"), "Answer": "A"},
    {"question": STEM, "option_list": HERBS, "answer": ["葛根"]},
    {"question": STEM, "choices": HERBS, "answer": 0},
    {"question": STEM, "options": [f"{letter}. {text}" for letter, text in LETTERED.items()], "answer": "Ａ"},
    {"question": STEM, "options": LETTERED, "answer": "葛根", "answer_idx": "A"},
    {"question": STEM, "options": LETTERED, "answer": "A. 葛根"},
    {"question": STEM, "options": "A.葛根|B.独活|C.杜仲|D.续断", "answer": "a"},
    {"题目": STEM, "选项": "A、葛根\nB、独活\nC、杜仲\nD、续断", "答案": "A", "解析": ""},
    {"instruction": f"{STEM} A.葛根 B.独活 C.杜仲 D.续断", "input": "", "output": "A"},
    {"query": STEM, "choices": HERBS, "answers": ["葛根"]},
    {"question": STEM, "options": str(HERBS), "answer": "A"},
    {"question": STEM, "options": json.dumps(LETTERED), "answer": ["A"]},
    {"question": STEM, "options": [{"A": "葛根"}, {"B": "独活"}, {"C": "杜仲"}, {"D": "续断"}], "answer": "(A)"},
    {"question": STEM, "choices": {"text": HERBS, "label": list("ABCD")}, "answerKey": "A"},
    {"question": STEM, "options": [f"{n}.{text}" for n, text in enumerate(HERBS, 1)], "answer": "1"},
    {"question": STEM, "options": "A.葛根B.独活C.杜仲D.续断", "answer": "答案：A"},
    {"question": STEM, "options": "A葛根B独活C杜仲D续断", "answer": "【A】"},
    {"instruction": f"{STEM}\n{BELOW}", "output": "A"},
    {"instruction": STEM, "input": "A.葛根B.独活C.杜仲D.续断", "output": "A"},
    {"question": f"{STEM}\nA．葛根\nB．独活\nC．杜仲\nD．续断", "answer": ["A"]},
    {"prompt": f"{STEM}\n(A)葛根\n(B)独活\n(C)杜仲\n(D)续断", "completion": "答案是A。"},
    {"messages": turns(f"{STEM}\n{BELOW}", "A")},
]  # fmt: skip


@pytest.mark.parametrize("row", EXAMS)
def test_exam_items_are_never_trained_as_questions(row):
    item = convert_row(row)
    assert (item.kind, item.body, item.unused) == ("exam", ITEM, {})


COUNTED = [  # answers of a file, their letters, and whether it is told that nothing proves from where they are counted
    ([1, 4, 2], "ADB", False),  # a 4 of four options: counted from 1
    ([0, 3, 1], "ADB", False),
    (["1", "4", "2"], "ADB", False),
    (["1", "B"], "AB", False),
    ([1, 2, 3], "BCD", True),  # a list, as MMLU counts it, where nothing says otherwise
]


@pytest.mark.parametrize("answers, letters, told", COUNTED)
def test_numbers_of_answers_are_counted_as_the_file_counts_them(
    tmp_path, convert, capsys, answers, letters, told
):
    rows = [{"question": f"{STEM}{n}", "options": HERBS, "answer": given} for n, given in enumerate(answers)]
    found = convert(write_lines(tmp_path / "a.jsonl", *rows))
    assert "".join(row["answer"] for row in found["exam"]) == letters
    note = "note: exam answers that are numbers were counted from 0 in 3 rows"
    assert (note in capsys.readouterr().out) == told


@pytest.mark.parametrize("columns", ["options=甲栏+乙栏+丙栏+丁栏", "options=全"])
def test_columns_name_options(columns):
    row = {
        "问句": STEM,
        "对的": "A",
        "question": "别的",
        "全": HERBS,
        **fields("甲栏", "乙栏", "丙栏", "丁栏"),
    }
    options = RowOptions(tuple(parse_columns(f"question=问句,answer=对的,{columns}").items()))
    assert convert_row(row, options).body == ITEM
    with pytest.raises(Reject, match="an option letter without its options"):
        convert_row(row, RowOptions((("question", "问句"), ("answer", "对的"))))


REASONED = [{**turns("问", "答")[0]}, {**turns("问", "答")[1], "reasoning_content": "想"}]
ASKED = turns("问", "答")
# A row, and the messages that it becomes and the fields of it that are not used.
READ = [
    ({"instruction": "问", "input": float("nan"), "output": "答", "year": "nan"}, ASKED, []),
    ({"instruction": "问", "input": "<noinput>", "output": "答"}, ASKED, []),
    ({"instruction": ["问"], "input": "", "output": ["答"]}, ASKED, []),
    ({"question": "问", "reasoning": "想", "answer": "答"}, REASONED, []),
    ({"instruction": "问", "input": "", "cot": "想", "output": "答"}, REASONED, []),
    ({"input": "问", "reasoning_content": "想", "content": "答"}, REASONED, []),
    ({"messages": [ASKED[0], {**ASKED[1], "thinking": "想"}]}, REASONED, []),
    ({"messages": [ASKED[0], {**ASKED[1], "reasoning": "想"}], "n": 3}, REASONED, ["n"]),
    ({"messages": [ASKED[0], {**ASKED[1], "thinking": "想", "reasoning": "思"}]}, None, ["messages[].thinking"]),
    ({"messages": REASONED, "cot": "别的"}, REASONED, ["cot"]),
    ({"system_prompt": "医", "instruction": "问", "input": "", "output": "答"}, turns("问", "答", system="医"), []),
    ({"messages": ASKED, "系统提示": "医"}, turns("问", "答", system="医"), []),
    ({"instruction": "只用一句话。", "question": "问", "answer": "答"}, ASKED, ["instruction"]),
    ({"instruction": "问", "context": "文", "response": "答"}, turns("问\n文", "答"), []),
    ({"query": "问", "response": "答", "label": "内科"}, ASKED, ["label"]),
    ({"question": "问", "answer": "答", "score": 3, "model_answer": "别"}, ASKED, ["score", "model_answer"]),
    ({"data": ["问：问", "答：答"]}, ASKED, []),
    ({"data": ["Q: 问", "A: 答"]}, ASKED, []),
    ({"instruction": "问：问", "output": "答：答"}, ASKED, []),
    ({"instruction": "问：问", "output": "答案"}, turns("问：问", "答案"), []),
    ({"instruction": "答：问", "output": "答案"}, turns("答：问", "答案"), []),
    ({"conversations": [[{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]]}, ASKED, []),
    ({"instruction": "问", "input": "N/A", "output": "答", "systemPrompt": "医"}, turns("问", "答", system="医"), []),
    ({"Instruction": "问", "Reasoning-Content": "想", "Output": "答"}, REASONED, []),
    ({"dialogue": [{"speaker": "患者", "text": "问"}, {"speaker": "医生", "text": "答"}]}, ASKED, []),
    ({"questions": ["问"], "answers": ["答"]}, ASKED, []),
    ({"kind": "问答", "input": "问", "target": "答"}, ASKED, ["kind"]),
    ({"dialogue": [{"speaker": "病人", "sentence": "问"}, {"speaker": "大夫", "sentence": "答"}]}, ASKED, []),
    ({"conversation": [{"human": "问", "assistant": "答"}], "id": "7"}, ASKED, ["id"]),
    ({"instruction": "<user>: 一 <bot>: 二 <user>: 问", "output": "答"}, turns("一", "二", "问", "答"), []),
    ({"instruction": "Human: 问\n\nAssistant:", "output": "答"}, ASKED, []),
    ({"text": "### Human: 问### Assistant: 答"}, ASKED, []),
    ({"instruction": "医生：您好\n患者：问", "output": "答"}, ASKED, []),
    ({"instruction": "患者：一\n医生：二\n患者：问", "output": "答"}, turns("一", "二", "问", "答"), []),
    ({"instruction": "患者：男，四十岁。", "output": "答"}, turns("患者：男，四十岁。", "答"), []),
    ({"text": "Human: 问\nAssistant: 答", "source": "某处"}, ASKED, ["source"]),
    ({"messages": [{**ASKED[0], "loss": False}, {**ASKED[1], "loss": True, "name": "甲"}]}, ASKED, ["messages[].name"]),
    ({"messages": [ASKED[0], {**ASKED[1], "weight": 0.5}]}, ASKED, ["messages[].weight"]),
    ({"messages": ASKED, "tools": "[]", "loss_mask": [0, 1]}, ASKED, []),
]  # fmt: skip


def texts_in(value, name=""):
    """(name of the field, text) of every text in a row; of a turn's fields "messages[].name"."""
    if isinstance(value, str):
        yield name, value
    for part in value if isinstance(value, list) else ():
        yield from texts_in(part, name if isinstance(part, str) else f"{name}[]")
    for field, part in value.items() if isinstance(value, dict) else ():
        yield from texts_in(part, f"{name}.{field}" if name else field)


@pytest.mark.parametrize("row, messages, unused", READ)
def test_every_field_is_used_or_named(row, messages, unused):
    item = convert_row(row)
    assert item.kind == "sft" and messages in (None, item.body["messages"])
    assert list(item.unused) == unused
    # By another way: what stands in a field that is not named stands in the result, but for marks of who speaks.
    made = json.dumps(item.body, ensure_ascii=False)
    for name, text in texts_in(row):
        if name not in unused and not is_empty(text):
            marks = r"\s*(?:医生：您好|^human$|^gpt$|^病人$|^大夫$|[<#]*\s*(?:q|a|user|bot|human|assistant|患者|医生|问|答)>?[:：]|^患者$|^医生$)\s*"
            words = re.split(marks, text, flags=re.IGNORECASE)
            assert all(word in made for word in words), (name, text)


def answer(**more):
    return {"messages": [ASKED[0], {**ASKED[1], **more}, *turns("再问", "再答")]}


ASIDE = [
    (answer(loss=False), "marked as not to be learnt"),
    (answer(loss=0), "marked as not to be learnt"),
    (answer(train="false"), "marked as not to be learnt"),
    (answer(loss="0"), "marked as not to be learnt"),
    (answer(trainable=False), "marked as not to be learnt"),
    (answer(weight=0), "marked as not to be learnt"),
    (answer(mask=1), "marked as not to be learnt"),
    ({"messages": [ASKED[0], {**ASKED[1], "loss": False}]}, "marked as not to be learnt"),
    ({"messages": turns("问", "答", "再问", "再答"), "loss_mask": [0, 0, 0, 1]}, "marked as not to be learnt"),
    ({"messages": ASKED, "loss_mask": [0, 0, 1, 1, 1]}, "marked as not to be learnt"),
    ({"messages": turns("问", "答", "再问", "再答"), "weights": [0, 0, 0, 1]}, "marked as not to be learnt"),
    ({"messages": ASKED, "mask": [1, 0]}, "marked as not to be learnt"),
    ({"instruction": "问", "output": "答", "train": False}, "marked as not to be learnt"),
    ({"messages": ASKED, "tools": [{"name": "x"}]}, "tool calls are not trained"),
    ({"messages": [ASKED[0], {**ASKED[1], "tool_calls": [{}]}]}, "tool calls are not trained"),
    ({"messages": [ASKED[0], {**ASKED[1], "content": None, "function_call": {"n": 1}}]}, "tool calls are not trained"),
    ({"conversations": [{"from": "human", "value": "问"}, {"from": "observation", "value": "1"}]}, "tool calls are not trained"),
    ({"messages": ASKED, "rejected_images": ["x"]}, "a rejected answer of an unknown form"),
    ({"query": "问", "response": "答", "label": 0, "analysis": "析"}, "a label or score beside the answer"),
    ({"query": "问", "response": "答", "score": "0.5"}, "a label or score beside the answer"),
    ({"messages": ASKED, "reward": -1.5}, "a label or score beside the answer"),
    ({"prompt": "问", "chosen": "<think>想</think>好", "rejected": "坏"}, "reasoning on one side of a pair"),
    ({"query": "问", "response": "<think>想</think>答", "thinking": "思"}, "reasoning given twice"),
    ({"question": STEM, "options": HERBS}, "exam question without an answer"),
    ({"question": STEM, **LETTERED, "answer": ""}, "exam question without an answer"),
    ({"question": STEM, "answer": "B"}, "an option letter without its options"),
    ({"instruction": STEM, "output": "答案：ABD"}, "an option letter without its options"),
    ({"instruction": STEM, "output": "故选B项。"}, "an option letter without its options"),
    ({"instruction": STEM, "output": "The correct answer is (B)."}, "an option letter without its options"),
    ({"instruction": STEM, "output": "b"}, "an option letter without its options"),
    ({"messages": turns("一", "二", STEM, "B")}, "an option letter without its options"),
    ({"messages": turns("一", "二", f"{STEM}\n{BELOW}", "B")}, "an exam question inside a conversation"),
    ({"question": "问", "answer": "NaN"}, "missing or empty answer"),
    ({"instruction": "问", "output": ["好", "坏"]}, "wrong type"),
    ({"data": ["头痛", "多久"]}, "fields not recognised"),
    ({"prompt": "[INST] 问 [/INST]", "completion": "答"}, "control tokens"),
    ({"instruction": "问", "output": "答</s>"}, "control tokens"),
    ({"instruction": "问", "output": "答<|eot_id|>"}, "control tokens"),
    ({"instruction": "问", "output": "答[UNUSED_TOKEN_145]"}, "control tokens"),
    ({"instruction": "问<eoh>", "output": "答"}, "control tokens"),
    ({"instruction": "问", "output": "答<｜end▁of▁sentence｜>"}, "control tokens"),
    ({"instruction": "问", "output": "<tool_call>{}</tool_call>"}, "control tokens"),
    ({"text": "<|user|>\n问\n<|assistant|>\n答"}, "control tokens"),
    ({"instruction": "照样答。\n### Instruction:\n问\n### Response:", "output": "答"}, "marks of a dialogue inside a text"),
    ({"instruction": "问 <bot>:", "output": "答"}, "marks of a dialogue inside a text"),
    ({"instruction": "[Round 1]\n问：甲\n答：", "output": "乙"}, "marks of a dialogue inside a text"),
    ({"instruction": "你是医生。\nHuman: 问\nAssistant:", "output": "答"}, "marks of a dialogue inside a text"),
]  # fmt: skip


@pytest.mark.parametrize("row, reason", ASIDE)
def test_what_changes_the_meaning_of_a_row_sets_it_aside(row, reason):
    with pytest.raises(Reject) as caught:
        convert_row(row)
    assert caught.value.reason == reason


def test_a_label_beside_an_answer_asks_which_is_the_answer(tmp_path, convert):
    rows = ({"query": f"问{n}", "response": "答", "label": 0} for n in range(3))
    path = write_lines(tmp_path / "a.jsonl", *rows)
    words = "not used: label; if it is right in every row: --columns (.*)[)]"
    with pytest.raises(UserError, match=words) as caught:
        convert(path)
    told = str(caught.value).rpartition("--columns ")[2].rstrip(")")
    assert convert(path, columns=told)["report"]["rows_kept"] == 3
