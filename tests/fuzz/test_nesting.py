"""JSON deeper than any stack, in every file that is read, is one line of an error, or the file is ignored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sleeptrain.checkpoint.folder import MANIFEST, STATE, find_damage, read_state
from sleeptrain.data.shard_index import parse_index
from sleeptrain.data.tasks.gsm_infinite.files import read_problems
from sleeptrain.data.tokenizer import load_tokenizer
from sleeptrain.errors import UserError
from sleeptrain.hf.convert.config_file import read_config
from sleeptrain.hf.convert.weight_files import WeightFiles
from sleeptrain.hf.model.load import read_generation_config
from sleeptrain.holder import read_holder
from sleeptrain.train.logging.metrics import read_metrics
from sleeptrain.train.status import read_status

DEEP = {"list": "[" * 100_000 + "]" * 100_000, "object": '{"a": ' * 100_000 + "1" + "}" * 100_000}
READERS: dict[str, Callable[[Path], object]] = {
    "config.json": lambda path: read_config(path.parent),
    "generation_config.json": lambda path: read_generation_config(path.parent),
    "model.safetensors.index.json": lambda path: WeightFiles(path.parent, lambda name: name),
    "tokenizer.json": load_tokenizer,
    STATE: lambda path: read_state(path.parent),
    "index.json": lambda path: parse_index(path.read_bytes(), str(path)),
    "metrics.jsonl": read_metrics,
    "problems.jsonl": read_problems,
}


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("name", READERS)
def test_deep_files_are_refused_in_a_line(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_text(DEEP[kind] + "\n")
    with pytest.raises(UserError) as refusal:
        READERS[name](tmp_path / name)
    assert name in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", DEEP.values(), ids=list(DEEP))
def test_deep_files_are_ignored(tmp_path: Path, text: str) -> None:
    for name in ("status.json", MANIFEST, "lease.json"):
        (tmp_path / name).write_text(text)
    assert read_status(tmp_path) is None
    assert find_damage(tmp_path) == f"{MANIFEST} cannot be read"
    holder = read_holder(tmp_path / "lease.json")
    assert holder is not None and holder.host == "an unknown host"
