"""The sleep settings in `config.json` and the model card of an exported folder."""

from __future__ import annotations

import json
from typing import Any

from sleeptrain.config.from_dict import from_dict
from sleeptrain.config.schema import Config, SleepConfig
from sleeptrain.errors import DataError
from sleeptrain.sleep.curriculum import StepShape

SLEEP_KEY = "sleep"  # key of config.json; transformers' classes keep it and do not read it
_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- sleeptrain
- {model_type}
---

# {name}

A language model that sleeps, trained by sleeptrain and exported as `{model_type}`.

{loading}

## Sleep

The key `sleep` of `config.json` holds these settings.

| setting | value | meaning |
|---|---|---|
{sleep}

## Training

| | |
|---|---|
{facts}

## Conversion

{check}
"""
_NATIVE = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({folder}{dtype_argument})
```

Loaded like this it is a plain model that never sleeps (N=1), without code of its own. In training its attention looked
back no further than a window of {window} tokens."""
_PUBLISHED = """```python
from sleeptrain.hf.model.modeling import SleepForCausalLM

model = SleepForCausalLM.from_pretrained({folder}{dtype_argument})
```

Transformers has no class of this family. That of its published code reads this folder too, and never sleeps (N=1). In
training attention looked back no further than a window of {window} tokens."""
_MEANINGS = {
    "passes": "N: passes over a window that sleeps, the wake pass counted",
    "window": "L: tokens between two evictions",
    "eviction": "hard: the cache is cleared; sliding: each token attends to the last L",
    "feedback": "features: a pass reads those of the pass before; none: it reads the embeddings again",
    "core": "blocks [first, last) that sleep passes repeat; null: all",
    "conv_state": "short convolutions restart in each window, or carry on",
    "when": "every: each window sleeps; unlabelled: those without a target",
    "stop": "what ends the sleep of a row before N passes",
    "stop_threshold": "a row stops when its score is at most this",
    "min_passes": "passes before a row may stop, the wake pass counted",
}


def sleep_settings(sleep: SleepConfig, shape: StepShape) -> dict[str, Any]:
    """The sleep settings of the last training step, for `config.json`. Those of a stop rule are there if it has one."""
    settings = {
        "passes": shape.passes,
        "window": shape.window,
        "eviction": sleep.eviction,
        "feedback": sleep.feedback,
        "core": None if sleep.core is None else list(sleep.core),
        "conv_state": sleep.conv_state,
        "when": sleep.when,
    }
    return settings if sleep.stop == "fixed" else settings | _rule(sleep, shape.passes)


def _rule(sleep: SleepConfig, passes: int) -> dict[str, Any]:
    # A curriculum may still be below the least passes: then no row stops early, whatever the scores are.
    least = min(sleep.min_passes, passes)
    return {"stop": sleep.stop, "stop_threshold": sleep.stop_threshold, "min_passes": least}


def read_sleep(config_dict: dict[str, Any]) -> SleepConfig:
    """The settings that `sleep_settings` wrote into a `config.json`; the defaults if it has no key `sleep`.

    Raises UserError: the key holds something else.
    """
    written = config_dict.get(SLEEP_KEY)
    if written is None:
        return SleepConfig()
    if not isinstance(written, dict):
        raise DataError(f"config.json: {SLEEP_KEY}={written!r} are no settings of sleep")
    if unknown := sorted(set(written) - set(_MEANINGS)):
        raise DataError(f"config.json: {SLEEP_KEY} has {', '.join(unknown)}, which sleeptrain does not know")
    return from_dict(SleepConfig, written, f"config.json: {SLEEP_KEY}")


def training_facts(config: Config, state: dict[str, Any], num_parameters: int) -> dict[str, str]:
    """Rows of the model card about the training. state: the entries of the checkpoint that are no tensors."""
    data, optim = config.data, config.optim
    names = ", ".join(source.name for source in data.shards.sources) if data.source == "shards" else data.source
    return {
        "parameters": f"{num_parameters:,}",
        "steps": f"{state['step']:,}",
        "tokens": f"{state['tokens']:,}",
        "data": names or "unknown",
        "tokens of a row, rows of a step": f"{data.sequence:,}, {data.batch:,}",
        "optimizer": f"Muon ({optim.muon_lr:g}) and AdamW ({optim.adamw_lr:g}), schedule {optim.schedule}",
        "precision": config.train.precision,
        "seed": str(config.train.seed),
        **({"begun with": config.run.init_from} if config.run.init_from else {}),
    }


def model_card(
    name: str, folder: str, settings: dict[str, Any], in_transformers: bool, facts: dict[str, str], check: str
) -> str:
    """The README.md of an exported folder.

    name: title of the model. folder: name of the folder. settings: its `config.json`. in_transformers: True if
    transformers has a class of the family. facts: rows about the training. check: result of the logits' comparison.
    """
    sleep, dtype = settings[SLEEP_KEY], settings["dtype"]
    dtype_argument = "" if dtype == "float32" else f', dtype="{dtype}"'
    loading = (_NATIVE if in_transformers else _PUBLISHED).format(
        folder=json.dumps(folder, ensure_ascii=False), dtype_argument=dtype_argument, window=sleep["window"]
    )
    rows = [f"| `{key}` | {'null' if value is None else value} | {_MEANINGS[key]} |" for key, value in sleep.items()]
    return _CARD.format(
        name=name,
        model_type=settings["model_type"],
        loading=loading,
        sleep="\n".join(rows),
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        check=check,
    )
