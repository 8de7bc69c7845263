"""Load a sleeping model and its tokenizer from a run, a checkpoint or a Hugging Face folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sleeptrain.checkpoint.find import named_checkpoint
from sleeptrain.checkpoint.folder import CONFIG, read_state
from sleeptrain.checkpoint.read import TensorFiles
from sleeptrain.checkpoint.vocabulary import check_text_tokenizer
from sleeptrain.checkpoint.weights import assign_weights
from sleeptrain.config import load_resolved
from sleeptrain.data.tokenizer import Tokenizer, load_tokenizer
from sleeptrain.distributed.mesh import Mesh
from sleeptrain.distributed.world import World
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.hf.convert.card import sleep_settings
from sleeptrain.hf.convert.exporting import DTYPES, check_vocabulary
from sleeptrain.hf.convert.gate_file import GATE_PASSES, run_gate
from sleeptrain.hf.model.configuration import SleepPretrainedConfig
from sleeptrain.hf.model.load import usable_device
from sleeptrain.hf.model.modeling import SleepForCausalLM
from sleeptrain.remote import Location
from sleeptrain.sleep.curriculum import last_shape


def open_model(
    place: Location, tokenizer: Path | None = None, device: str = "auto", dtype: str = "auto", allow_older: bool = False
) -> tuple[SleepForCausalLM, Tokenizer]:
    """The model of a run (its newest checkpoint), a checkpoint, or a folder with `config.json`, and the tokenizer.

    N and L of a run are those of the curriculum at the checkpoint; its stop rule is that of its settings. tokenizer:
    replaces that of the run or the folder. dtype: float32, bfloat16, float16, or auto for that of the files. device:
    auto takes a GPU if there is one. allow_older: see `named_checkpoint`. Raises UserError.
    """
    if dtype not in (*DTYPES, "auto"):
        raise ConfigError(f"dtype={dtype}: allowed: auto, {', '.join(DTYPES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = usable_device(device, "device")
    if isinstance(place, Path) and (place / "config.json").is_file():
        only = {"use_safetensors": True, "local_files_only": True}
        model = SleepForCausalLM.from_pretrained(place, dtype=DTYPES.get(dtype, "auto"), **only)
        tokenizer_path = tokenizer or place
        opened = load_tokenizer(tokenizer_path)
    else:
        checkpoint = named_checkpoint(place, World(Mesh.single(), torch.device("cpu")), allow_older=allow_older)
        tokenizer_path = tokenizer or _run_tokenizer(place, checkpoint)
        opened = load_tokenizer(tokenizer_path)
        check_text_tokenizer(checkpoint, opened.hash, tokenizer_path)
        model = _model_of_checkpoint(checkpoint)
        nn.Module.to(model, DTYPES.get(dtype, torch.float32))
    check_vocabulary(opened, model.config.model_config(), tokenizer_path)
    nn.Module.to(model, where)  # mypy does not see the signature of transformers' `to`
    return model.eval(), opened


def _run_tokenizer(place: Location, checkpoint: Location) -> Path:
    data = load_resolved(checkpoint / CONFIG).data
    if data.source != "shards":
        raise DataError(f"{place} was trained on data.source={data.source}, which has no tokenizer: name one")
    return Path(data.shards.tokenizer)


def _model_of_checkpoint(checkpoint: Location) -> SleepForCausalLM:
    config, files = load_resolved(checkpoint / CONFIG), TensorFiles(checkpoint)
    shape = last_shape(config, read_state(checkpoint))
    gate = run_gate(config.sleep, config.model.dim, shape.passes)
    settings: dict[str, Any] = {"model": asdict(config.model), "sleep": sleep_settings(config.sleep, shape)}
    if gate is not None:
        settings[GATE_PASSES] = gate.most_passes
    with torch.device("meta"):
        model = SleepForCausalLM(SleepPretrainedConfig(**settings))
    model.stop_gate = gate
    assign_weights(model.model, files)
    return model


def encode_prompt(tokenizer: Tokenizer, text: str, begins: bool = True) -> list[int]:
    """The ids of a text as in training. begins: a document begins with the text: BOS comes first, if there is one."""
    first = [tokenizer.bos_id] if begins and tokenizer.bos_id is not None else []
    return first + tokenizer.encode(text)
