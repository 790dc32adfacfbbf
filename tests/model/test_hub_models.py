"""Models named by a Hub id: brought whole, checked like any folder before anything is built, and not fetched twice."""

import json

import pytest
import torch
from fake_hub import FakeHub

from utils.errors import RunError, UserError
from utils.model import hub_models
from utils.model.folder import load_model, load_tokenizer, model_sha256, quiet_offline


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A FakeHub as HF_ENDPOINT, and an empty cache."""
    import huggingface_hub

    fake = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # put back after the test, whatever sets it
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(hub_models, "RETRIES", 0)
    yield fake
    huggingface_hub.close_session()
    fake.stop()


@pytest.fixture
def files(tiny_folder):
    return {path.name: path.read_bytes() for path in tiny_folder.iterdir() if path.is_file()}


def with_fields(content, **fields):
    return json.dumps(json.loads(content) | fields).encode()


def test_a_model_is_brought_once_and_used_as_a_folder(hub, files, tiny_folder, capsys):
    commit = hub.add("model", "tcm/tiny", files | {"modeling.py": b"code", "pytorch_model.bin": b"pickle"})
    quiet_offline("tcm/tiny")
    out, err = capsys.readouterr()
    assert out == "" and "tcm/tiny at" in err  # chat's stdout holds answers alone
    asked = len(hub.log)
    folder = hub_models.local_folder("tcm/tiny")
    assert folder.endswith(f"models--tcm--tiny/snapshots/{commit}")
    assert not [name for name in ("modeling.py", "pytorch_model.bin") if hub.asked(f"/{name}")]
    theirs, ours = load_model("tcm/tiny", torch.float32), load_model(str(tiny_folder), torch.float32)
    for one, other in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(one, other)
    assert load_tokenizer("tcm/tiny").chat_template == load_tokenizer(str(tiny_folder)).chat_template
    assert model_sha256("tcm/tiny") == model_sha256(str(tiny_folder))
    quiet_offline("tcm/tiny")
    assert len(hub.log) == asked


def test_what_huggingface_hub_brought_is_used(hub, files, tmp_path):
    commit = hub.add("model", "tcm/tiny", files)
    snapshot = tmp_path / "cache/models--tcm--tiny/snapshots" / commit
    (blobs := snapshot.parents[1] / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name, content in files.items():  # as it lays them out: links to blobs
        (blobs / name).write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text(commit, encoding="utf-8")
    quiet_offline("tcm/tiny")
    load_tokenizer("tcm/tiny")
    assert not hub.log


def test_a_damaged_file_in_the_cache_is_fetched_again(hub, files):
    hub.add("model", "tcm/tiny", files)
    quiet_offline("tcm/tiny")
    weights = hub_models.Path(hub_models.local_folder("tcm/tiny")) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    quiet_offline("tcm/tiny")
    assert weights.read_bytes() == files["model.safetensors"]


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("config.json", {"num_hidden_layers": 10**8, "layer_types": None}, "num_hidden_layers is 1"),
        ("config.json", {"model_type": "own", "auto_map": {"AutoModel": "own.Own"}}, "code from a model is not run"),
        ("config.json", {"model_type": "llama"}, "is a llama model; wanted Qwen3"),
        ("generation_config.json", {"temperature": "hot"}, "temperature"),
    ],
)  # fmt: skip
def test_a_hostile_folder_is_refused_before_anything_is_built(hub, files, monkeypatch, name, change, words):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", pytest.fail)
    hub.add("model", "tcm/tiny", files | {name: with_fields(files[name], **change)})
    with pytest.raises(UserError, match=words) as error:
        quiet_offline("tcm/tiny")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=words):
        load_model("tcm/tiny", torch.float32)


def test_weights_elsewhere_are_refused(hub, files):
    index = json.dumps({"weight_map": {"a": "../../outside.safetensors"}}).encode()
    weights = files.pop("model.safetensors")
    hub.add("model", "tcm/tiny", files | {"a.safetensors": weights, "model.safetensors.index.json": index})
    with pytest.raises(UserError, match="wanted names of ..safetensors in the folder"):
        quiet_offline("tcm/tiny")


def test_what_cannot_be_had_is_told(hub, files):
    with pytest.raises(UserError, match="tcm/none"):
        quiet_offline("tcm/none")
    hub.add("model", "tcm/pickled", {"config.json": b"{}", "pytorch_model.bin": b""})
    with pytest.raises(UserError, match="other kinds are not fetched"):
        quiet_offline("tcm/pickled")
    hub.add("model", "tcm/tiny", files)
    hub.fault("/storage/", corrupt=True)
    with pytest.raises(RunError, match="arrived damaged twice"):
        quiet_offline("tcm/tiny")
    with pytest.raises(UserError, match="not on this machine; get it with: .* --model tcm/tiny"):
        hub_models.local_folder("tcm/tiny")
