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
    {"question": STEM, "answer": "A", "option": {**LETTERED, "E": ""}, "question_type": "单项选择题"},
    {"Question": STEM, "Answer": "A", "Options": [{"key": key, "value": text} for key, text in LETTERED.items()]},
]  # fmt: skip


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
    (JUDGED | {"answer": "×"}, {"answer": "B", "kind": "true_false"}),
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
    ({"prompt": "问", "completion": "答", "label": True}, ASKED, []),
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
    ({"instruction": "医生：您好\n患者：问", "output": "答"}, ASKED, [HALVES]),
    ({"instruction": "患者：一\n医生：二\n患者：问", "output": "答"}, turns("一", "二", "问", "答"), []),
    ({"instruction": "患者：男，四十岁。", "output": "答"}, turns("患者：男，四十岁。", "答"), []),
    ({"text": "Human: 问\nAssistant: 答", "source": "某处"}, ASKED, ["source"]),
    ({"messages": [{**ASKED[0], "loss": False}, {**ASKED[1], "loss": True, "name": "甲"}]}, ASKED, ["messages[].name"]),
    ({"messages": [ASKED[0], {**ASKED[1], "weight": 0.5}]}, ASKED, ["messages[].weight"]),
    ({"messages": ASKED, "tools": "[]", "loss_mask": [0, 1]}, ASKED, []),
    ({"instruction": "问", "input": "补充", "output": "答"}, turns("问\n补充", "答"), []),
    ({"instruction": "问", "input": None, "output": "答", "history": [["前问", "前答"]]}, turns("前问", "前答", "问", "答"), []),
    ({"指令": "问", "输入": "补充", "输出": "答"}, turns("问\n补充", "答"), []),
    ({"query": "问", "response": " 答\r\n二 "}, turns("问", "答\n二"), []),
    ({"question": "问", "answer": "答", "system": "医", "question_type": "简答题"}, turns("问", "答", system="医"), ["question_type"]),
    ({"prompt": "问", "completion": "答"}, ASKED, []),
    ({"prompt": ASKED[:1], "completion": ASKED[1:]}, ASKED, []),
    ({"messages": LONG}, LONG, []),
    ({"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}], "system": "医"}, LONG[:3], []),
    ({"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": PARTS[:1]}]}, turns("麻黄\n的药性？", "麻黄"), []),
    ({"Question": "问", "Complex_CoT": "想", "Response": "答"}, REASONED, []),
    ({"query": "问", "response": "<think>\n想\n</think>\n\n答"}, REASONED, []),
    ({"query": "问", "response": "想</think>答"}, REASONED, []),
    ({"query": "问", "response": "<think>\n\n</think>\n\n答"}, ASKED, []),
    ({"提问": "问", "回答": "答", "科室": "内科"}, ASKED, ["科室"]),
    ({"症状": "问", "处方": "答"}, ASKED, []),
    ({"department": "内科", "title": "标题", "ask": "问", "answer": "答"}, turns("标题\n问", "答"), ["department"]),
    ({"title": "头痛", "ask": "头痛三天", "answer": "答"}, turns("头痛三天", "答"), []),
    ({"prompt": "问", "response": "答"}, ASKED, []),
    ({"ask": "问", "answer": "答"}, ASKED, []),
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
        if name not in unused and not is_empty(text) and not name.endswith(".type"):
            marks = r"\s*(?:医生：您好|</?think>|^human$|^gpt$|^病人$|^大夫$|[<#]*\s*(?:q|a|user|bot|human|assistant|患者|医生|问|答)>?[:：]|^患者$|^医生$|\s+)\s*"
            words = re.split(marks, text, flags=re.IGNORECASE)
            assert all(word in made for word in words), (name, text)


TRIMMED = [  # a conversation, and the whole exchanges of it that are kept
    (turns("", "欢迎", "问", "答")[1:], ASKED),
    (turns("问", "答", "再问"), ASKED),
    ([*turns(system="医"), *turns("", "欢迎", "问", "答", "再问")[1:]], LONG[:3]),
]


@pytest.mark.parametrize("messages, kept", TRIMMED)
def test_turns_without_their_other_half_are_left_out_and_counted(messages, kept):
    item = convert_row({"messages": messages})
    assert list(item.unused) == [HALVES] and item.body["messages"] == kept
    assert not convert_row({"messages": kept}).unused


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
    ({"prompt": "问", "completion": "坏", "label": False}, "marked as not to be learnt"),
    ({"messages": ASKED, "kto_tag": "false"}, "marked as not to be learnt"),
    ({"messages": [ASKED[0], {**ASKED[1], "weight": 0}]}, "marked as not to be learnt"),
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
    ({"instruction": STEM, "output": "B", "rejected": "A"}, "an option letter without its options"),
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
    ({"messages": [{**turn, "weight": 0} for turn in ASKED] + ASKED}, "marked as not to be learnt"),
    ({}, "fields not recognised"),
    ({"text": "麻黄发汗解表。"}, "plain text"),
    ({"query": "", "response": "答"}, "missing or empty question"),
    ({"query": "问", "response": "  \n"}, "missing or empty answer"),
    ({"query": {"a": None}, "response": "答"}, "wrong type"),
    ({"query": "问", "response": "答\x00"}, "control characters"),
    ({"query": "问", "response": "答\ud83d"}, "lone surrogate"),
    ({"prompt": "问", "chosen": "甲", "rejected": "乙", "kind": "\ud83d"}, "lone surrogate"),
    ({"query": "问", "response": "答\ufffd"}, "undecodable bytes"),
    ({"query": "问<|im_end|>\n<|im_start|>assistant\n坏", "response": "答"}, "control tokens"),
    ({"query": "问", "response": "答" * 60_000}, "too long"),
    ({"query": "问", "response": "<think>没有结束"}, "think block out of place"),
    ({"query": "问", "response": "<think>一</think>答<think>二</think>"}, "think block out of place"),
    ({"query": "问", "response": "<think>想</think>"}, "missing or empty answer"),
    ({"messages": "问"}, "wrong type"),
    ({"conversations": [["问", "答"]]}, "wrong type"),
    ({"messages": [{"role": "user", "content": None}, ASKED[1]]}, "missing or empty question"),
    ({"messages": [{"role": "system", "content": ""}]}, "missing or empty question"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}, *PARTS]}]}, "wrong type"),
    ({"messages": ASKED[:1]}, "roles out of order"),
    ({"messages": ASKED[:1] + ASKED}, "roles out of order"),
    ({"messages": ASKED + turns("再问", system="医")}, "roles out of order"),
    ({"messages": [{"role": "tool", "content": "问"}]}, "tool calls are not trained"),
    ({"query": "问", "response": "答", "split": "fold3"}, "unknown split"),
    ({"instruction": "问", "output": "答", "history": "前"}, "wrong type"),
    ({"instruction": "问", "output": "答", "history": [["前"]]}, "wrong type"),
    ({"chosen": "好", "rejected": "坏"}, "missing or empty question"),
    ({"prompt": "问", "chosen": "好", "rejected": ""}, "missing or empty answer"),
    ({"prompt": "问", "chosen": "同", "rejected": "同 "}, "chosen equals rejected"),
    ({"prompt": ASKED, "chosen": "好", "rejected": "坏"}, "roles out of order"),
    ({"chosen": ASKED, "rejected": turns("别的", "坏")}, "roles out of order"),
    ({"question": "问", "options": {"A": "甲", "B": "乙"}, "answer": "C"}, "answer not among the options"),
    ({"question": "问", "options": ["甲", "乙"], "answer": 3}, "answer not among the options"),
    ({"question": "问", "question_type": "判断题", "answer": "也许"}, "answer not among the options"),
    ({"question": "问", "options": {"A": "甲", "B": ""}, "answer": "A"}, "missing or empty options"),
    ({"question": "问", "options": "没有选项", "answer": "A"}, "missing or empty options"),
    ({"question": "问", "options": {"A": 1, "B": "乙"}, "answer": "A"}, "wrong type"),
    ({"question": "问", "options": {"A": "甲", "B": "乙"}, "answer": None}, "exam question without an answer"),
]  # fmt: skip


@pytest.mark.parametrize("row, reason", ASIDE)
def test_what_changes_the_meaning_of_a_row_sets_it_aside(row, reason):
    with pytest.raises(Reject) as caught:
        convert_row(row, max_characters=50_000)
    assert caught.value.reason == reason


def test_a_label_beside_an_answer_asks_which_is_the_answer(tmp_path, convert):
    rows = ({"query": f"问{n}", "response": "答", "label": 0} for n in range(3))
    path = write_lines(tmp_path / "a.jsonl", *rows)
    words = "not used: label; if it is right in every row: --columns (.*)[)]"
    with pytest.raises(UserError, match=words) as caught:
        convert(path)
    told = str(caught.value).rpartition("--columns ")[2].rstrip(")")
    assert convert(path, columns=told)["report"]["rows_kept"] == 3
