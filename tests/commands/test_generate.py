"""`sleeptrain generate` from the three kinds of places, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from sleeptrain.cli import main
from sleeptrain.data.shards import write_shards
from sleeptrain.data.tokenizer import load_tokenizer, train_tokenizer
from sleeptrain.errors import DataError
from sleeptrain.hf.convert.exporting import export
from sleeptrain.hf.load_for_inference import encode_prompt, open_model
from sleeptrain.hf.model.configuration import SleepPretrainedConfig
from sleeptrain.hf.model.modeling import SleepForCausalLM
from tests.data.texts import default_sentencepiece, make_texts
from tests.models import tiny_config

PROMPT = "the first of them"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run whose curriculum ends at N=3, its checkpoint, its native export, and the model saved by transformers."""
    folder = tmp_path_factory.mktemp("places")
    documents = make_texts(40)
    tokenizer = train_tokenizer(documents, 320, folder / "tokenizer.model")
    for side, part in (("train", documents[:30]), ("validation", documents[30:])):
        write_shards(folder / side, part, tokenizer, name=side)
    code = main(
        [
            "train", "experiment=stdlib", "model=tiny", "data=stdlib", "sleep=every", "run.name=run",
            f"run.root={folder}", "model.layers=[attention, gated_deltanet]",
            f"data.shards.sources=[{{train: {folder / 'train'}, validation: {folder / 'validation'}}}]",
            f"data.shards.tokenizer={folder / 'tokenizer.model'}", "data.sequence=40", "data.batch=2",
            "sleep.window=16", "sleep.passes=1", "sleep.curriculum=[{tokens: 80, passes: 3, window: 8}]",
            "train.tokens=160", "train.eval_every=0", "train.eval_batches=1", "wandb.mode=disabled",
        ]
    )  # fmt: skip
    assert code == 0
    export(folder / "run", folder / "native")
    model, _ = open_model(folder / "run", device="cpu")
    model.save_pretrained(folder / "saved")
    (folder / "saved" / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    return {
        "run": folder / "run",
        "checkpoint": folder / "run" / "checkpoints" / "step-00000002",
        "native": folder / "native",
        "saved": folder / "saved",
    }


def generated(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["generate", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_every_place_holds_the_same_sleeping_model(places, capsys):
    ids = torch.randint(320, (1, 30))
    logits = []
    for place in places.values():
        model, _ = open_model(place, device="cpu")
        assert (model.config.sleep["passes"], model.config.sleep["window"]) == (3, 8)
        with torch.no_grad():
            logits.append(model(ids).logits)
    for found in logits[1:]:
        torch.testing.assert_close(found, logits[0], rtol=0, atol=0)
    options = ("--prompt", PROMPT, "--max-new-tokens", 12, "--temperature", 0)
    texts = {generated(capsys, place, *options) for name, place in places.items() if name != "native"}
    assert len(texts) == 1


def test_the_command_prints_what_generate_adds(places, capsys):
    out = generated(capsys, places["saved"], "--prompt", PROMPT, "--max-new-tokens", 12, "--seed", 3)
    model, tokenizer = open_model(places["saved"], device="cpu")
    ids = torch.tensor([encode_prompt(tokenizer, PROMPT)])
    assert ids[0, 0] == tokenizer.bos_id
    torch.manual_seed(3)
    found = model.generate(
        ids, max_new_tokens=12, do_sample=True, top_k=0, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.eos_id
    )
    assert out == tokenizer.decode(found[0, ids.shape[1] :].tolist()) + "\n"
    assert out != generated(capsys, places["saved"], "--prompt", PROMPT, "--max-new-tokens", 12, "--seed", 4)


def test_a_saved_memory_continues_a_text(places, capsys, tmp_path):
    text, memory = tmp_path / "text.txt", tmp_path / "memory.safetensors"
    text.write_text(PROMPT * 3)
    place, more = places["saved"], (" and then", "--max-new-tokens", 9, "--temperature", 0)
    assert generated(capsys, place, "--prompt-file", text, "--max-new-tokens", 0, "--save-memory", memory) == ""
    found = generated(capsys, place, "--memory", memory, "--prompt", *more)
    model, tokenizer = open_model(place, device="cpu")
    ids = encode_prompt(tokenizer, PROMPT * 3) + tokenizer.encode(" and then")
    ids_out = model.generate(
        torch.tensor([ids]), max_new_tokens=9, do_sample=False, eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.eos_id,
    )  # fmt: skip
    assert found == tokenizer.decode(ids_out[0, len(ids) :].tolist()) + "\n"


@pytest.fixture(scope="module")
def space_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with more ids than its tokenizer, which puts a space before every text: SentencePiece's defaults."""
    folder = tmp_path_factory.mktemp("prefixing")
    tokenizer = default_sentencepiece(folder / "tokenizer.model")
    model = asdict(tiny_config(["gated_deltanet"])) | {"vocab_size": tokenizer.vocab_size + 40, "init_std": 0.5}
    SleepForCausalLM(SleepPretrainedConfig(model=model, sleep={"passes": 2, "window": 4})).save_pretrained(folder)
    return folder


def write_generation_config(folder: Path, only: list[int] | None = None, **settings: object) -> None:
    """only: the ids that may be drawn; all others are suppressed."""
    vocab_size = load_tokenizer(folder).vocab_size
    suppressed = None if only is None else [id for id in range(vocab_size) if id not in only]
    (folder / "generation_config.json").write_text(json.dumps({"suppress_tokens": suppressed} | settings))


@pytest.mark.parametrize("memory", [False, True])
def test_the_output_continues_the_prompt(space_model, capsys, tmp_path, memory):
    tokenizer = load_tokenizer(space_model)
    (id,) = tokenizer.encode("cat")
    assert tokenizer.decode([id]) == "cat", "decoded alone the space is gone"
    write_generation_config(space_model, only=[id])
    before = ()
    if memory:
        generated(capsys, space_model, "--prompt", "see", "--max-new-tokens", 0, "--save-memory", tmp_path / "memory")
        before = ("--memory", tmp_path / "memory")
    out = generated(capsys, space_model, "--prompt", "the cat", "--max-new-tokens", 2, *before)
    assert out == " cat cat\n"
    if not memory:
        assert generated(capsys, space_model, "--prompt", "", "--max-new-tokens", 2) == "cat cat\n", "a text begins"


def test_ids_that_no_text_has_are_never_drawn(space_model, capsys):
    write_generation_config(space_model)
    for seed in range(3):
        generated(capsys, space_model, "--prompt", "a", "--max-new-tokens", 60, "--seed", seed, "--temperature", 9)
    model, tokenizer = open_model(space_model, device="cpu")
    torch.manual_seed(0)
    drawn = model.generate(torch.tensor([[1, 5]]), max_new_tokens=60, do_sample=True, top_k=0, temperature=9.0)
    assert (drawn >= tokenizer.vocab_size).any(), "the model itself does draw them"


def test_every_eos_of_the_folder_ends_a_text(space_model, capsys):
    tokenizer = load_tokenizer(space_model)
    (cat,), (dog,) = tokenizer.encode("cat"), tokenizer.encode("dog")
    write_generation_config(space_model, only=[cat], eos_token_id=[tokenizer.eos_id, dog])
    options = ("--prompt", "the", "--max-new-tokens", 2)
    assert generated(capsys, space_model, *options) == " cat cat\n"
    write_generation_config(space_model, only=[dog], eos_token_id=[tokenizer.eos_id, dog])
    assert generated(capsys, space_model, *options) == "\n", "it ends there, and is no part of the text"
    write_generation_config(space_model, only=[dog], eos_token_id=dog)
    assert generated(capsys, space_model, *options) == "\n"
    write_generation_config(space_model, only=[tokenizer.eos_id], eos_token_id=[dog])
    assert generated(capsys, space_model, *options) == "\n", "the tokenizer's own too"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--max-new-tokens", "-1"], "are at least 0"),
        (["--prompt", "a", "--passes", "0"], "sleep.passes must be at least 1"),
        (["--prompt-file", "nowhere.txt"], "--prompt-file nowhere.txt cannot be read"),
        (["--prompt", "a", "--memory", "nowhere"], "memory nowhere cannot be read"),
        (["--prompt", "a", "--dtype", "int8"], "dtype=int8: allowed: auto, float32"),
        (["--prompt", "a", "--device", "gpu"], "device=gpu is no device that torch knows; use cpu or cuda"),
        (["--prompt", "a", "--device", "cuda:99"], "device=cuda:99: torch sees "),
        (["--prompt", "a", "--save-memory", "."], "--save-memory . is a folder; name a file in it"),
        (["--prompt", "a", "--save-memory", f"{__file__}/memory"], "is no folder that may be written to"),
    ],
)
def test_mistakes_are_one_line(places, capsys, arguments, message, monkeypatch):
    def read(*_: object, **__: object) -> None:
        raise AssertionError("a mistake that can be seen before is told before anything is read")

    monkeypatch.setattr(SleepForCausalLM, "read", read)
    assert main(["generate", str(places["saved"]), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run", "checkpoint"])
def test_another_tokenizer_of_as_many_ids_is_refused(places, capsys, tmp_path, name):
    other = tmp_path / "tokenizer.model"
    assert train_tokenizer(make_texts(60)[20:], 320, other).vocab_size == 320
    assert main(["generate", str(places[name]), "--prompt", "a", "--tokenizer", str(other)]) == 2
    message = capsys.readouterr().err
    assert f"tokenizer {other} (sha256 " in message and "is not the one that the weights of" in message


def test_a_tokenizer_that_has_replaced_that_of_training_is_refused(places, tmp_path):
    own = places["run"].parent / "tokenizer.model"
    before = own.read_bytes()
    try:
        train_tokenizer(make_texts(60)[20:], 320, own)
        with pytest.raises(DataError, match="is not the one that the weights of"):
            open_model(places["run"], device="cpu")
    finally:
        own.write_bytes(before)
    open_model(places["run"], own, device="cpu")


def test_a_place_without_a_model_is_refused(capsys, tmp_path):
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "is neither a checkpoint nor the folder of a run" in capsys.readouterr().err
