"""The built-in sample: large enough, always the same, held out by entity, and an exam with one right answer an item."""

import collections
import random
import re

import pytest
from conftest import ROOT

from data_prepare.sample import make_sample
from data_prepare.sample.entities import load_entities
from data_prepare.sample.exam import too_close
from data_prepare.sample.talk import join, small_talk
from utils.data.pairs import Terms
from utils.files import read_json, read_jsonl

SAMPLE = ROOT / "data_prepare/sample"


def rows(name):
    return list(read_jsonl(SAMPLE / f"{name}.jsonl"))


TABLES = {  # the least number of entries, and the fields that each has
    "herbs": (180, "nature flavours channels actions caution"), "formulas": (80, "composition actions indication"),
    "acupoints": (80, "meridian location indications"), "syndromes": (40, "signs tongue pulse principle formula"),
}  # fmt: skip


def test_tables_are_large_and_complete():
    for table, (least, fields) in TABLES.items():
        entries = rows(table)
        assert len(entries) == len({entry["name"] for entry in entries}) >= least
        assert all(entry[field] for entry in entries for field in fields.split())
    kinds = collections.Counter(row["kind"] for row in rows("incompatibilities"))
    assert kinds["十八反"] >= 18 and kinds["十九畏"] >= 9 and len(rows("pregnancy")) >= 40


@pytest.mark.slow
def test_the_script_makes_the_committed_files_again(tmp_path, capsys):
    make_sample.main(["--output-dir", str(tmp_path)])
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == [
        f"{name}.jsonl" for name in ("statements", "tcm_exam", "tcm_preferences", "tcm_sample", "terms")
    ]
    assert [name for name in made if (tmp_path / name).read_bytes() != (SAMPLE / name).read_bytes()] == []
    assert len(rows("statements")) > 15_000


def test_rows_are_many_and_no_held_out_entity_is_asked_about_in_training():
    sample, exam = rows("tcm_sample"), rows("tcm_exam")
    assert len(sample) >= 3000 and len(exam) >= 400
    split_of = collections.defaultdict(set)
    for row in sample:
        split_of[row["entity"]].add(row["split"])
    assert all(len(splits) == 1 for splits in split_of.values())
    trained_on = {entity for entity, splits in split_of.items() if splits == {"train"}}
    asked = {item["id"].rpartition("-")[2] for item in exam}
    assert len(asked) > 80 and not asked & trained_on
    questions = {row["instruction"] for row in sample if row["split"] == "train"}
    assert not questions & {item["question"] for item in exam}


def test_the_better_answer_has_the_right_caution_where_one_asks_what_a_herb_does_and_nowhere_else():
    cautions = {herb["name"]: herb["caution"] for herb in rows("herbs")}
    sample = {row["entity"]: row["split"] for row in rows("tcm_sample")}
    wanted = collections.Counter()
    for row in rows("tcm_preferences"):
        assert row["split"] == sample[row["entity"]]
        asks_actions = re.search("^(?!.*(类|几条经)).*(功效|作用)", row["instruction"])
        asks_herb = row["entity"] in cautions and not row["input"] and asks_actions
        assert (row["kind"] == "caution wanted") == bool(asks_herb), row
        longer, shorter = sorted([row["chosen"], row["rejected"]], key=len, reverse=True)
        assert longer.startswith(shorter + "使用注意：")
        assert row["chosen"] == (f"{shorter}使用注意：{cautions[row['entity']]}。" if asks_herb else shorter)
        wanted[row["split"], row["kind"]] += 1
    assert 0.3 < wanted["train", "caution wanted"] / (wanted["train", "caution unasked"] + 1) < 1.1
    assert wanted["eval", "caution wanted"] >= 100


def test_small_talk_asks_nothing_of_the_general_questions_and_fills_every_slot():
    talk = read_json(SAMPLE / "talk.json")
    said = list(small_talk(talk, 1, 900, random.Random(0)))
    questions = {messages[0]["content"] for messages in said}
    assert len(questions) > 300 and not [text for text in questions if "{" in text]
    assert not questions & {row["question"] for row in rows("general_questions")}
    hello = {messages[1]["content"] for messages in said if messages[0]["content"] == "你好"}
    assert hello == {talk["greetings"][0]["answer"]}


def test_the_training_rows_have_small_talk_and_the_statements_all_entities_and_cautions():
    talk = read_json(SAMPLE / "talk.json")
    said = {row["instruction"]: row for row in rows("tcm_sample") if row["kind"] == "talk"}
    assert set().union(*(group["questions"] for group in talk["greetings"])) < set(said)
    assert {row["split"] for row in said.values()} == {"train"} and len(said) > 80
    statements = {row["text"] for row in rows("statements")}
    assert not [
        text for text in statements if "？" in text or "请" in text
    ]  # held-out entities are stated, never asked about
    whole = "\n".join(statements)
    assert all(row["entity"] in whole for row in rows("tcm_sample") if row["split"] == "eval")
    for herb in rows("herbs"):
        does = f"{herb['name']}的功效是{'、'.join(herb['actions'])}。"
        assert {does, f"{does}使用注意：{herb['caution']}。"} <= statements


def test_joined_items_are_all_there_once_and_a_share_of_them_in_groups():
    groups = join(list(range(1000)), 0.5, (2, 3, 4), random.Random(0))
    assert sorted(item for group in groups for item in group) == list(range(1000))
    assert sum(len(group) for group in groups if len(group) == 1) in (500, 501)
    assert {len(group) for group in groups} == {1, 2, 3, 4}


def test_exam_items_have_one_right_answer():
    wordings = read_json(SAMPLE / "wordings.json")
    entities = {(entity.kind, entity.name): entity for entity in load_entities(SAMPLE, wordings)}
    letters = collections.Counter()
    for item in rows("tcm_exam"):
        kind, attribute, name = item["id"].split("-", 2)
        entity = entities[kind, name]
        assert item["options"][item["answer"]] == entity.facts[attribute]
        assert len(set(item["options"].values())) == 4 and list(item["options"]) == list("ABCD")
        wrong = [text for letter, text in item["options"].items() if letter != item["answer"]]
        assert not any(too_close(attribute, entity.facts[attribute], text) for text in wrong)
        assert not set(wrong) & set(entity.also.get(attribute, []))
        letters[item["answer"]] += 1
    assert max(letters.values()) < 0.32 * sum(letters.values())  # the place of the answer tells nothing


CLOSE = [
    ("nature", "寒", "微寒", True), ("nature", "寒", "温", False),
    ("flavours", "辛、苦", "辛", True), ("flavours", "苦", "微苦", True), ("flavours", "辛、苦", "甘", False),
    ("channels", "肺、脾经", "肺经", True), ("channels", "肺、脾经", "肺、肾经", False),
    ("actions", "利水消肿", "渗湿", True), ("actions", "活血调经", "安神", False),
    ("pulse", "脉弦滑", "脉弦有力", True), ("tongue", "舌红苔黄", "舌淡苔白", False),
]  # fmt: skip


def test_what_counts_as_too_close():
    assert [case for case in CLOSE if too_close(*case[:3]) != case[3]] == []


def test_terms_are_found_whole_and_longest_first():
    terms = Terms(SAMPLE / "terms.jsonl")
    assert terms.stated("本品温通经脉。", "") == {"温通经脉"}  # 温 inside a word is not the nature 温
    assert terms.stated("麻黄的药性是温。", "麻黄的药性是什么？") == {"温"}
    assert [term for _, _, term in terms.find("肺、膀胱经。\n麻黄汤")] == ["肺", "膀胱", "麻黄汤"]
