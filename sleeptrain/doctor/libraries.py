"""Small trials of the installed packages: what a run, a conversion or an evaluation does with them.

A package of the declared version may still be damaged, or not fit another one. A check is skipped if its package is not
installed: a command that needs the package names it.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sleeptrain.doctor.driver import has_driver, wants_gpus
from sleeptrain.doctor.finding import Case, Finding, failed, ok, skipped
from sleeptrain.doctor.packages import installed

if TYPE_CHECKING:
    from sleeptrain.hf.model.modeling import SleepForCausalLM

TEXTS = ("a window that is full is slept on", "what is left of it is the state", "the next window begins with it")
VOCABULARY = 300
PROMPT = (5, 9, 2, 11, 7, 3, 8)
NEW_TOKENS = 6
WINDOW = 4  # several windows end in the prompt and in the new tokens


def check_text(case: Case) -> Finding:
    """Train a tokenizer with sentencepiece, write a shard with webdataset, and compare the texts read back."""
    from sleeptrain.data.shards import write_shards
    from sleeptrain.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(TEXTS, VOCABULARY, case.folder / "text" / "tokenizer.model")
    shards = write_shards(case.folder / "text" / "shards", TEXTS, tokenizer, "doctor")
    for number, text in enumerate(TEXTS):
        ids = shards.document(0, number).tolist()
        if tokenizer.decode(ids[1:-1]) != text:
            cure = _cure("sentencepiece", "webdataset")
            return failed(f"{text!r} comes back from a shard as {tokenizer.decode(ids[1:-1])!r}", cure)
    return ok(f"{_versions('sentencepiece', 'webdataset')}: a shard gives back its texts")


def check_formats(case: Case) -> Finding:
    """Write and read back each text format whose package is installed."""
    from sleeptrain.prepare.inputs import named_inputs
    from sleeptrain.prepare.readers import documents
    from sleeptrain.prepare.units import plan_units

    checked = []
    for package, name, write in (
        ("pyarrow", "text.parquet", _write_parquet),
        ("zstandard", "text.jsonl.zst", _write_zst),
    ):
        if importlib.util.find_spec(package) is None:
            continue
        write(case.folder / name)
        units = plan_units(named_inputs([str(case.folder / name)]), "text")
        if [*(text for unit in units for part in unit.slices for text in documents(part, "text"))] != [*TEXTS]:
            return failed(f"{package} {installed(package)}: {name} does not give back its texts", _cure(package))
        checked.append(package)
    return ok(f"{_versions(*checked)}: give back their texts") if checked else skipped(_missing("pyarrow", "zstandard"))


def check_generation(case: Case) -> Finding:
    """Compare transformers' greedy `generate` on a small sleeping model with the argmax of `forward`."""
    if importlib.util.find_spec("transformers") is None:
        return skipped(_missing("transformers"))
    import torch

    torch.set_num_threads(1)
    model = _small_model()
    ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        likeliest = model(ids).logits[0].argmax(-1)
    added, expected = ids[0, len(PROMPT) :], likeliest[len(PROMPT) - 1 : -1]
    if added.tolist() != expected.tolist():
        problem = f"generate adds {added.tolist()}, where forward gives {expected.tolist()}"
        return failed(f"transformers {installed('transformers')}: {problem}", _cure("transformers"))
    return ok(f"{_versions('transformers', 'tokenizers', 'safetensors')}: generate and forward agree token by token")


def check_harness(case: Case) -> Finding:
    """Score a text and generate up to a stop string with the lm-evaluation-harness and a small saved model."""
    if importlib.util.find_spec("lm_eval") is None:
        return skipped(_missing("lm_eval"))
    from lm_eval.api.instance import Instance

    from sleeptrain.data.tokenizer import train_tokenizer
    from sleeptrain.hf.harness import Sleeping

    folder = case.folder / "harness"
    _small_model().save_pretrained(folder)
    train_tokenizer(TEXTS, VOCABULARY, folder / "tokenizer.model")
    scorer = Sleeping(str(folder), device="cpu")
    options = {"until": ["\n"], "max_gen_toks": NEW_TOKENS}
    [text] = scorer.generate_until([Instance("generate_until", {}, (TEXTS[0], options), 0)])
    [(score, _)] = scorer.loglikelihood([Instance("loglikelihood", {}, (TEXTS[0], " it"), 0)])
    if not isinstance(text, str) or not score < 0:
        return failed(f"lm-eval {installed('lm-eval')}: {text!r} and a score of {score}", _cure("lm-eval"))
    return ok(f"{_versions('lm-eval')}: scores and generates")


def check_fla(case: Case) -> Finding:
    """Import flash-linear-attention and Triton on a machine without GPUs, such as a login node."""
    if importlib.util.find_spec("fla") is None:
        return skipped(_missing("flash-linear-attention"))
    if has_driver() or not wants_gpus(case):
        return skipped("train.device=cpu" if not wants_gpus(case) else "covered by the check `kernel`")
    from sleeptrain.ops.fla_package import load_kernels

    load_kernels()
    return ok(f"{_versions('flash-linear-attention', 'triton')}: can be loaded")


def check_wandb(case: Case) -> Finding:
    """Log one record in an offline run and check that its file is not empty."""
    if case.config is not None and case.config.wandb.mode == "disabled":
        return skipped("wandb.mode=disabled")
    from sleeptrain.config.schema import WandbConfig
    from sleeptrain.train.logging.wandb_log import WandbLogger

    messages = _Messages()
    logging.getLogger("sleeptrain.train.logging.wandb_log").addHandler(messages)
    os.environ.pop("WANDB_MODE", None)
    logger = WandbLogger(WandbConfig(mode="offline"), case.folder, "doctor", {}, None)
    logger.log({"step": 1, "loss": 1.0}, 1)
    logger.finish()
    if messages.texts:
        return failed(
            f"wandb {installed('wandb')}: {messages.texts[0]}", f"{_cure('wandb')}, or set wandb.mode=disabled"
        )
    if not any(path.stat().st_size for path in case.folder.glob("wandb/offline-run-*/*.wandb")):
        return failed(f"wandb {installed('wandb')} has written no run", f"{_cure('wandb')}, or set wandb.mode=disabled")
    return ok(f"{_versions('wandb')}: an offline run")


def _small_model() -> SleepForCausalLM:
    from sleeptrain.config.schema import AttentionConfig, GatedDeltaNetConfig, ModelConfig
    from sleeptrain.hf.model.configuration import SleepPretrainedConfig
    from sleeptrain.hf.model.modeling import SleepForCausalLM

    settings = ModelConfig(
        vocab_size=VOCABULARY,
        dim=16,
        ffn_dim=24,
        layers=["attention", "gated_deltanet"],
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
        gated_deltanet=GatedDeltaNetConfig(num_k_heads=1, num_v_heads=2, head_k_dim=8, head_v_dim=8),
        init_std=0.5,  # makes one token clearly the likeliest
    )
    return SleepForCausalLM(SleepPretrainedConfig(model=asdict(settings), sleep={"passes": 2, "window": WINDOW})).eval()


def _write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": [*TEXTS]}), path)


def _write_zst(path: Path) -> None:
    import zstandard

    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    path.write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))


class _Messages(logging.Handler):
    """Keeps log messages: a run continues without wandb and only logs the failure."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _versions(*names: str) -> str:
    return ", ".join(f"{name} {version}" for name in names if (version := installed(name)) is not None)


def _missing(*names: str) -> str:
    return f"not installed: {', '.join(names)}"


def _cure(*names: str) -> str:
    return f"install {' and '.join(names)} in a version that sleeptrain declares, or all of it again (make install)"
