"""Chat: the decode loop against transformers, the history and its commands, one-shot answers, a session in a terminal."""

import importlib.util
import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from small_runs import arguments, make_place
from tiny_model import make_tiny_model

from utils.chat.session import Chat, ChatModel, Options, Reply
from utils.chat.terminal import AnswerPrinter
from utils.device import Device
from utils.errors import RunError, UserError
from utils.files import write_json
from utils.model import folders
from utils.model.chat_format import DECODING, encode_prompt, encode_turns
from utils.model.folders import check_model, model_sha256
from utils.model.generate import (
    AnswerReader,
    Decoding,
    TokenStream,
    candidates,
    choose,
    decoding_for,
    generate_answers,
    generate_tokens,
    read_answer,
    stop_tokens,
)
from utils.model.load import load_model, load_tokenizer
from utils.text import side_by_side

SCRIPT = "model_download/load_local_model.py"
CPU = Device("cpu", False, "test")
QUESTIONS = ["甘草", "麻黄汤的功效是什么？龘", "What is this? 合谷", "四君子汤由哪些药组成？请一一说明。"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("chat") / "tiny", context=4096)


@pytest.fixture(scope="module")
def speaker(folder):
    return ChatModel(str(folder), CPU)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("load_local_model", ROOT / SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prompts_of(speaker, thinking=None):
    return [
        encode_prompt(speaker.tokenizer, [{"role": "user", "content": text}], thinking) for text in QUESTIONS
    ]


def reference(speaker, prompt, length, **options):
    """What transformers' generate answers, greedily."""
    ids = torch.tensor([prompt])
    options = dict(do_sample=False, max_new_tokens=length, **options)
    return speaker.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[
        0, len(prompt) :
    ].tolist()


# ---- The decode loop


@pytest.mark.parametrize(
    "dtype, penalty", [(torch.float32, 1.0), (torch.float32, 1.3), (torch.bfloat16, 1.0)]
)
def test_greedy_equals_generate(folder, dtype, penalty):
    speaker = ChatModel(str(folder), Device("cpu", dtype is torch.bfloat16, "test"))
    for prompt in prompts_of(speaker):
        stream = TokenStream(speaker.model, speaker.stream.stop)
        ours = list(stream.answer(prompt, Decoding(repetition_penalty=penalty), 40))
        assert ours == reference(speaker, prompt, 40, repetition_penalty=penalty)
        assert len(set(ours)) > 3  # a model that says one token for ever would prove nothing


def test_stops_where_generate_stops(speaker):
    prompt = prompts_of(speaker)[1]
    stop = {reference(speaker, prompt, 40)[20]}
    ours = list(TokenStream(speaker.model, stop).answer(prompt, Decoding(), 40))
    assert ours == reference(speaker, prompt, 40, eos_token_id=list(stop))
    assert len(ours) < 40 and ours[-1] in stop


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=0.6, top_k=20, top_p=0.95),
        dict(temperature=0.7, top_k=20, top_p=0.8),
        dict(top_k=1),
        dict(temperature=1.7, top_k=0, top_p=0.5),
        dict(top_k=10**6, top_p=1.0),
        dict(temperature=0.01, top_k=3, top_p=0.01),
    ],
)
def test_sampling_equals_the_warpers_of_transformers(settings):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    decoding = Decoding(do_sample=True, **settings)
    generator = torch.Generator().manual_seed(1)
    for rounded in (False, True):  # rounded as bf16 logits are: many equal values at the border of top_k
        logits = 3 * torch.randn(5000, generator=generator)
        logits = logits.bfloat16().float() if rounded else logits
        warped = TemperatureLogitsWarper(decoding.temperature)(None, logits[None])
        if decoding.top_k:
            warped = TopKLogitsWarper(decoding.top_k)(None, warped)
        tied = warped[0][torch.isfinite(warped[0])]
        if decoding.top_p < 1:
            warped = TopPLogitsWarper(decoding.top_p)(None, warped)
        ids, probabilities = candidates(logits, decoding)
        ours = torch.zeros(5000).scatter(0, ids, probabilities)
        if len(tied.unique()) == len(tied):
            torch.testing.assert_close(ours, warped[0].softmax(-1))
        else:  # which of two equal tokens top_p cuts is up to the sort: compare the values
            torch.testing.assert_close(ours.sort().values, warped[0].softmax(-1).sort().values)


def test_sampling_follows_its_probabilities_and_its_seed():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    decoding = Decoding(do_sample=True, top_k=0)
    draws = [
        choose(logits, decoding, [], random)
        for random in [torch.Generator().manual_seed(3)]
        for _ in range(4000)
    ]
    shares = [draws.count(token) / len(draws) for token in range(3)]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.03)  # four standard deviations
    again = [
        choose(logits, decoding, [], random)
        for random in [torch.Generator().manual_seed(3)]
        for _ in range(100)
    ]
    assert again == draws[:100]


def test_nan_is_a_run_error():
    with pytest.raises(RunError, match="NaN"):
        choose(torch.tensor([1.0, float("nan")]), Decoding(), [], None)


def test_batched_equals_one_by_one(speaker):
    prompts = prompts_of(speaker)
    stop = {reference(speaker, prompts[1], 30)[10]}  # one answer ends early, the others go on
    alone = [list(TokenStream(speaker.model, stop).answer(prompt, Decoding(), 30)) for prompt in prompts]
    assert len({len(answer) for answer in alone}) > 1
    for size in (1, 3, 4):
        assert generate_tokens(speaker.model, prompts, stop, 30, batch_size=size) == alone


def test_generate_answers(speaker):
    conversations = [[{"role": "user", "content": text}] for text in QUESTIONS]
    texts = generate_answers(
        speaker.model, speaker.tokenizer, conversations, max_new_tokens=20, thinking=False
    )
    assert texts == [
        read_answer(speaker.tokenizer, prompt, reference(speaker, prompt, 20)).content
        for prompt in prompts_of(speaker, False)
    ]
    sampled = [
        generate_answers(speaker.model, speaker.tokenizer, conversations, 20, greedy=False, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_cache_is_reused_and_changes_nothing(speaker, monkeypatch):
    stream, fed, history = TokenStream(speaker.model, set()), [], []
    logits = TokenStream._logits
    monkeypatch.setattr(
        TokenStream, "_logits", lambda self, new: (fed.append(len(new)), logits(self, new))[1]
    )
    shared = 0
    for question in QUESTIONS:
        history.append({"role": "user", "content": question})
        prompt = encode_prompt(speaker.tokenizer, history, thinking=False)
        fed.clear()
        answer = list(stream.answer(prompt, Decoding(), 25))
        assert fed[0] == len(prompt) - shared
        assert answer == list(TokenStream(speaker.model, set()).answer(prompt, Decoding(), 25))
        shared = len(
            encode_prompt(speaker.tokenizer, history, thinking=True)
        )  # all but the last prompt's think block
        history.append(
            {"role": "assistant", "content": read_answer(speaker.tokenizer, prompt, answer).content}
        )
    fed.clear()
    assert list(stream.answer(prompt, Decoding(), 25)) == answer and fed[0] == 1  # /retry


def test_ctrl_c_within_a_pass_leaves_a_usable_cache(speaker):
    stream = TokenStream(speaker.model, set())
    prompt = prompts_of(speaker)[1]
    expected = list(TokenStream(speaker.model, set()).answer(prompt, Decoding(), 12))

    def press(*_):
        presses.append(1)
        if len(presses) == stop_at:
            raise KeyboardInterrupt

    for stop_at in (1, 5):  # noqa: B007 - read by press; in the first pass over the prompt, and in that of the fourth token
        presses = []
        handle = speaker.model.model.layers[1].mlp.gate_proj.register_forward_pre_hook(
            press
        )  # layer 0 is in the cache already
        with pytest.raises(KeyboardInterrupt):
            list(stream.answer(prompt, Decoding(), 12))
        handle.remove()
        assert list(stream.answer(prompt, Decoding(), 12)) == expected


def test_decoding_comes_from_the_folder_or_from_qwen(speaker):
    assert decoding_for(speaker.model, speaker.tokenizer) == Decoding(**DECODING[True])
    assert decoding_for(speaker.model, speaker.tokenizer, True) == Decoding(**DECODING[True])
    assert decoding_for(speaker.model, speaker.tokenizer, False) == Decoding(**DECODING[False])
    assert stop_tokens(speaker.model, speaker.tokenizer) == set(
        speaker.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    )


# ---- From tokens to text


def test_text_comes_in_whole_characters(speaker):
    text = "龘龖先煎 🌿麻黄汤，\n\t𠮷 é <tool_call> \u200d完"
    ids = speaker.tokenizer(text, add_special_tokens=False)["input_ids"]
    reader = AnswerReader(speaker.tokenizer, [])
    pieces = [reader.feed(token) for token in ids]
    assert "".join(pieces) == text == reader.content and "" in pieces
    assert not any("\ufffd" in piece for piece in pieces) and reader.finish() == ""


def test_any_tokens_give_what_decode_gives(speaker):
    generator = torch.Generator().manual_seed(0)
    tokens = speaker.tokenizer.convert_ids_to_tokens(range(len(speaker.tokenizer)))
    outside = [number for number, token in enumerate(tokens) if "think>" not in token]
    for _ in range(20):  # random bytes: most of them no valid text
        ids = [outside[index] for index in torch.randint(len(outside), (50,), generator=generator)]
        expected = speaker.tokenizer.decode(ids, skip_special_tokens=True).lstrip("\n")
        ids.append(10**6)  # an id above the vocabulary is no text
        assert read_answer(speaker.tokenizer, [], ids).content == expected


@pytest.mark.parametrize(
    "text, reasoning, content",
    [
        ("<think>\n先想一想。\n\n再想。\n</think>\n\n甘草。", "先想一想。\n\n再想。", "甘草。"),
        ("甘草。\n", "", "甘草。\n"),
        ("<think>\n\n</think>\n\n甘草。", "", "甘草。"),
        ("<think>\n没有想完", "没有想完", ""),
    ],
)
def test_thinking_is_told_apart(speaker, text, reasoning, content):
    reader = read_answer(speaker.tokenizer, [], speaker.tokenizer(text)["input_ids"])
    assert (reader.reasoning, reader.content) == (reasoning, content)


def test_template_that_opens_the_think_block(speaker):
    prompt = speaker.tokenizer("<|im_start|>assistant\n<think>\n")["input_ids"]
    reader = read_answer(
        speaker.tokenizer, prompt, speaker.tokenizer("想。\n</think>\n\n甘草。")["input_ids"]
    )
    assert (reader.reasoning, reader.content) == ("想。", "甘草。")


@pytest.mark.parametrize("show, aside", [(True, "想一想\n\n\n"), (False, "thinking ...\n\n")])
def test_thinking_goes_to_stderr(capsys, monkeypatch, show, aside):
    for printer, answer in (
        (AnswerPrinter(show), "甘草\x1b[2J。"),
        (AnswerPrinter(show, show_answer=False), ""),
    ):
        for text, thinking in (
            ("", True),
            ("想一", True),
            ("想\n", True),
            ("", False),
            ("甘草", False),
            ("\x1b[2J。", False),
        ):
            printer(text, thinking)
        assert capsys.readouterr() == (answer, aside)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    AnswerPrinter(show)("\x1b[2J。", False)
    assert capsys.readouterr().out == "\ufffd[2J。"  # a terminal is not to be controlled by a model


def test_side_by_side_counts_wide_characters():
    lines = side_by_side("麻黄汤由麻黄组成", "abcdefghij\n\nx", 17).split("\n")
    assert lines == ["麻黄汤  | abcdefg", "由麻黄  | hij", "组成    |", "        | x"]


# ---- History and commands


class Echo:
    """Stands in for a ChatModel: answers with the number of the question; a question that holds a word below behaves so."""

    name = "echo"

    def __init__(self, speaker, context=4096):
        self.tokenizer, self.model, self.context, self.seen = speaker.tokenizer, speaker.model, context, []

    check_length, decoding = ChatModel.check_length, ChatModel.decoding

    def answer(self, prompt, options, show):
        text = self.tokenizer.decode(prompt)
        self.seen.append(text)
        stopped = "stop" in text.split("<|im_start|>user")[-1]
        content = "" if stopped and "early" in text else f"答{len(self.seen)}"
        show(content, False)
        return Reply(
            content,
            "想" if options.thinking else "",
            3,
            0.5,
            0.1,
            not stopped and "long" not in text,
            stopped,
        )


@pytest.fixture
def chat(speaker):
    options = Options(False, 64, True, {}, torch.Generator())
    return Chat(Echo(speaker), options, "", lambda name: ChatModel(name, CPU))


def talk(chat, *lines):
    for line in lines:
        assert chat.handle(line)


def plain(chat):
    return [(turn.question, turn.answer) for turn in chat.turns]


def test_history_commands(chat, capsys):
    talk(chat, "一", "二", "", "/undo", "三", "/retry")
    assert plain(chat) == [("一", "答1"), ("三", "答4")]
    talk(chat, "/system 你是中医。", "四")
    assert chat.speaker.seen[-1] == (
        "<|im_start|>system\n你是中医。<|im_end|>\n<|im_start|>user\n一<|im_end|>\n<|im_start|>assistant\n答1<|im_end|>\n"
        "<|im_start|>user\n三<|im_end|>\n<|im_start|>assistant\n答4<|im_end|>\n<|im_start|>user\n四<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    talk(chat, "/reset", "/undo", "/retry", "/nonsense", "/rest", "／help")
    said = capsys.readouterr().err
    assert not chat.turns and chat.system
    assert "nothing to take back" in said and "nothing to answer again" in said
    assert "no command /nonsense" in said and "did you mean /reset?" in said and "/compare FOLDER" in said
    assert not chat.handle("/exit")


def test_reasoning_is_kept_apart_and_not_shown_to_the_next_turn(chat):
    talk(chat, "/think on", "一", "二")
    assert chat.turns[0].messages()[1] == {"role": "assistant", "content": "答1", "reasoning_content": "想"}
    assert "想" not in chat.speaker.seen[1]
    assert chat.speaker.seen[1].endswith("<|im_start|>assistant\n")


def test_a_stopped_answer_stays_and_an_empty_one_takes_its_question_back(chat, capsys):
    talk(chat, "一", "stop", "early stop")
    assert plain(chat) == [("一", "答1"), ("stop", "答2")] and not chat.turns[1].whole
    assert "/retry asks it again" in capsys.readouterr().err
    talk(chat, "/retry", "/undo", "二", "/retry")
    assert plain(chat) == [("一", "答1"), ("二", "答6")]


def test_set(chat, capsys):
    talk(chat, "/set temperature=0.3 top_p=0.5 max_new_tokens=9 seed=7")
    assert chat.options.decoding == {"do_sample": True, "temperature": 0.3, "top_p": 0.5}
    assert chat.options.max_new_tokens == 9 and chat.options.random.initial_seed() == 7
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


def test_save_writes_rows_to_train_on(chat, speaker, tmp_path, capsys):
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
    prompt, answer = encode_turns(speaker.tokenizer, rows[1]["messages"])[1]
    assert speaker.tokenizer.decode(prompt).endswith("二<|im_end|>\n<|im_start|>assistant\n")
    assert speaker.tokenizer.decode(answer) == "<think>\n想\n</think>\n\n答3<|im_end|>"


def test_oldest_turns_are_left_out_whole(chat, speaker, capsys):
    chat.speaker = Echo(speaker, context=256)
    talk(chat, "/system 你是中医。", *[f"问题{number}：麻黄汤由哪些药组成？" for number in range(8)])
    last = chat.speaker.seen[-1]
    assert last.startswith("<|im_start|>system\n你是中医。<|im_end|>\n<|im_start|>user\n问题")
    left_out = chat.start
    assert 0 < left_out < 7 and f"问题{left_out - 1}" not in last
    assert all(f"问题{number}" in last for number in range(left_out, 8))
    assert len(speaker.tokenizer(last)["input_ids"]) + 64 <= 256
    assert f"the oldest {left_out} of 7 turns are left out" in capsys.readouterr().err
    assert len(chat.turns) == 8  # /save and /undo still know them
    talk(chat, "长" * 300)
    assert "the context window takes 256" in capsys.readouterr().err and len(chat.turns) == 8
    talk(chat, "/undo", "短")
    assert chat.turns[-1].question == "短"


def test_compare(chat, folder, capsys):
    talk(chat, "一", f"/compare {folder}", "/set temperature=0", "二")
    output = capsys.readouterr()
    assert "echo" in output.out and "答1" in output.out and "答2" in output.out and " | " in output.out
    assert "whose answers make the history" in output.err and plain(chat) == [("一", "答1"), ("二", "答2")]
    talk(chat, "/compare", "三", "/compare no/such/folder", "/compare .")
    assert plain(chat)[-1] == ("三", "答3")
    assert "no/such/folder does not exist" in capsys.readouterr().err


# ---- Which folders load


def test_adapter_answers_as_its_merged_model(folder, speaker, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    adapter = tmp_path / "lora" / "checkpoint-3"
    tuned = get_peft_model(load_model(str(folder), torch.float32), config)
    tuned.save_pretrained(adapter)
    speaker.tokenizer.save_pretrained(adapter)
    (adapter / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.7, "eos_token_id": 5}), encoding="utf-8"
    )
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    speaker.tokenizer.save_pretrained(tmp_path / "merged")
    for dtype in (torch.float32, torch.bfloat16):
        one, other = load_model(str(adapter), dtype), load_model(str(tmp_path / "merged"), dtype)
        for name, weight in other.state_dict().items():
            assert torch.equal(weight, one.state_dict()[name]), name
        prompt = prompts_of(speaker)[0]
        answers = [list(TokenStream(model, set()).answer(prompt, Decoding(), 20)) for model in (one, other)]
        assert answers[0] == answers[1] != reference(speaker, prompt, 20)
    assert decoding_for(one, speaker.tokenizer).temperature == 0.7 and 5 in stop_tokens(
        one, speaker.tokenizer
    )

    write_json(tmp_path / "lora" / "run.json", {"identity": {"MODEL": f"sha256 {model_sha256(folder)}"}})
    load_model(str(adapter), torch.float32)
    write_json(tmp_path / "lora" / "run.json", {"identity": {"MODEL": "sha256 of something else"}})
    with pytest.raises(UserError, match="trained on other weights"):
        load_model(str(adapter), torch.float32)

    with pytest.raises(UserError, match="did you mean .*checkpoint-3"):
        check_model(str(tmp_path / "lora"))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="no \\*.safetensors"):
        check_model(str(adapter))
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "gone")}), encoding="utf-8"
    )
    with pytest.raises(UserError, match="adapter for .*gone, which is not there"):
        check_model(str(adapter))


def damaged(folder, where, **changes):
    """A copy of `folder` with fields of its config.json changed."""
    shutil.copytree(folder, where)
    config = json.loads((where / "config.json").read_text(encoding="utf-8"))
    (where / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return where


def test_folders_that_do_not_load_are_told_in_one_line(folder, tmp_path):
    cut = damaged(folder, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:9000])
    deeper = damaged(folder, tmp_path / "deeper", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    remote = damaged(folder, tmp_path / "remote", model_type="own", auto_map={"AutoConfig": "code.Config"})
    for path, message in (
        (cut, "cannot be loaded"),
        (deeper, "is not whole"),
        (remote, "Python code of its own"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_model(check_model(str(path)), torch.float32)
        assert "\n" not in str(error.value)
    (cut / "model.safetensors").rename(cut / "pytorch_model.bin")
    (deeper / "tokenizer.json").unlink()
    (remote / "chat_template.jinja").unlink()
    for path, message in (
        (cut, "no \\*.safetensors"),
        (deeper, "has no tokenizer"),
        (folder / "config.json", f"did you mean {folder}"),
    ):
        with pytest.raises(UserError, match=message):
            check_model(str(path))
    with pytest.raises(UserError, match="cannot be loaded|no chat template"):
        load_tokenizer(str(remote))


def test_models_are_offered_newest_first(folder, script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(folders, "ROOT", tmp_path)
    with pytest.raises(UserError, match="download_model.py"):
        script.choose_model(ask=False)
    bases, runs = (
        ["model_download/tiny", "model_download/Qwen3-0.6B"],
        ["trainer_output/new", "trainer_output/old"],
    )
    for age, name in enumerate(bases + runs):
        shutil.copytree(folder, tmp_path / name)
        os.utime(tmp_path / name / "model.safetensors", (1e9 - age, 1e9 - age))
    (tmp_path / "trainer_output/unfinished/checkpoint-5").mkdir(parents=True)
    assert [path.name for path in folders.find_models()] == ["new", "old", "Qwen3-0.6B", "tiny"]
    assert script.choose_model(ask=False) == str(tmp_path / "trainer_output/new")
    answers = iter(["7", "x", "2"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    assert script.choose_model(ask=True) == str(tmp_path / "trainer_output/old")
    assert "3  " in capsys.readouterr().err


# ---- The script: answers for other programs


def test_prompt_prints_the_answer_and_nothing_else(script, folder, speaker, capsys):
    command = [
        str(folder),
        "--prompt",
        "甘草",
        "--max-new-tokens",
        "12",
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    script.main([*command, "--greedy"])
    output = capsys.readouterr()
    prompt = prompts_of(speaker)[0]
    assert output.out == read_answer(speaker.tokenizer, prompt, reference(speaker, prompt, 12)).content + "\n"
    assert (
        "not medical advice" in output.err and "12 tokens" in output.err and "cut at the limit" in output.err
    )
    answers = []
    for seed in (5, 5, 6):
        script.main([*command, "--seed", str(seed)])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_questions_from_a_pipe(script, folder, speaker, monkeypatch, capsys):
    questions = "\ufeff" + "\r\n\n".join(QUESTIONS)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(questions.encode()), encoding="ascii"))
    script.main(
        [
            str(folder),
            "--json",
            "--max-new-tokens",
            "12",
            "--seed",
            "4",
            "--device",
            "cpu",
            "--precision",
            "fp32",
        ]
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["question"] for row in rows] == QUESTIONS
    assert all(
        list(row) == ["question", "answer", "tokens", "seconds"] and row["seconds"] > 0 for row in rows
    )
    for row, prompt in zip(rows, prompts_of(speaker)):  # each as if it were the only one
        ids = list(
            TokenStream(speaker.model, speaker.stream.stop).answer(
                prompt, Decoding(**DECODING[True]), 12, torch.Generator().manual_seed(4)
            )
        )
        assert (row["answer"], row["tokens"]) == (
            read_answer(speaker.tokenizer, prompt, ids).content,
            len(ids),
        )


@pytest.mark.parametrize("method, inside", [("sft", ""), ("lora", "merged")])
def test_a_trained_folder_answers_the_same_through_the_code_in_the_readme(
    script, tmp_path, capsys, monkeypatch, method, inside
):
    monkeypatch.setattr(
        signal, "signal", lambda number, handler: None
    )  # the trainer's handlers of Ctrl-C are its script's
    trainer = importlib.import_module(f"model_finetune.finetune_{method}")
    assert trainer.main(
        arguments(method, make_place(tmp_path), tmp_path / "trained", "--batch-size", "4")
    ) in (None, 0)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(from transformers import .*?)```", readme, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    question = re.search('"content": "(.*?)"', code)[1]
    folder = str(tmp_path / "trained" / inside)
    code = re.sub('folder = ".*"', f"folder = {folder!r}", code)
    code = re.sub(
        r"max_new_tokens=\d+(, do_sample=False)?", "max_new_tokens=60, do_sample=False", code
    )  # both greedy

    capsys.readouterr()
    script.main(
        [
            folder,
            "--prompt",
            question,
            "--greedy",
            "--max-new-tokens",
            "60",
            "--device",
            "cpu",
            "--precision",
            "fp32",
        ]
    )
    ours = capsys.readouterr().out
    exec(code, {})
    assert capsys.readouterr().out == ours and len(set(ours)) > 3


@pytest.mark.parametrize(
    "lines, message",
    [
        ("甘草\n".encode() + b"\xb8\xca", "stdin, line 2: not UTF-8"),
        (("长" * 5000).encode(), "stdin, line 1: the question has"),
        (b" \n\n", "no question on stdin"),
    ],
)
def test_questions_that_cannot_be_answered(script, folder, monkeypatch, capsys, lines, message):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    with pytest.raises(UserError, match=message):
        script.main([str(folder), "--max-new-tokens", "2", "--precision", "fp32"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no/such/folder/at/all", "--prompt", "x"], "does not exist"),
        (["--prompt", " "], "--prompt"),
        (["--thinking", "maybe", "--prompt", "x"], "--thinking"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        ([str(ROOT / "utils"), "--prompt", "x"], "is not a model folder"),
        (["--promt", "x"], "did you mean --prompt?"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(run_script, arguments, message):
    result = run_script(SCRIPT, *arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert message in result.stderr and len(result.stderr.splitlines()) == 1


def test_wrong_device(script, folder):
    for flag, value in (("--device", "abacus"), ("--precision", "fp8")):
        with pytest.raises(UserError, match=value):
            script.main([str(folder), "--prompt", "x", flag, value])


def test_help_needs_no_torch():
    code = (
        "import runpy, sys\nsys.argv = ['x', '--help']\n"
        f"try: runpy.run_path({str(ROOT / SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit: print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8"
    ).stdout
    assert "--show-thinking" in output and output.endswith("False\n")


# ---- A session in a terminal


class Terminal:
    """The script in a pseudo-terminal: type(text), then read on until a pattern has been seen."""

    def __init__(self, *command, **environment):
        import pty

        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.execve(command[0], command, {**os.environ, "TERM": "xterm", **environment})
        self.screen = ""

    def type(self, text, wanted=r"> $"):
        """Returns what was printed from then on, up to the regular expression `wanted`."""
        start = len(self.screen)
        os.write(self.file, text if isinstance(text, bytes) else text.encode())
        return self.read(wanted, start)

    def read(self, wanted, start=0, seconds=60):
        deadline, raw = time.monotonic() + seconds, b""
        while not re.search(wanted, self._plain(self.screen[start:])):
            assert time.monotonic() < deadline, f"no {wanted!r} in {self.screen[start:]!r}"
            if select.select([self.file], [], [], 0.1)[0]:
                try:
                    raw += os.read(self.file, 65536)
                except OSError:  # Linux says EIO once the other end is closed
                    break
                whole = raw.decode("utf-8", "ignore")
                self.screen, raw = self.screen + whole, raw[len(whole.encode()) :]
        return self._plain(self.screen[start:])

    @staticmethod
    def _plain(text):
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", text)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pty")
def test_session_in_a_terminal(folder, speaker, tmp_path):
    # A folder whose answer to the first question ends soon: the tenth token of that answer becomes an end token.
    own = damaged(folder, tmp_path / "中医模型")
    settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    end = reference(speaker, prompts_of(speaker)[0], 40)[9]
    settings["eos_token_id"].append(end)
    (own / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert end not in reference(
        speaker, prompts_of(speaker, False)[3], 500
    )  # the answer for Ctrl-C does not end soon
    terminal = Terminal(
        sys.executable,
        str(ROOT / SCRIPT),
        str(own),
        "--greedy",
        "--precision",
        "fp32",
        "--max-new-tokens",
        "3000",
        OMP_NUM_THREADS="1",
        LC_ALL="C.UTF-8",
    )
    assert "not medical advice" in terminal.read(r"> $")
    saved, answered = tmp_path / "saved.jsonl", r"tokens/s.*\n> $"

    assert "/undo" in terminal.type("/help\n")
    terminal.type("甘草\n", answered)
    assert "1 turns appended" in terminal.type(f"/save {saved}\n")
    assert "set" in terminal.type("/system 你是中医师。\n")
    assert "thinking off" in terminal.type("/think off\n")
    assert "temperature 0.9" in terminal.type("/set temperature=0.9\n")
    assert "greedy" in terminal.type("/set temperature=0 max_new_tokens=20\n")
    assert "error: /set has no tempo" in terminal.type("/set tempo=1\n")
    terminal.type(
        "麻黄的功效\x1b[D\x1b[D\x1b[D汤龘\x7f\n", answered
    )  # three steps left, two typed, one deleted
    assert "taken back: 麻黄汤的功效)" in terminal.type("/undo\n")
    terminal.type("麻黄汤的\\\n功效是什么？\n", answered)
    assert "taken back: 麻黄汤的\n功效是什么？)" in terminal.type("/undo\n")
    terminal.type("/retry\n", answered)
    terminal.type("\x1b[200~合谷是什么？\n为什么？\x1b[201~\n", answered)  # a paste of two lines
    assert "taken back: 合谷是什么？\n为什么？)" in terminal.type("/undo\n")
    assert "did you mean /reset?" in terminal.type("/rset\n")
    terminal.type("龘", "龘$")
    time.sleep(
        0.5
    )  # CPython loses a Ctrl-C that comes in the microseconds between the echo and its wait for the next key
    assert "stopped" in terminal.type("\x03", r"stopped; .*\n> $")  # it drops what is being typed
    terminal.type(f"/compare {folder}\n", answered)
    assert "one model" in terminal.type("/compare\n")
    terminal.type(b"/system \xe7\x94\xb2\xe7\n", r"set.*\n> $")  # half a character
    terminal.type("/system\n", r"removed.*\n> $")
    terminal.type("/reset\n")

    # Ctrl-C in the middle of an answer; afterwards the same question as in the beginning gets the same answer.
    terminal.type("/set max_new_tokens=3000\n")
    terminal.type(QUESTIONS[3] + "\n", r"说明。\n+[^\n]{5}")
    assert "stopped by Ctrl-C" in terminal.type("\x03", answered)
    terminal.type("/undo\n")
    terminal.type("/think auto\n")
    terminal.type("甘草\n", answered)
    assert "1 turns appended" in terminal.type(f"/save {saved}\n")
    terminal.type("\x04", r"\n$")
    assert os.waitpid(terminal.pid, 0)[1] == 0
    assert "Traceback" not in terminal.screen
    first, second = (json.loads(line)["messages"] for line in saved.read_text(encoding="utf-8").splitlines())
    assert first == second and first[0] == {"role": "user", "content": "甘草"} and len(first) == 2
