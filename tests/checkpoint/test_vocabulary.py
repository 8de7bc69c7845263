"""Weights do not read ids of another tokenizer: neither in a new run, nor in one that goes on, nor in an evaluation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from sleeptrain.checkpoint.folder import checkpoints, entries, write_manifest
from sleeptrain.checkpoint.vocabulary import TOKENIZER, check_start_tokenizer, tokenizer_of
from sleeptrain.cli import main
from sleeptrain.config import save_resolved
from sleeptrain.config.compose import compose
from sleeptrain.data.shards import write_shards
from sleeptrain.data.tokenizer import load_tokenizer, train_tokenizer
from sleeptrain.doctor import storage
from sleeptrain.doctor.finding import OK, Case
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.train.trainer import train
from tests.data.texts import make_texts


def prepared(folder: Path, seed: int) -> Path:
    """Shards for training and validation, and the tokenizer of 320 ids that made them."""
    folder.mkdir()
    texts = make_texts(40, seed)
    tokenizer = train_tokenizer(texts, 320, folder / "tokenizer.model")
    for side in ("train", "validation"):
        write_shards(folder / side, texts, tokenizer, name=side)
    return folder


def settings(data: Path, root: Path, name: str, *more: str) -> list[str]:
    """A run of one step."""
    return [
        "experiment=stdlib", f"data.shards.sources=[{{train: {data}/train, validation: {data}/validation}}]",
        f"data.shards.tokenizer={data}/tokenizer.model", "data.sequence=40", "data.batch=2", "sleep.window=16",
        "model.dim=16", "model.ffn_dim=16", "train.tokens=80", "train.eval_every=0", "train.device=cpu",
        "wandb.mode=disabled", f"run.root={root}", f"run.name={name}", *more,
    ]  # fmt: skip


def refused(overrides: Sequence[str], error: type[Exception], match: str) -> Exception:
    with pytest.raises(error, match=match) as raised:
        train(compose(overrides))
    return raised.value


def test_weights_and_data_of_different_tokenizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, other = prepared(tmp_path / "own", 0), prepared(tmp_path / "other", 1)
    assert train(compose(settings(own, tmp_path, "begun"))) == 0
    checkpoint = checkpoints(tmp_path / "begun/checkpoints")[-1]
    assert tokenizer_of(checkpoint) == load_tokenizer(own / "tokenizer.model").hash

    init = f"run.init_from={tmp_path / 'begun'}"
    new = settings(other, tmp_path, "new", init)
    refusal = refused(new, ConfigError, r"another tokenizer .*'run\.allow_changes=\[data\.shards\.tokenizer\]'")
    assert isinstance(refusal, ConfigError) and refusal.details[0].startswith("data.shards.tokenizer: sha256 ")
    assert not checkpoints(tmp_path / "new/checkpoints")
    case = Case(compose(new), 1, tmp_path)
    with pytest.raises(ConfigError, match="another tokenizer"):
        storage.check_data(case)
    assert storage.check_data(Case(compose(settings(own, tmp_path, "same", init)), 1, tmp_path)).state == OK
    allowed = [*new, "run.allow_changes=[data.shards.tokenizer]"]
    assert storage.check_data(Case(compose(allowed), 1, tmp_path)).state == OK
    assert train(compose(allowed)) == 0
    assert storage.check_data(case).state == OK, "a run that is there goes on with its own weights"

    # A run that goes on, and an evaluation: the same places hold other data now.
    refused([*settings(other, tmp_path, "begun")], DataError, "the saved position in the data has")
    shutil.rmtree(own)
    shutil.copytree(other, own)
    refused(settings(own, tmp_path, "begun"), DataError, "the saved position in the data has")
    assert main(["evaluate", str(tmp_path / "begun"), "--device", "cpu"]) == 2
    assert "was made anew with another tokenizer" in capsys.readouterr().err


def checkpoint_of(folder: Path, state: dict[str, object], overrides: Sequence[str] = ("experiment=rule110",)) -> Path:
    """A checkpoint without tensors."""
    folder.mkdir()
    save_resolved(compose(overrides), folder / "config.yaml")
    (folder / "state.json").write_text(json.dumps({"step": 0, "tokens": 0, "shape": None} | state))
    write_manifest(folder, entries(sorted(folder.iterdir())))
    return folder


def test_checkpoints_of_earlier_versions(tmp_path: Path) -> None:
    """They hold the tokenizer's hash in the task's position, or name the tokenizer in their configuration."""
    tokenizer = train_tokenizer(make_texts(20), 320, tmp_path / "t.model")
    named = ["experiment=stdlib", f"data.shards.tokenizer={tmp_path / 't.model'}"]
    assert tokenizer_of(checkpoint_of(tmp_path / "a", {}, named)) == tokenizer.hash
    assert tokenizer_of(checkpoint_of(tmp_path / "b", {TOKENIZER: "0f"}, named)) == "0f"
    assert tokenizer_of(checkpoint_of(tmp_path / "c", {"data": {"the tokenizer's sha256": "ab"}})) == "ab"
    assert tokenizer_of(checkpoint_of(tmp_path / "d", {})) is None
    missing = ["experiment=stdlib", "data.shards.tokenizer=gone.model"]
    assert tokenizer_of(checkpoint_of(tmp_path / "e", {}, missing)) is None


def test_tokenizers_are_compared_only_where_both_are_known_and_data_is_text(tmp_path: Path) -> None:
    text, task = checkpoint_of(tmp_path / "a", {TOKENIZER: "0f"}), checkpoint_of(tmp_path / "b", {TOKENIZER: None})
    check_start_tokenizer(text, "0f", "shards", [])
    check_start_tokenizer(text, None, "rule110", [])
    check_start_tokenizer(task, "0f", "shards", [])
    with pytest.raises(ConfigError, match="another tokenizer") as refused:
        check_start_tokenizer(text, "ab", "gsm_infinite", [])
    assert "allow_changes" not in str(refused.value), "that setting never changes: no way that leads nowhere is shown"
