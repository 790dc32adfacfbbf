"""Small files damaged at random: what reads one tells in one line that it is damaged, or reads it, or makes anew what was kept.

Kept files that carry a checksum are read as they were, or not at all.
"""

import collections
import json
import math
import random
import shutil
import time
from pathlib import Path

import pytest
import torch

from utils.errors import UserError
from utils.files import read_log, write_json, write_jsonl
from utils.kept import is_kept, read_kept, seal, write_kept
from utils.model.folder import check_model, load_model, load_tokenizer, read_record

VALUES = (None, True, -1, 0, 10**30, 1e308, math.nan, "", "x" * 300, "(a+)+$", "../x", [], {}, [[]], [None], {"a": 1})  # fmt: skip
TEXTS = ("", "\0", "[]", "3", "null", "{", '"text"', "[" * 50_000, "9" * 5000, '{"a": 1}', "\ufeff{}")
IDENTITY = {"MODEL": "sha256 of it", "LAYERS": 2}
KEPT = {"folder": "one", "items": [{"test": "exam", "id": "0", "letters": [-1.5]}]}


def damage(content, chance):
    """The bytes of a file, damaged: another text, cut, a bit or some bytes less, or another value somewhere in its JSON."""
    kind = chance.randrange(6 if content[:1] in (b"{", b"[") else 4)  # only JSON gets other values
    if kind == 0 or not content:
        return (chance.choice(TEXTS) + chance.choice(("", "\n"))).encode()
    start, length = chance.randrange(len(content)), chance.randrange(1, 40)
    if kind < 4:
        flipped = bytes([content[start] ^ 1 << chance.randrange(8)]) + content[start + 1 :]
        return content[:start] + [b"", flipped, content[start + length :]][kind - 1]
    lines = content.decode().splitlines() if content.count(b"\n{") else [content.decode()]
    number = chance.randrange(len(lines))
    value = inner = json.loads(lines[number])
    while inner:
        place = chance.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        if not isinstance(inner[place], (dict, list)) or not inner[place] or chance.random() < 0.5:
            break
        inner = inner[place]
    if inner:
        inner[place] = chance.choice(VALUES)
        if chance.random() < 0.2:
            del inner[place]
    lines[number] = json.dumps(value)
    return "\n".join(lines).encode()


def load(folder):
    check_model(str(folder))
    load_tokenizer(str(folder))
    load_model(str(folder), torch.float32)


@pytest.fixture(scope="module")
def targets(tmp_path_factory, tiny_folder):
    """[(file, what reads it, what that gives where the file is kept under a checksum), ...]"""
    place = tmp_path_factory.mktemp("fuzz")
    model, run = shutil.copytree(tiny_folder, place / "model"), place / "run"
    adapter = make_adapter(tiny_folder, run / "checkpoint-1")
    record = {"status": "finished", "identity": {"MODEL": "x"}, "settings": {"MODEL": "x"}, "results": {}}
    write_json(run / "run.json", record)
    log = [{"step": n, "loss": 1.5, "learning_rate": 1e-5} for n in range(5)]
    write_jsonl(run / "training_log.jsonl", log)
    write_kept(run / "kept.json", IDENTITY, KEPT)
    tokens, saved = run / "rows.arrow", place / "saved" / "checkpoint-1"
    tokens.write_bytes(b"tokens")
    saved.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        (saved / name).write_text(name, encoding="utf-8")
    for sealed in (tokens, saved):
        seal(sealed, IDENTITY)
    return [
        *((model / name, lambda: load(model), None) for name in MODEL_FILES),
        (adapter / "adapter_config.json", lambda: load(adapter), None),
        (run / "run.json", lambda: read_record(run), None),
        (run / "run.json", lambda: load(adapter), None),
        (run / "training_log.jsonl", lambda: read_log(run / "training_log.jsonl"), None),
        (run / "kept.json", lambda: read_kept(run / "kept.json", IDENTITY), KEPT),
        (run / "rows.arrow.json", lambda: is_kept(tokens, IDENTITY) or None, True),
        (tokens, lambda: is_kept(tokens, IDENTITY) or None, True),
        (saved / "MANIFEST.json", lambda: is_kept(saved, IDENTITY) or None, True),
    ]


MODEL_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")


def make_adapter(base, folder):
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(load_model(str(base), torch.float32), LoraConfig(r=2, target_modules=["q_proj"]))
    tuned.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, folder)
    path = Path(folder) / "adapter_config.json"
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": str(base)})
    return folder


def outcome(path, read, kept):
    """How reading a damaged file ends: "told", "as before", "made again" (kept files), "read" (others)."""
    start = time.process_time()
    try:
        found = read()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, str(error)
        return "told"
    finally:
        assert time.process_time() - start < 10
    if kept is None:
        return "read"
    assert found is None or found == kept
    return "made again" if found is None else "as before"


def test_damage_is_told_or_harmless(targets):
    """Case N damages one file in its own way, the same on every machine."""
    counts, bugs = collections.Counter(), []
    for case in range(300):
        path, read, kept = targets[case % len(targets)]
        content, chance = path.read_bytes(), random.Random(case)
        path.write_bytes(damage(content, chance))
        try:
            counts[outcome(path, read, kept)] += 1
        except Exception as error:  # a bug, whatever it is: all of them are shown
            bugs.append(f"case {case}, {path.name}: {error!r:.200} for {path.read_bytes()[:200]!r}")
        path.write_bytes(content)
    assert not bugs, "\n".join(bugs[:20])
    assert counts["told"] and counts["made again"] and counts["read"]
