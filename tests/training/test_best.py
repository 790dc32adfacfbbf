"""The finished model is the best of the run; what is kept until then survives a kill, or is not believed."""

import pytest
from small_runs import make_place, same_run, train

from utils.files import read_json, read_jsonl, write_jsonl
from utils.training.log import best_of, verdict
from utils.training.loop import Learner
from utils.training.run import Run

WORSENS = ["--epochs", 3, "--warmup", 0, "--learning-rate", 1e-2, "--evaluations", 6]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """A place whose held-out answers are others than those trained on: the loss falls, then rises."""
    folder = make_place(tmp_path_factory.mktemp("place"))
    rows = list(read_jsonl(folder / "sft_eval.jsonl"))
    for row in rows:
        row["messages"][-1]["content"] = "功效：益气健脾。"
    write_jsonl(folder / "sft_eval.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def finished(wrong):
    assert train("sft", wrong, wrong / "whole", *WORSENS) == 0
    return wrong / "whole"


def results(folder):
    return read_json(folder / "run.json")["results"]


def test_the_finished_model_is_the_best_one(wrong, finished, capsys):
    found = results(finished)
    assert found["kept_step"] == found["best_step"] < found["steps"]
    assert found["eval_loss"] < found["eval_loss_last"]
    again = ["--model", finished, "--max-steps", 1]
    assert train("sft", wrong, wrong / "again", *again) == 0
    assert results(wrong / "again")["eval_loss_before"] == pytest.approx(found["eval_loss"], rel=1e-5)


def test_the_last_one_is_kept_where_asked_for(wrong, finished, capsys):
    assert train("sft", wrong, wrong / "last", *WORSENS, "--keep", "last") == 0
    found, said = results(wrong / "last"), capsys.readouterr().out
    assert found["kept_step"] == found["steps"] and found["eval_loss"] == results(finished)["eval_loss_last"]
    assert "is clearly worse than the best" in said and "or take --keep best" in said
    assert not (wrong / "last/best").exists()


@pytest.fixture
def killed(wrong, monkeypatch):
    """killed(name, step) -> the folder of a run that ended abruptly in the step after `step`."""

    def run(name, step):
        whole, steps = Learner.backward, []

        def die(self, *given):
            if len(steps) == step:
                raise SystemExit(9)
            steps.append(given)
            return whole(self, *given)

        with monkeypatch.context() as patch:
            patch.setattr(Learner, "backward", die)
            assert train("sft", wrong, wrong / name, *WORSENS) == 9
        return wrong / name

    return run


@pytest.mark.slow
@pytest.mark.parametrize("step", [7, 14])
def test_a_run_that_goes_on_keeps_the_same_best(killed, wrong, finished, step):
    output = killed(f"killed_{step}", step)
    assert len(list((output / "best").glob("*.safetensors"))) == 1
    assert train("sft", wrong, output, *WORSENS) == 0
    assert results(output)["kept_step"] == results(finished)["kept_step"] and same_run(output, finished)


def test_the_best_at_the_last_checkpoint_stays(place, tmp_path, monkeypatch):
    """On a GPU an evaluation that is made again may differ a little, and the newer weights be the best no more."""
    kept, keep = {}, Run.keep_if_best

    def noted(run, step, model):
        keep(run, step, model)
        kept[step] = {path.stem for path in (run.folder / "best").glob("*.safetensors")}

    monkeypatch.setattr(Run, "keep_if_best", noted)
    # better at every evaluation; a checkpoint after steps 6 and 12
    assert train("sft", place, tmp_path / "out", "--evaluations", 10) == 0
    assert kept[6] == {"step-6"} and kept[8] == {"step-6", "step-8"} and kept[11] == {"step-6", "step-11"}


@pytest.mark.slow
def test_damaged_best_weights_are_not_taken(killed, wrong, finished, capsys):
    output = killed("damaged", 14)
    for path in (output / "best").glob("*.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert train("sft", wrong, output, *WORSENS) == 0
    assert "is missing or damaged; the weights of the last step are kept instead" in capsys.readouterr().out
    assert results(output)["kept_step"] == results(output)["steps"]


def entry(step, loss, accuracy=None):
    more = {} if accuracy is None else {"eval_reward_accuracy": accuracy}
    return {"step": step, "eval_loss": loss, **more}


def test_the_best_of_pairs_is_by_accuracy_then_loss():
    assert best_of([entry(1, 0.5, 0.8), entry(2, 0.6, 0.9), entry(3, 0.4, 0.9)])["step"] == 3
    assert best_of([entry(1, 0.5), entry(2, 0.4), entry(3, 0.4)])["step"] == 2


@pytest.mark.parametrize(
    "start, after, losses, words",
    [
        (entry(0, 2.0), [entry(5, 1.5), entry(9, 1.4)], [3, 1], "kept: step 9, 1.4000"),
        (entry(0, 2.0), [entry(5, 1.5), entry(9, 1.6)], [3, 1], "kept: step 5, 1.5000; last: step 9, 1.6000"),
        (entry(0, 2.0), [entry(5, 2.1), entry(9, 2.2)], [3, 1], "lower LEARNING_RATE, or give it more rows"),
        (entry(0, 2.0), [entry(5, 2.0), entry(9, 2.1)], [3, 3], "the training loss did not fall either"),
        (entry(0, 0.7, 0), [entry(5, 0.7, 0.5)], [3, 1], "the best evaluation is no better than chance"),
        (entry(0, 0.7, 0), [entry(5, 0.6, 0.9), entry(9, 0.5, 0.8)], [3, 1], "the last step is clearly worse"),
    ],
)  # fmt: skip
def test_what_is_said_at_the_end(start, after, losses, words):
    said = verdict(start, after, losses, best_of(after), 100)
    assert any(words in line for line in said) and len(said) <= 2


def test_few_pairs_say_nothing_about_the_run():
    start, after = entry(0, 0.7, 0), [entry(5, 0.6, 0.9), entry(9, 0.7, 0.4)]
    assert [len(verdict(start, after, [3, 1], after[0], pairs)) for pairs in (99, 100)] == [1, 2]
