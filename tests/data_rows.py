"""Rows to convert, and files of them."""

import json
from pathlib import Path

CASE = "患者男性四十五岁反复头痛三年每遇风寒则发作伴有项背拘急恶风畏寒口不渴舌苔薄白脉浮紧曾服止痛药无效近日因受凉加重"


def write_lines(path: Path, *rows: dict) -> Path:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    """The rows of a file of JSON lines; [] where there is none."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def turns(*texts: str, system: str = "") -> list[dict]:
    """Messages: the system text, if any, then user and assistant in turn."""
    roles = ["user", "assistant"] * len(texts)
    spoken = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    return ([{"role": "system", "content": system}] if system else []) + spoken
