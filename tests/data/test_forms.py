"""The forms in which rows come, and what becomes of each: read, set aside with a reason, or read with fields that are named."""

import json
import re

import pytest
from data_rows import turns, write_lines

from utils.data.messages import Reject, is_empty
from utils.data.schemas import HALVES, convert_row, parse_columns
from utils.errors import UserError

STEM, HERBS = "善治项背强痛的药是", ["葛根", "独活", "杜仲", "续断"]
LETTERED = dict(zip("ABCD", HERBS))
BELOW = "\n".join(f"{letter} {text}" for letter, text in LETTERED.items())
ITEM = {"question": STEM, "options": LETTERED, "answer": "A", "subject": ""}


def fields(*names):
    return dict(zip(names, HERBS))


# Exams, all of the same item: what is different is where the options are, and how the right one is named.
OPTIONS = [  # the options, and the right one
    (BELOW, "A"), (BELOW.replace("\n", "\\n"), "A"), ("A.葛根|B.独活|C.杜仲|D.续断", "a"), ("A、葛根\nB、独活\nC、杜仲\nD、续断", "A"),
    ("A.葛根B.独活C.杜仲D.续断", "答案：A"), ("A葛根B独活C杜仲D续断", "【A】"), (HERBS, ["葛根"]), (HERBS, 0), (str(HERBS), "A"),
    ([f"{letter}. {text}" for letter, text in LETTERED.items()], "Ａ"), ([f"{n}.{text}" for n, text in enumerate(HERBS, 1)], "1"),
    (LETTERED, "A. 葛根"), (json.dumps(LETTERED), ["A"]), ({**LETTERED, "E": ""}, "A"),
    ([{letter: text} for letter, text in LETTERED.items()], "(A)"),
    ([{"key": letter, "value": text} for letter, text in LETTERED.items()], "葛根"),
]  # fmt: skip
INSIDE = [  # a question with its options inside, and the answer
    (f"{STEM} A.葛根 B.独活 C.杜仲 D.续断", "A"), (f"{STEM}\n{BELOW}", "A"), (f"{STEM}\nA．葛根\nB．独活\nC．杜仲\nD．续断", ["A"]),
    (f"{STEM}\n(A)葛根\n(B)独活\n(C)杜仲\n(D)续断", "答案是A。"),
]  # fmt: skip
EXAMS = [
    *({"question": STEM, "options": options, "answer": answer} for options, answer in OPTIONS),
    *({"instruction": question, "input": "", "output": answer} for question, answer in INSIDE),
    {"instruction": STEM, "input": "A.葛根B.独活C.杜仲D.续断", "output": "A"},
    {"messages": turns(f"{STEM}\n{BELOW}", "A")},
    {"question": STEM, **fields("opa", "opb", "opc", "opd"), "answer": "opa"},
    {"question": STEM, **fields("opa", "opb", "opc", "opd"), "cop": 0},
    {"题目": STEM, **fields("选项A", "选项B", "选项C", "选项D"), "答案": "A", "解析": ""},
    {"题干": STEM, **fields("选项1", "选项2", "选项3", "选项4"), "正确答案": "1"},
    {"question": STEM, **fields("option_a", "option_b", "option_c", "option_d"), "answer": "A"},
    {"question": STEM, **fields("optionA", "optionB", "optionC", "optionD"), "correct_answer": "optionA"},
    {"stem": STEM, **fields("Option 1", "Option 2", "Option 3", "Option 4"), "key": 1},
    {"question": STEM, **fields("choice_0", "choice_1", "choice_2", "choice_3"), "label": 0},
    {"question": STEM, **fields("A", "B", "C", "D"), "E": "nan", "answer": "a"},
    {"qtext": STEM, "qtype": "单选题", "option_list": HERBS, "answer": "葛根", "answer_idx": "A"},
    {"query": STEM, "choices": HERBS, "answers": ["葛根"]},
    {"question": STEM, "choices": {"text": HERBS, "label": list("ABCD")}, "answerKey": "A"},
    {"question": f"{STEM}\n{BELOW}", "options": list("ABCD"), "answer": "A"},
]


@pytest.mark.parametrize("row", EXAMS)
def test_exam_items_are_never_trained_as_questions(row):
    item = convert_row(row)
    assert (item.kind, item.body, item.unused) == ("exam", ITEM, {})


# Letters inside options begin no option.
VITAMINS = {"A": "维生素A、维生素B、维生素C", "B": "维生素 D", "C": "B族"}
LISTED = "\n".join(f"{letter} {text}" for letter, text in VITAMINS.items())
TEN = dict(zip("ABCDEFGHIJ", "甲乙丙丁戊己庚辛壬癸"))
CHOSEN, JUDGED = {"question": "问", "options": LETTERED}, {"question": "问", "question_type": "判断题"}
ITEMS = [  # a row, and what its item has
    *((CHOSEN | {"answer": given}, {"answer": "ABD", "kind": "multiple"})
      for given in ("ABD", "A,B,D", "A、B、D", "DBA", "a b d", ["A", "B", "D"])),
    ({"Question": "问", "Options": LISTED, "Answer": "B"}, {"options": VITAMINS, "answer": "B"}),
    ({"instruction": f"问\n{LISTED}", "output": "B"}, {"options": VITAMINS, "answer": "B"}),
    ({"question": "问", "options": list(TEN.values()), "answer": 9}, {"options": TEN, "answer": "J"}),
    ({"question": "问", **dict(list(TEN.items())[:5]), "answer": "E"}, {"options": dict(list(TEN.items())[:5])}),
    ({"": "0", "Question": STEM, **LETTERED, "Answer": "A"}, ITEM),
    (CHOSEN | {"answer": "A", "exam_class": "中医", "exam_subject": "中药"}, {"subject": "中药"}),
    (CHOSEN | {"answer": "A", "question_type": "多项选择题"}, {"answer": "A", "kind": "multiple"}),
    (CHOSEN | {"answer": "A", "question_type": "单项选择题"}, {"kind": None}),
    (CHOSEN | {"answer": "A", "question_type": "", "type": "多发病"}, {"kind": None}),
    (JUDGED | {"answer": "对"}, {"answer": "A", "kind": "true_false", "options": {"A": "正确", "B": "错误"}}),
    (JUDGED | {"answer": "×", "options": "对错"}, {"answer": "B", "kind": "true_false"}),
    (JUDGED | {"answer": False}, {"answer": "B", "kind": "true_false"}),
    ({"question": "问", "options": {"A": "对", "B": "错"}, "answer": "B"}, {"answer": "B", "kind": "true_false"}),
    ({"question": "问", "options": ["True", "False"], "answer": "正确"}, {"answer": "A", "kind": "true_false"}),
]  # fmt: skip


@pytest.mark.parametrize("row, wanted", ITEMS)
def test_kinds_of_exam_items(row, wanted):
    """A converted item is read again as it was."""
    body = convert_row(row).body
    assert {name: body.get(name) for name in wanted} == wanted
    assert convert_row({"id": "x", **body, "source": "某处:1"}).body == body


def test_explanations_become_reasoning_on_request():
    row = {"question": STEM, "options": LETTERED, "answer": "A", "解析": "葛根解肌。"}
    item = convert_row(row, explained=True)
    asked = STEM + "".join(f"\n{letter}. {text}" for letter, text in LETTERED.items())
    told = {"role": "assistant", "content": "A. 葛根", "reasoning_content": "葛根解肌。"}
    assert (item.kind, item.schema) == ("sft", "exam with explanation")
    assert item.body["messages"] == [*turns(asked), told]
    assert convert_row(row).kind == "exam"
    for empty in ("", "nan", float("nan"), None):
        assert convert_row({**row, "解析": empty}, explained=True).kind == "exam"


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


def test_an_exam_item_holds_neither_system_text_nor_reasoning():
    item = convert_row({"instruction": f"{STEM}\n{BELOW}", "output": "A", "system": "医", "cot": "想"})
    assert (item.body, item.unused) == (ITEM, {"system": "医", "cot": "想"})


def read_by(columns, row, system=""):
    return convert_row(row, tuple(parse_columns(columns).items()), system)


def test_columns_name_fields():
    row = {"问句": STEM, "对的": "A", "question": "别", "全": HERBS, **fields("甲栏", "乙栏", "丙栏", "丁栏")}
    for options in ("甲栏+乙栏+丙栏+丁栏", "全"):
        assert read_by(f"question=问句,answer=对的,options={options}", row).body == ITEM
    with pytest.raises(Reject, match="an option letter without its options"):
        read_by("question=问句,answer=对的", row)
    item = read_by("question=Content, answer=Summary", {"Content": "问", "Summary": "答", "n": 3}, "医")
    assert item.schema == "--columns" and item.body["messages"] == turns("问", "答", system="医")
    with pytest.raises(Reject, match="fields not recognised"):
        read_by("question=Content,answer=Summary", {"Content": "问"})
    with pytest.raises(ValueError, match="'queston=Content' is not role=field"):
        parse_columns("queston=Content,answer=Summary")


REASONED = [{**turns("问", "答")[0]}, {**turns("问", "答")[1], "reasoning_content": "想"}]
ASKED = turns("问", "答")
LONG = turns("问", "答", "再问", "再答", system="医")
PARTS = [{"type": "text", "text": "麻黄"}, {"type": "text", "text": "的药性？"}]
AS_ASKED = [  # rows that become the conversation ASKED, all their fields used
    {"instruction": "问", "input": float("nan"), "output": "答", "year": "nan"}, {"ask": "问", "answer": "答"},
    {"instruction": ["问"], "input": "<noinput>", "output": ["答"]}, {"questions": ["问"], "answers": ["答"]},
    {"data": ["问：问", "答：答"]}, {"data": ["Q: 问", "A: 答"]}, {"instruction": "问：问", "output": "答：答"},
    {"conversations": [[{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]]}, {"症状": "问", "处方": "答"},
    {"dialogue": [{"speaker": "患者", "text": "问"}, {"speaker": "医生", "sentence": "答"}]}, {"prompt": "问", "response": "答"},
    {"instruction": "Human: 问\n\nAssistant:", "output": "答"}, {"text": "### Human: 问### Assistant: 答"},
    {"messages": ASKED, "tools": "[]", "loss_mask": [0, 1]}, {"query": "问", "response": "<think>\n\n</think>\n\n答"},
    {"prompt": "问", "completion": "答", "label": True}, {"prompt": ASKED[:1], "completion": ASKED[1:]},
]  # fmt: skip
AS_REASONED = [
    {"question": "问", "reasoning": "想", "answer": "答"}, {"instruction": "问", "input": "", "cot": "想", "output": "答"},
    {"input": "问", "reasoning_content": "想", "content": "答"}, {"messages": [ASKED[0], {**ASKED[1], "thinking": "想"}]},
    {"Instruction": "问", "Reasoning-Content": "想", "Output": "答"}, {"Question": "问", "Complex_CoT": "想", "Response": "答"},
    {"query": "问", "response": "<think>\n想\n</think>\n\n答"}, {"query": "问", "response": "想</think>答"},
]  # fmt: skip
READ = [  # a row, the messages that it becomes, and the fields of it that are not used
    *((row, ASKED, []) for row in AS_ASKED),
    *((row, REASONED, []) for row in AS_REASONED),
    ({"messages": [ASKED[0], {**ASKED[1], "reasoning": "想"}], "n": 3}, REASONED, ["n"]),
    ({"messages": [ASKED[0], {**ASKED[1], "thinking": "想", "reasoning": "思"}]}, None, ["messages[].thinking"]),
    ({"messages": REASONED, "cot": "别的"}, REASONED, ["cot"]),
    ({"system_prompt": "医", "instruction": "问", "input": "", "output": "答"}, LONG[:3], []),
    ({"messages": ASKED, "系统提示": "医"}, LONG[:3], []),
    ({"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}], "system": "医"}, LONG[:3], []),
    ({"instruction": "问", "input": "N/A", "output": "答", "systemPrompt": "医"}, LONG[:3], []),
    ({"question": "问", "answer": "答", "system": "医", "question_type": "简答题"}, LONG[:3], ["question_type"]),
    ({"messages": LONG}, LONG, []),
    ({"instruction": "只用一句话。", "question": "问", "answer": "答"}, ASKED, ["instruction"]),
    ({"query": "问", "response": "答", "label": "内科"}, ASKED, ["label"]),
    ({"question": "问", "answer": "答", "score": 3, "model_answer": "别"}, ASKED, ["score", "model_answer"]),
    ({"kind": "问答", "input": "问", "target": "答"}, ASKED, ["kind"]),
    ({"conversation": [{"human": "问", "assistant": "答"}], "id": "7"}, ASKED, ["id"]),
    ({"text": "Human: 问\nAssistant: 答", "source": "某处"}, ASKED, ["source"]),
    ({"提问": "问", "回答": "答", "科室": "内科"}, ASKED, ["科室"]),
    ({"messages": [{**ASKED[0], "loss": False}, {**ASKED[1], "loss": True, "name": "甲"}]}, ASKED, ["messages[].name"]),
    ({"messages": [ASKED[0], {**ASKED[1], "weight": 0.5}]}, ASKED, ["messages[].weight"]),
    ({"instruction": "问", "context": "文", "response": "答"}, turns("问\n文", "答"), []),
    ({"指令": "问", "输入": "补充", "输出": "答"}, turns("问\n补充", "答"), []),
    ({"instruction": "问：问", "output": "答案"}, turns("问：问", "答案"), []),
    ({"instruction": "患者：男，四十岁。", "output": "答"}, turns("患者：男，四十岁。", "答"), []),
    ({"instruction": "<user>: 一 <bot>: 二 <user>: 问", "output": "答"}, turns("一", "二", "问", "答"), []),
    ({"instruction": "患者：一\n医生：二\n患者：问", "output": "答"}, turns("一", "二", "问", "答"), []),
    ({"instruction": "问", "output": "答", "history": [["前问", "前答"]]}, turns("前问", "前答", "问", "答"), []),
    ({"query": "问", "response": " 答\r\n二 "}, turns("问", "答\n二"), []),
    ({"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": PARTS[:1]}]}, turns("麻黄\n的药性？", "麻黄"), []),
    ({"department": "内科", "title": "标题", "ask": "问", "answer": "答"}, turns("标题\n问", "答"), ["department"]),
    ({"title": "头痛", "ask": "头痛三天", "answer": "答"}, turns("头痛三天", "答"), []),
    # turns without their other half
    ({"instruction": "医生：您好\n患者：问", "output": "答"}, ASKED, [HALVES]),
    ({"messages": turns("", "欢迎", "问", "答")[1:]}, ASKED, [HALVES]),
    ({"messages": turns("问", "答", "再问", system="医")}, LONG[:3], [HALVES]),
    ({"messages": turns("问", "答", "问")}, ASKED, [HALVES]),
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
    marks = "</?think>|^(?:human|gpt|患者|医生)$|[<#]*[ ]?(?:q|a|user|bot|human|assistant|患者|医生|问|答)>?[:：]|\\s+"
    for name, text in texts_in(row) if HALVES not in unused else ():
        if name not in unused and not is_empty(text) and not name.endswith(".type"):
            words = re.split(marks, text, flags=re.IGNORECASE)
            assert all(word in made for word in words), (name, text)


GOOD, BAD = ({"role": "assistant", "content": text} for text in ("好", "坏"))
DIALOGUES = {"chosen": [*turns("问"), GOOD], "rejected": [*turns("问"), BAD]}
PREFERENCES = [
    {"prompt": "问", "chosen": "好", "rejected": "坏"},
    {"prompt": turns("问"), "chosen": [GOOD], "rejected": [BAD]},
    DIALOGUES,
    {"prompt": "问", **DIALOGUES},
    {"conversations": [{"from": "human", "value": "问"}], "chosen": {"from": "gpt", "value": "好"}, "rejected": {"from": "gpt", "value": "坏"}},
    {"instruction": "问", "input": "", "chosen": "好", "rejected": "坏"},
    # a rejected answer beside an answer, and other names of the two
    {"messages": DIALOGUES["chosen"], "rejected_response": "坏"},
    {"messages": DIALOGUES["chosen"], "rejected": "坏"},
    {"messages": DIALOGUES["chosen"], "rejected_messages": DIALOGUES["rejected"]},
    {"instruction": "问", "output": "好", "rejected": "坏"},
    {"question": "问", "response_chosen": "好", "response_rejected": "坏"},
    {"instruction": "问", "input": "", "accepted": "好", "rejected": "坏"},
    {"chosen": "\n\nHuman: 问\n\nAssistant: 好", "rejected": "\n\nHuman: 问\n\nAssistant: 坏"},
    {"prompt": "问", "chosen_response": "好", "rejected_response": "坏", "chosen_score": 3},
]  # fmt: skip


@pytest.mark.parametrize("row", PREFERENCES)
def test_preference_rows(row):
    item = convert_row(row)
    pair = {"prompt": turns("问"), "chosen": [GOOD], "rejected": [BAD], "kind": "given"}
    assert (item.kind, item.body) == ("dpo", pair) and set(item.unused) <= {"chosen_score"}


def answer(**more):
    return {"messages": [ASKED[0], {**ASKED[1], **more}, *turns("再问", "再答")]}


TWO = turns("问", "答", "再问", "再答")
ASIDE = {  # {reason: rows}
    "marked as not to be learnt": [
        *(answer(**{mark: sign}) for mark, sign in zip(
            ("loss", "loss", "train", "trainable", "weight", "mask"), (False, "0", "false", False, 0, 1))),
        {"messages": [ASKED[0], {**ASKED[1], "weight": 0}]},
        {"messages": TWO, "loss_mask": [0, 0, 0, 1]}, {"messages": ASKED, "loss_mask": [0, 0, 1, 1, 1]},
        {"messages": TWO, "weights": [0, 0, 0, 1]}, {"messages": ASKED, "mask": [1, 0]},
        {"instruction": "问", "output": "答", "train": False}, {"prompt": "问", "completion": "坏", "label": False},
        {"messages": ASKED, "kto_tag": "false"}],
    "tool calls are not trained": [
        {"messages": ASKED, "tools": [{"name": "x"}]}, {"messages": [ASKED[0], {**ASKED[1], "tool_calls": [{}]}]},
        {"messages": [ASKED[0], {**ASKED[1], "content": None, "function_call": {"n": 1}}]},
        {"conversations": [{"from": "human", "value": "问"}, {"from": "observation", "value": "1"}]},
        {"messages": [{"role": "tool", "content": "问"}]}],
    "a rejected answer of an unknown form": [{"messages": ASKED, "rejected_images": ["x"]}],
    "a label or score beside the answer": [
        {"query": "问", "response": "答", "label": 0, "analysis": "析"}, {"query": "问", "response": "答", "score": "0.5"},
        {"messages": ASKED, "reward": -1.5}],
    "reasoning on one side of a pair": [{"prompt": "问", "chosen": "<think>想</think>好", "rejected": "坏"}],
    "reasoning given twice": [{"query": "问", "response": "<think>想</think>答", "thinking": "思"}],
    "think block out of place": [
        {"query": "问", "response": text} for text in ("<think>没有结束", "<think>一</think>答<think>二</think>")],
    "exam question without an answer": [
        {"question": STEM, "options": HERBS}, {"question": STEM, **LETTERED, "answer": ""},
        {"question": "问", "options": LETTERED, "answer": None}],
    "an option letter without its options": [
        *({"instruction": STEM, "output": text} for text in ("答案：ABD", "故选B项。", "The correct answer is (B).", "b")),
        {"question": STEM, "answer": "B"}, {"instruction": STEM, "output": "B", "rejected": "A"},
        {"messages": turns("一", "二", STEM, "B")}],
    "an exam question inside a conversation": [{"messages": turns("一", "二", f"{STEM}\n{BELOW}", "B")}],
    "answer not among the options": [
        {"question": "问", "options": {"A": "甲", "B": "乙"}, "answer": "C"}, {"question": "问", "options": ["甲", "乙"], "answer": 3},
        {"question": "问", "options": ["甲", "乙"], "answer": "9" * 5000},
        {"question": "问", "question_type": "判断题", "answer": "也许"}],
    "missing or empty options": [
        {"question": "问", "options": {"A": "甲", "B": ""}, "answer": "A"}, {"question": "问", "options": "没有选项", "answer": "A"},
        {"question": "问", "options": "{[1]: 2}", "answer": "A"}],
    "missing or empty question": [
        {"query": "", "response": "答"}, {"messages": [{"role": "user", "content": None}, ASKED[1]]},
        {"messages": [{"role": "system", "content": ""}]}, {"messages": [[]]}, {"chosen": "好", "rejected": "坏"}],
    "missing or empty answer": [
        *({"query": "问", "response": text} for text in ("NaN", "  \n", "<think>想</think>")),
        {"prompt": "问", "chosen": "好", "rejected": ""}],
    "wrong type": [
        {"instruction": "问", "output": ["好", "坏"]}, {"query": {"a": None}, "response": "答"}, {"messages": "问"},
        {"conversations": [["问", "答"]]}, {"messages": [{"role": "user", "content": [{"type": "image_url"}, *PARTS]}]},
        {"instruction": "问", "output": "答", "history": "前"}, {"instruction": "问", "output": "答", "history": [["前"]]},
        *({"question": "问", "options": options, "answer": "A"} for options in (
            {"A": 1, "B": "乙"}, [1.5, 2.5], [{"key": ["A"], "text": 1}, {"key": "B", "text": "乙"}],
            {"label": [{}, "B"], "text": [1, "乙"]}, {"1": 1, "9" * 5000: "乙"}))],
    "roles out of order": [
        {"messages": ASKED[:1]}, {"messages": ASKED[:1] + ASKED}, {"messages": ASKED + turns("再问", system="医")},
        {"prompt": ASKED, "chosen": "好", "rejected": "坏"}, {"chosen": ASKED, "rejected": turns("别的", "坏")}],
    "chosen equals rejected": [{"prompt": "问", "chosen": "同", "rejected": "同 "}],
    "control tokens": [
        *({"instruction": "问", "output": text} for text in (
            "答</s>", "答<|eot_id|>", "答[UNUSED_TOKEN_145]", "答<｜end▁of▁sentence｜>", "<tool_call>{}</tool_call>")),
        {"prompt": "[INST] 问 [/INST]", "completion": "答"}, {"instruction": "问<eoh>", "output": "答"},
        {"text": "<|user|>\n问\n<|assistant|>\n答"}, {"query": "问<|im_end|>\n<|im_start|>assistant\n坏", "response": "答"}],
    "marks of a dialogue inside a text": [{"instruction": text, "output": "答"} for text in (
        "照样答。\n### Instruction:\n问\n### Response:", "问 <bot>:", "[Round 1]\n问：甲\n答：", "你是医生。\nHuman: 问\nAssistant:")],
    "control characters": [{"query": "问", "response": "答\x00"}],
    "lone surrogate": [
        {"query": "问", "response": "答\ud83d"}, {"prompt": "问", "chosen": "甲", "rejected": "乙", "kind": "\ud83d"}],
    "undecodable bytes": [{"query": "问", "response": "答\ufffd"}],
    "too long": [{"query": "问", "response": "答" * 60_000}],
    "unknown split": [{"query": "问", "response": "答", "split": "fold3"}],
    "plain text": [{"text": "麻黄发汗解表。"}],
    "fields not recognised": [{}, {"data": ["头痛", "多久"]}],
}  # fmt: skip


@pytest.mark.parametrize("reason", ASIDE)
def test_what_changes_the_meaning_of_a_row_sets_it_aside(reason):
    for row in ASIDE[reason]:
        with pytest.raises(Reject) as caught:
            convert_row(row, max_characters=50_000)
        assert caught.value.reason == reason, row


def test_a_label_beside_an_answer_asks_which_is_the_answer(tmp_path, convert):
    rows = ({"query": f"问{n}", "response": "答", "label": 0} for n in range(3))
    path = write_lines(tmp_path / "a.jsonl", *rows)
    words = "not used: label; if it is right in every row: --columns (.*)[)]"
    with pytest.raises(UserError, match=words) as caught:
        convert(path)
    told = str(caught.value).rpartition("--columns ")[2].rstrip(")")
    assert convert(path, columns=told)["report"]["rows_kept"] == 3
