"""Export a checkpoint to a folder that transformers loads without code of sleeptrain."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from sleeptrain.checkpoint.find import named_checkpoint
from sleeptrain.checkpoint.fit import WEIGHTS, check_start
from sleeptrain.checkpoint.folder import CONFIG, read_state
from sleeptrain.checkpoint.read import TensorFiles
from sleeptrain.checkpoint.vocabulary import tokenizer_of
from sleeptrain.config import load_resolved
from sleeptrain.config.schema import ModelConfig, SleepConfig
from sleeptrain.config.validate import check_gate_file, validate_model
from sleeptrain.data.tokenizer import Tokenizer
from sleeptrain.distributed.mesh import Mesh
from sleeptrain.distributed.world import World
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.files import staged_folder
from sleeptrain.hf.convert.card import SLEEP_KEY, model_card, sleep_settings, training_facts
from sleeptrain.hf.convert.check import PASSES, WINDOWS, check
from sleeptrain.hf.convert.gate_file import GATE_PASSES, run_gate, write_gate
from sleeptrain.hf.convert.tokenizer_export import find_tokenizers, write_tokenizer
from sleeptrain.hf.convert.weight_files import SHARD_BYTES, write_weights
from sleeptrain.hf.families import FAMILIES, Family, Read, expressing, family_of, stays_wide
from sleeptrain.remote import Location
from sleeptrain.sleep.curriculum import StepShape, last_shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    model_type: the family.
    num_parameters: number of weights, tied ones counted once.
    error: result of `check`.
    tokenizer: True if the folder has a tokenizer.
    texts: number of the run's documents on which the tokenizers were compared; None without a tokenizer.
    """

    model_type: str
    num_parameters: int
    error: float
    tokenizer: bool
    texts: int | None


def export(
    place: Location,
    out: Path,
    model_type: str | None = None,
    dtype: str = "float32",
    tokenizer: Path | None = None,
    with_tokenizer: bool = True,
    check_tokens: int = 256,
    allow_older: bool = False,
    stop: Mapping[str, Any] | None = None,
) -> Exported:
    """Write the checkpoint `place`, or the newest one of the run `place`, to the new folder `out`.

    model_type: the family; None takes the first one that can express the model. dtype: that of the weights; decay
    parameters stay fp32. tokenizer: replaces that of the run's data. allow_older: see `named_checkpoint`. stop:
    replaces settings of `sleep`, by name: the stop rule. Raises UserError and leaves nothing in `out`: the family
    cannot express the model, the ids of the tokenizer differ from those of training, the tokenizer cannot be converted,
    the settings of the stop rule do not go together, the gate of `sleep.stop=gate` cannot be read or is another
    model's, or the check of the logits fails.
    """
    checkpoint = named_checkpoint(place, World(Mesh.single(), torch.device("cpu")), allow_older=allow_older)
    config, files = load_resolved(checkpoint / CONFIG), TensorFiles(checkpoint)
    check_start(files.forms, config.model)
    state = read_state(checkpoint)
    shape = last_shape(config, state)
    sleep = _with_stop_rule(config.model, config.sleep, shape, stop or {})
    gate = run_gate(sleep, config.model.dim, shape.passes)
    family = choose_family(config.model, model_type)
    tokenizers = find_tokenizers(config, tokenizer, tokenizer_of(checkpoint)) if with_tokenizer else None
    if tokenizers is not None:
        check_vocabulary(tokenizers.exported, config.model, tokenizers.place)

    def read(name: str) -> torch.Tensor:
        return files.tensor(WEIGHTS + name)

    with staged_folder(out) as folder:
        write_family_weights(folder, family, config.model, read, DTYPES[dtype])
        ids = {} if tokenizers is None else tokenizers.ids
        settings = family.to_config(config.model) | ids | {"dtype": dtype}
        settings[SLEEP_KEY] = sleep_settings(sleep, shape)
        if gate is not None:
            write_gate(folder, gate)
            settings[GATE_PASSES] = gate.most_passes
        _write_json(folder / "config.json", settings)
        _write_json(folder / "generation_config.json", ids | {"use_cache": settings["use_cache"]})
        texts = None if tokenizers is None else write_tokenizer(folder, tokenizers, config)
        rounded = _rounded(family, config.model, read, DTYPES[dtype])
        error = check(config.model, rounded, folder, family, check_tokens)
        whose = "its logits" if family.in_transformers else "those of the family's published code, written again,"
        result = f"Over {WINDOWS} windows of {PASSES} passes {whose} differ from ours by {error:.0e} of the largest."
        num_parameters = sum(prod(shape) for shape in family.their_shapes(config.model).values())
        facts = training_facts(config, state, num_parameters)
        card = model_card(config.run.name, out.name, settings, family.in_transformers, facts, result)
        (folder / "README.md").write_text(card)
    return Exported(family.model_type, num_parameters, error, tokenizers is not None, texts)


def _with_stop_rule(model: ModelConfig, sleep: SleepConfig, shape: StepShape, stop: Mapping[str, Any]) -> SleepConfig:
    """The settings of a run with another stop rule. Raises ConfigError if they do not go with N and L of `shape`."""
    if not stop:
        return sleep
    sleep = replace(sleep, curriculum=[], passes=shape.passes, window=shape.window, **stop)
    validate_model(model, sleep)
    check_gate_file(sleep)
    return sleep


def choose_family(config: ModelConfig, model_type: str | None) -> Family:
    """The family for an export. model_type: None takes the first one that can express the model.

    Raises ConfigError, with the settings that each family lacks, and the families that have them.
    """
    able = expressing(config)
    if model_type is None and able:
        return able[0]
    if model_type is None:
        lacking = {f.model_type: f.lacks(config) for f in FAMILIES.values()}
        details = [
            f"{name}: {setting} ({needs})" for name, lacks in lacking.items() for setting, needs in lacks.items()
        ]
        raise ConfigError("no family of transformers' models can express this model", details)
    family = family_of(model_type)
    if lacks := family.lacks(config):
        others = " or ".join(f"--to {other.model_type}" for other in able)
        details = [f"{setting}: {needs}; {_who_can(config, setting)}" for setting, needs in lacks.items()]
        way_out = f"use {others}" if able else "no other family can express the whole model"
        raise ConfigError(f"{model_type} cannot express {', '.join(lacks)}; {way_out}", details)
    return family


def _who_can(config: ModelConfig, setting: str) -> str:
    able = [family.model_type for family in FAMILIES.values() if setting not in family.lacks(config)]
    return f"{' and '.join(able)} can" if able else "no family can"


def write_family_weights(
    folder: Path, family: Family, config: ModelConfig, read: Read, dtype: torch.dtype, limit: int = SHARD_BYTES
) -> None:
    """Write the weights of the family's model, one mapping of tensors at a time. limit: bytes of a file."""
    shapes = family.their_shapes(config)
    sizes = {name: prod(shape) * _narrowed(name, dtype).itemsize for name, shape in shapes.items()}
    converted = ((name, tensor.to(_narrowed(name, dtype))) for name, tensor in family.to_theirs(config, read))
    write_weights(folder, sizes, converted, limit)


def _narrowed(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if stays_wide(name) else dtype


def _rounded(family: Family, config: ModelConfig, read: Read, dtype: torch.dtype) -> Read:
    """`read` with parameters rounded to `dtype`, as in the export: the check compares mappings, not rounding."""
    if dtype == torch.float32:
        return read
    decays = {ours for m in family.mappings(config) if any(map(stays_wide, m.theirs)) for ours in m.ours}
    return lambda name: read(name) if name in decays else read(name).to(dtype)


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, path: Path) -> None:
    """Raises DataError: the tokenizer has more ids than the model."""
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(
            f"tokenizer {path} has {tokenizer.vocab_size} ids, the model {config.vocab_size}: it is another model's"
        )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
