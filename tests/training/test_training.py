"""SFT, LoRA and DPO through their scripts: files as documented, loss falls, what is wrong is said in one line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from small_runs import arguments, make_place, same_weights, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from model_finetune import finetune_dpo, finetune_lora, finetune_sft
from utils.errors import run
from utils.files import read_json, read_jsonl
from utils.training.callbacks import chosen_fell
from utils.training.trainer import PackedTrainer

SCRIPTS = {"sft": finetune_sft, "lora": finetune_lora, "dpo": finetune_dpo}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("训练 数据"))  # a space and Chinese characters in the path


def train(method, place, output, *more):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    code = run(lambda: SCRIPTS[method].main(arguments(method, place, output, *more)))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return code


@pytest.fixture(scope="module")
def finished(place):
    """{method: finished folder}, each trained once and never stopped."""
    folders = {}
    for method in SCRIPTS:
        folders[method] = place / f"{method}_whole"
        assert train(method, place, folders[method]) == 0
    return folders


@pytest.mark.parametrize("method", SCRIPTS)
def test_the_finished_folder_is_as_documented(finished, method):
    folder = finished[method]
    record, log = read_json(folder / "run.json"), list(read_jsonl(folder / "training_log.jsonl"))
    assert record["status"] == "finished" and record["settings"]["EPOCHS"] == 2
    assert record["results"]["eval_loss"] < record["results"]["eval_loss_before"]
    assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert [entry["step"] for entry in log if "loss" in entry] == list(
        range(1, record["results"]["steps"] + 1)
    )
    assert [entry["step"] for entry in log if "eval_loss" in entry][0] == 0
    assert len([entry for entry in log if "eval_loss" in entry]) == 3
    assert len(list(folder.glob("checkpoint-*"))) == 2
    assert not [path for path in folder.iterdir() if "partial" in path.name]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "你好"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<think>\n\n</think>\n\n")  # trained without thinking: that is the default now
    assert read_json(folder / "generation_config.json")["eos_token_id"] == [
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
        tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    ]


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_finished_model_loads_with_tied_embeddings(finished, method):
    model = AutoModelForCausalLM.from_pretrained(finished[method])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32


def test_the_merged_model_is_base_plus_adapter(finished, place):
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, finished["lora"])
    merged = AutoModelForCausalLM.from_pretrained(finished["lora"] / "merged", dtype=torch.float32)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert not [name for name in weights(finished["lora"]) if "embed" in name or "lm_head" in name]
    ids = torch.arange(60)[None]
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-4)


def test_dpo_raises_the_chosen_over_the_rejected(finished):
    log = [entry for entry in read_jsonl(finished["dpo"] / "training_log.jsonl") if "eval_loss" in entry]
    assert log[0]["eval_reward_margin"] == pytest.approx(0, abs=1e-4)  # the policy starts as the reference
    assert log[-1]["eval_reward_accuracy"] == 1 and log[-1]["eval_reward_margin"] > 0.5
    assert (
        log[-1]["eval_chosen_logps"] > log[0]["eval_chosen_logps"]
    )  # the SFT term holds the chosen answers up


def test_falling_chosen_answers_are_noticed():
    assert not chosen_fell([{"eval_chosen_logps": -20.0}, {"loss": 1.0}, {"eval_chosen_logps": -21.0}])
    assert not chosen_fell([{"eval_chosen_logps": -2.8}, {"eval_chosen_logps": -3.2}])
    assert chosen_fell([{"eval_chosen_logps": -20.0}, {"eval_chosen_logps": -25.0}])


def test_a_finished_run_says_so_and_is_left_alone(finished, place, capsys):
    before = (finished["sft"] / "model.safetensors").stat().st_mtime_ns
    assert train("sft", place, finished["sft"]) == 0
    assert "is finished already" in capsys.readouterr().out
    assert (finished["sft"] / "model.safetensors").stat().st_mtime_ns == before


def test_changed_settings_are_refused_by_name(finished, place, capsys):
    assert train("sft", place, finished["sft"], "--learning-rate", "1e-4") == 2
    assert "LEARNING_RATE: 0.003 -> 0.0001" in capsys.readouterr().err


def test_fresh_keeps_the_earlier_run(finished, place, capsys):
    output = place / "again"
    shutil.copytree(finished["sft"], output)
    assert train("sft", place, output, "--fresh", "--max-steps", 2) == 0
    assert "the earlier run is kept in" in capsys.readouterr().out
    (kept,) = place.glob("again.*")
    assert same_weights(kept, finished["sft"])
    assert read_json(output / "run.json")["results"]["steps"] == 2


def test_a_second_run_in_the_folder_is_refused(place, capsys):
    import fcntl

    output = place / "held"
    output.mkdir()
    with open(output / ".lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711")
        lock.flush()
        assert train("sft", place, output) == 2
    assert "in use by another run (process 4711)" in capsys.readouterr().err


def test_a_damaged_checkpoint_falls_back_to_the_one_before(finished, place, capsys):
    output = place / "damaged"
    shutil.copytree(finished["sft"], output)
    record = read_json(output / "run.json")
    (output / "run.json").write_text(json.dumps({**record, "status": "running"}), encoding="utf-8")
    newest = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    damaged = newest / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert train("sft", place, output) == 0
    said = capsys.readouterr().out
    assert f"{newest.name} is damaged (model.safetensors)" in said
    assert same_weights(output, finished["sft"])


@pytest.mark.parametrize(
    "change, message",
    [
        (["--train-file", "nowhere.jsonl"], "does not exist; make it with: python data_prepare/"),
        (["--model", "trainer_output"], "is not a model folder"),
        (["--device", "cuda"], "no cuda device here"),
        (["--max-length", "5"], "no row fits into MAX_LENGTH = 5"),
    ],
)
def test_wrong_input_is_one_line(place, tmp_path, capsys, monkeypatch, change, message):
    if change[1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.chdir(ROOT)
    assert train("sft", place, tmp_path / "out", *change) == 2
    errors = capsys.readouterr().err
    assert message in errors and len(errors.strip().splitlines()) == 1


def test_broken_data_names_the_line(place, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"id": "1", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}\n{"id": \n',
        encoding="utf-8",
    )
    assert train("sft", place, tmp_path / "out", "--train-file", path) == 2
    assert "rows.jsonl, line 2: not JSON" in capsys.readouterr().err
    path.write_text("", encoding="utf-8")
    assert train("sft", place, tmp_path / "out2", "--train-file", path) == 2
    assert "rows.jsonl is empty" in capsys.readouterr().err


@pytest.mark.parametrize("method", SCRIPTS)
def test_estimate_tells_and_touches_nothing(place, tmp_path, capsys, method):
    assert train(method, place, tmp_path / "out", "--estimate") == 0
    said = capsys.readouterr().out
    assert "memory: " in said and "disk: " in said and "steps" in said
    assert not (tmp_path / "out").exists()


def test_the_forecast_counts_activations_as_they_are(place):
    """Twice the tokens leave twice the bytes: the probe scales, so what it measures on few tokens holds for many."""
    from types import SimpleNamespace

    from utils.model.packed_forward import prepare_packed
    from utils.training import memory

    model = prepare_packed(AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32))
    per_token = {}
    for memory.PROBE_TOKENS in (32, 64, 256):
        per_token[memory.PROBE_TOKENS] = memory.bytes_per_token(model, SimpleNamespace(bf16=False))
    memory.PROBE_TOKENS = 64
    assert per_token[64] == pytest.approx(per_token[256], rel=0.03)
    parts = memory.memory_parts(model, 1000, SimpleNamespace(bf16=False, device=torch.device("cpu")))
    assert parts["weights"] == 4 * model.num_parameters() and parts["optimizer"] == 2 * parts["weights"]


@pytest.mark.parametrize("what, message", [("memory", "the run needs"), ("disk", "of disk and")])
def test_what_cannot_fit_is_refused_before_it_starts(place, tmp_path, capsys, monkeypatch, what, message):
    from types import SimpleNamespace

    from utils.training import memory

    if what == "memory":
        monkeypatch.setattr(memory, "free_memory", lambda device: 601 * 2**20)
    else:
        monkeypatch.setattr(memory.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert train("sft", place, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out/run.json").exists()


def test_memory_that_a_container_may_use(tmp_path, monkeypatch):
    from utils.training import memory

    device = torch.device("cpu")
    monkeypatch.setattr(memory, "CONTAINER_LIMIT", tmp_path / "memory.max")
    free = memory.free_memory(device)
    for text, wanted in (("12345678\n", 12345678), ("max\n", free)):
        (tmp_path / "memory.max").write_text(text, encoding="ascii")
        assert abs(memory.free_memory(device) - wanted) <= (
            0 if text[0] == "1" else 2**30
        )  # other programs come and go


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_rows(place, tmp_path, capsys, monkeypatch):
    whole = PackedTrainer.batch_loss

    def spoilt(self, hidden, batch):
        result = whole(self, hidden, batch)
        if self.state.global_step == 2 and torch.is_grad_enabled():
            return result._replace(loss=result.loss * float("nan"))
        return result

    monkeypatch.setattr(PackedTrainer, "batch_loss", spoilt)
    assert train("sft", place, tmp_path / "out") == 1
    said = re.search(
        r"the loss became nan at step 3, in rows ((\d+, ){4}\d+)( and \d+ more)?; lower",
        capsys.readouterr().err,
    )
    assert said and all(int(row) < 60 for row in said[1].split(", "))


def test_a_learning_rate_far_too_high_stops_the_run(place, tmp_path, capsys):
    assert train("sft", place, tmp_path / "out", "--learning-rate", "1e20", "--max-steps", 6) == 1
    assert re.search("the (loss|gradient) became (nan|inf) at step", capsys.readouterr().err)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        finetune_sft.sys.modules["torch"].nn.utils,
        "clip_grad_norm_",
        lambda *a, **k: torch.tensor(float("inf")),
    )
    assert train("sft", place, tmp_path / "out", "--max-steps", 1) == 1
    assert "the gradient became inf at step 1" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_no_memory_underway_names_the_last_checkpoint(place, tmp_path, capsys, monkeypatch):
    whole, calls = PackedTrainer.batch_loss, []

    def hungry(self, hidden, batch):
        calls.append(1)
        if len(calls) > 20 and torch.is_grad_enabled():
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return whole(self, hidden, batch)

    monkeypatch.setattr(PackedTrainer, "batch_loss", hungry)
    assert train("sft", place, tmp_path / "out") == 1
    errors = capsys.readouterr().err
    assert (
        "not enough memory after step" in errors
        and "checkpoint-6 is kept" in errors
        and len(errors.strip().splitlines()) == 1
    )


def test_lora_inside_dpo(place, tmp_path):
    assert train("dpo", place, tmp_path / "out", "--lora", "--max-steps", 2) == 0
    assert (tmp_path / "out/adapter_model.safetensors").is_file() and (
        tmp_path / "out/merged/model.safetensors"
    ).is_file()


def test_the_hub_is_not_contacted(place, tmp_path):
    """With a proxy that refuses everything and no offline flag, training from a folder still works: nothing is asked."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "home"),
    }
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "model_finetune/finetune_sft.py"),
            *arguments("sft", place, tmp_path / "out", "--max-steps", 1),
        ],
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "Retry" not in done.stderr and "Max retries" not in done.stderr
