"""Files of weights are read only if they are plain and whole. They are written in parts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sleeptrain.errors import DataError
from sleeptrain.hf.convert.exporting import write_family_weights
from sleeptrain.hf.convert.weight_files import WeightFiles
from sleeptrain.hf.families import family_of
from sleeptrain.hf.model.modeling import SleepForCausalLM
from tests.hf.convert.folders import change_weights, refused
from tests.hf.models import MODELS, disturbed


def test_a_truncated_file_is_refused(folder: Path):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "model.safetensors is missing, truncated or damaged" in str(refused(folder))


def test_an_index_with_missing_files_is_refused(folder: Path):
    names = load_file(folder / "model.safetensors").keys()
    places = dict.fromkeys(names, "model.safetensors") | {"model.norm.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert "model-00002-of-00002.safetensors is missing" in str(refused(folder))
    places["model.norm.weight"] = "model.safetensors"
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": places | {"x": "model.safetensors"}})
    )
    assert "lacks x, which model.safetensors.index.json says is there" in str(refused(folder))


@pytest.mark.parametrize("name", ["../model.safetensors", "/dev/zero", "sub/../../model.safetensors", "pipe", "link"])
def test_weights_outside_of_the_folder_are_refused(folder: Path, name: str, tmp_path_factory: pytest.TempPathFactory):
    """Names in the index, links and pipes: every reader opens only plain files of the folder."""
    away = tmp_path_factory.mktemp("away") / "model.safetensors"
    away.write_bytes((folder / "model.safetensors").read_bytes())
    places = dict.fromkeys(load_file(folder / "model.safetensors"), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    if name == "pipe":
        os.mkfifo(folder / name)
    if name == "link":
        (folder / name).symlink_to(away)
    expected = {"pipe": "is no plain file", "link": "is a link to"}.get(name, "lies outside of")
    assert expected in str(refused(folder))
    with pytest.raises(DataError, match=expected):
        SleepForCausalLM.from_pretrained(folder)


def test_an_index_or_single_file_that_is_no_plain_file_is_refused(folder: Path):
    (folder / "model.safetensors.index.json").symlink_to("/dev/zero")
    assert "model.safetensors.index.json is no plain file" in str(refused(folder))
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    assert "model.safetensors is no plain file" in str(refused(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused_unread(folder: Path, name: str):
    (folder / "model.safetensors").rename(folder / name)
    assert f"weights in {name} only, a pickle, which can run any code" in str(refused(folder))
    (folder / name).unlink()
    assert "holds neither model.safetensors nor" in str(refused(folder))


def test_integers_are_refused(folder: Path):
    change_weights(folder, lambda w: w.update({"model.norm.weight": torch.zeros(16, dtype=torch.int8)}))
    assert "model.norm.weight is I8; only floating point can be imported" in str(refused(folder))


@pytest.mark.parametrize("index", [{"weight_map": {"x": None}}, {"weight_map": [1]}, {"weight_map": None}, [1], {}])
def test_a_malformed_index_is_refused(folder: Path, index: object):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json" in str(refused(folder))


def test_shards_with_an_index(tmp_path: Path):
    model_type, config = MODELS["qwen3_5_text-untied"]
    family, ours = family_of(model_type), disturbed(config)
    weights = {name: p.detach() for name, p in ours.named_parameters()}
    write_family_weights(tmp_path, family, config, weights.__getitem__, torch.float32, limit=4000)
    (tmp_path / "config.json").write_text(json.dumps(family.to_config(config)))
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    assert len(shards) > 4
    index = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in weights.values())
    for path in shards:
        with safe_open(path, "pt") as file:
            assert all(index["weight_map"][name] == path.name for name in file.keys())  # noqa: SIM118
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    expected = dict(family.to_theirs(config, weights.__getitem__))
    assert all(torch.equal(theirs[name], expected[name]) for name in expected)
    files = WeightFiles(tmp_path, family.canonical)
    assert all(torch.equal(files.read(name), expected[name]) for name in expected)
