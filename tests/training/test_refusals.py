"""What stops a training: wrong input, a loss that is no number, no memory; each told in one line."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from small_runs import arguments, train

from model_finetune import finetune_sft
from utils.training.trainer import PackedTrainer


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


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_rows(place, tmp_path, capsys, monkeypatch):
    whole = PackedTrainer.batch_loss

    def spoilt(self, hidden, batch, scale):
        result = whole(self, hidden, batch, scale)
        if self.state.global_step == 2 and torch.is_grad_enabled():
            return result._replace(loss=result.loss + float("nan"))
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


@pytest.mark.slow
def test_no_memory_underway_names_the_last_checkpoint(place, tmp_path, capsys, monkeypatch):
    whole = PackedTrainer.batch_loss

    def hungry(self, hidden, batch, scale):
        if self.state.global_step == 8 and torch.is_grad_enabled():
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return whole(self, hidden, batch, scale)

    monkeypatch.setattr(PackedTrainer, "batch_loss", hungry)
    assert train("sft", place, tmp_path / "out") == 1
    errors = capsys.readouterr().err
    assert (
        "not enough memory after step" in errors
        and "checkpoint-6 is kept" in errors
        and len(errors.strip().splitlines()) == 1
    )


@pytest.mark.slow
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
