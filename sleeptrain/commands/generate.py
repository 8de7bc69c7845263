"""`sleeptrain generate`: text from a sleeping model, printed token by token."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sleeptrain.checkpoint.older import add_older
from sleeptrain.errors import ConfigError
from sleeptrain.hf.convert.native import transformers_module
from sleeptrain.remote import named_place
from sleeptrain.terminal import ArgumentParser


def main(arguments: Sequence[str]) -> int:
    """Run `sleeptrain generate ARGUMENTS` and return the exit code. Raises UserError."""
    options = parser().parse_args(arguments)
    if options.max_new_tokens < 0 or options.temperature < 0 or not 0 < options.top_p <= 1:
        raise ConfigError("--max-new-tokens and --temperature are at least 0, --top-p is above 0 and at most 1")
    if options.save_memory:
        _check_target(options.save_memory)
    transformers_module().utils.logging.set_verbosity_error()
    transformers_module().utils.logging.disable_progress_bar()
    return _generate(options)


def parser() -> ArgumentParser:
    root = ArgumentParser(prog="sleeptrain generate", description=__doc__)
    root.add_argument(
        "place", type=named_place, metavar="RUN_OR_CHECKPOINT_OR_HF_FOLDER", help="of a run its newest checkpoint"
    )
    prompt = root.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="the same from a file")
    root.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="0 reads only (default 128)")
    root.add_argument("--passes", type=int, metavar="N", help="default: as the model was trained last")
    root.add_argument("--window", type=int, metavar="L", help="default: as the model was trained last")
    root.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0: the likeliest token (default 1)")
    root.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens only")
    root.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    root.add_argument("--memory", type=Path, metavar="FILE", help="continue from a file of --save-memory")
    root.add_argument("--save-memory", type=Path, metavar="FILE", help="write the memory after the prompt to a file")
    root.add_argument("--tokenizer", type=Path, metavar="PATH", help="default: that of the run or the folder")
    root.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    root.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default auto)")
    add_older(root)
    return root


def _generate(options: Namespace) -> int:
    import torch

    from sleeptrain.hf.load_for_inference import encode_prompt, open_model
    from sleeptrain.hf.model.cache import SleepCache
    from sleeptrain.hf.model.streaming import TextOut
    from sleeptrain.hf.model.text_options import end_ids, text_options

    opened = open_model(options.place, options.tokenizer, options.device, options.dtype, options.allow_older)
    model: Any = opened[0]
    tokenizer = opened[1]
    memory = SleepCache.load(options.memory, model) if options.memory else None
    if memory is not None and options.window not in (None, memory.window):
        raise ConfigError(f"--window {options.window}: {options.memory} was made with {memory.window}")
    window = options.window if memory is None else memory.window
    prompt = encode_prompt(tokenizer, _prompt(options), begins=memory is None)
    ids = torch.tensor([prompt], device=model.device)
    if not prompt:
        raise ConfigError("the prompt is empty, and the tokenizer has no BOS to begin with")
    settings: dict[str, Any] = {"passes": options.passes, "window": window}
    if options.save_memory:
        copy = None if memory is None else memory.copy()
        model.read(ids, cache=copy, **settings).save(options.save_memory)
    if options.max_new_tokens:
        torch.manual_seed(options.seed)
        before = prompt if memory is None else None  # the ids that a memory has read are unknown
        sampling: dict[str, Any] = {"temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            cache=memory,
            max_new_tokens=options.max_new_tokens,
            streamer=TextOut(tokenizer, sys.stdout, before, end_ids(model, tokenizer)),
            **text_options(model, tokenizer),
            **settings,
            **(sampling | {"do_sample": True} if options.temperature else {"do_sample": False}),
        )
    return 0


def _check_target(path: Path) -> None:
    """Check that `path` can be written, before the prompt is read. Raises ConfigError."""
    if path.is_dir():
        raise ConfigError(f"--save-memory {path} is a folder; name a file in it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"--save-memory {path} cannot be written: {folder} is no folder that may be written to")


def _prompt(options: Namespace) -> str:
    if options.prompt_file is None:
        return options.prompt
    try:
        return options.prompt_file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt-file {options.prompt_file} cannot be read: {error}") from error
