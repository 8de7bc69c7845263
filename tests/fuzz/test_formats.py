"""Every format of file that is read, damaged at random, is refused in a line, reported, or read as before.

There is never a traceback or a hang, nor another value of a file with a checksum. Each case is a function of its seed,
which a failure names.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard

from sleeptrain.checkpoint.folder import CONFIG, STATE, checkpoints, entries, find_damage, read_state, write_manifest
from sleeptrain.checkpoint.read import TensorFiles
from sleeptrain.checkpoint.state_schema import OF_A_RUN
from sleeptrain.config import load_resolved
from sleeptrain.config.compose import compose
from sleeptrain.data.shards import TokenShards, write_shards
from sleeptrain.data.source import build_source
from sleeptrain.data.tokenizer import load_tokenizer, train_tokenizer
from sleeptrain.errors import UserError, format_error
from sleeptrain.health.rollbacks import Rollbacks
from sleeptrain.health.spikes import SpikeDetector
from sleeptrain.hf.convert.fast_tokenizer import fast_files
from sleeptrain.hf.convert.read_config import describe
from sleeptrain.hf.families import FAMILIES
from sleeptrain.hf.model.cache import SleepCache
from sleeptrain.hf.model.modeling import SleepForCausalLM
from sleeptrain.plan import mean_row
from sleeptrain.prepare.inputs import named_inputs
from sleeptrain.prepare.readers import Bad, documents
from sleeptrain.prepare.units import plan_units
from sleeptrain.report.runs import find_runs
from sleeptrain.sleep.curriculum import last_shape
from sleeptrain.train import trainer
from sleeptrain.train.logging.metrics import MetricsFile
from tests.data.test_hf_tokenizer import BOS, EOS
from tests.data.test_hf_tokenizer import make as make_tokenizer
from tests.data.texts import make_texts
from tests.fuzz.mutations import BYTES, JSON, LINES, YAML, Mutation
from tests.hf.models import disturbed, native
from tests.hf.sleeping import padded, sleeping
from tests.models import tiny_config

pytestmark = pytest.mark.slow
SEED = 20_260
CASES = 12
# The limit of a case, which usually takes a hundredth of a second.
SECONDS = 120
# A file without a checksum may hold other values, which are then read.
KINDS = REFUSED, REPORTED, SAME, OTHER = "refused in one line", "told and passed over", "the same", "other values"
TABLE: dict[str, Counter[str]] = {}


class Hangs(BaseException):
    """A case has taken too long."""


def fuzz(
    folder: Path,
    file: str,
    mutations: Sequence[Mutation],
    read: Callable[[Path], Any],
    tmp_path: Path,
    guarded: bool = False,
    seal: Callable[[Path], object] = lambda _: None,
) -> None:
    """Damages `file` of a copy of `folder` in CASES ways and reads the copy. It reads an intact copy, too.

    read: returns the file's values, or None if it reports the damage. guarded: no other value is allowed. seal: makes
    the rest of the folder agree with the damage.
    """
    place, content, found = tmp_path / "case", (folder / file).read_bytes(), Counter[str]()

    def outcome(case: str, damage: Callable[[bytes], bytes]) -> tuple[str, Any]:
        shutil.copytree(folder, place)
        (place / file).write_bytes(damage(content))
        seal(place)
        try:
            with time_limit(case):
                value = read(place)
        except UserError as error:
            assert len(format_error(error).splitlines()) == 1, f"{case}: {error}"
            return REFUSED, None
        except Exception as error:
            pytest.fail(f"{case}: {type(error).__name__}: {error}", pytrace=True)
        finally:
            shutil.rmtree(place)
        return REPORTED if value is None else OTHER, value

    kind, intact = outcome(f"{file}, not damaged", lambda same: same)
    assert kind == OTHER, f"{file} is not damaged, and {kind}"
    for number in range(CASES):
        chance = random.Random(f"{SEED} {file} {number}")
        mutation = chance.choice(mutations)
        case = f"{file}, seed {SEED}, case {number}: {mutation.__name__}"
        kind, value = outcome(case, partial(mutation, chance))
        if kind == OTHER and equal(value, intact):
            kind = SAME
        assert not (guarded and kind == OTHER), f"{case} changes what is read, and nothing tells of it"
        found[kind] += 1
    TABLE[f"{folder.name}/{file}{', by its checksum' if guarded else ''}"] = found
    assert found[REFUSED] + found[REPORTED], "no case damages the file"


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Prints the number of cases of each file and outcome, under `pytest -s`."""
    yield
    print("", f"| seed {SEED} | {' | '.join(KINDS)} |", f"|---|{'---:|' * len(KINDS)}", sep="\n")
    for name, found in TABLE.items():
        print(f"| {name} | {' | '.join(str(found[kind]) for kind in KINDS)} |")


@contextmanager
def time_limit(case: str) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hangs(case)

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    return bool(a == b)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    small = "run.name=r data.rule110.width=6 data.rule110.steps=2 data.rule110.validation_samples=16 data.batch=8"
    rest = "model.dim=16 model.ffn_dim=16 sleep.passes=2 train.tokens=224 train.eval_every=2 checkpoint.every=2"
    overrides = [*small.split(), *rest.split(), "run.root=runs", "wandb.mode=disabled", "train.log_every=1"]
    with chdir(root):  # no file holds the path
        assert trainer.train(compose(["experiment=rule110", *overrides])) == 0
    folder = root / "runs" / "r"
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    records = [unmeasured(json.loads(line)) | {"time": float(at)} for at, line in enumerate(lines)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "status.json").write_text(json.dumps(unmeasured(json.loads((folder / "status.json").read_bytes()))))
    return folder


def unmeasured(value: Any, name: str = "") -> Any:
    """`value` with fixed values where runs differ: a case is a function of seed and content."""
    if isinstance(value, dict):
        return {key: unmeasured(inner, key) for key, inner in value.items()}
    if name in ("step", "tokens", "passes", "window", "batch", "number", "state"):
        return value
    fixed: dict[type, Any] = {int: 1, float: 1.5, str: "x"}
    return fixed.get(type(value), value)


def of_run(folder: Path) -> Any:
    """The fields of a run that a report and the next attempt read."""
    [found], unreadable = find_runs([folder])
    MetricsFile(folder / "metrics.jsonl").truncate_after(10**9, 10**9)
    fields = [found.state, found.notes, found.code, found.flops]
    return None if unreadable or found.status is None else [*fields, found.records, found.status]


@pytest.mark.parametrize(("file", "mutations"), [("metrics.jsonl", LINES), ("status.json", JSON), (CONFIG, YAML)])
def test_runs(
    run: Path, file: str, mutations: Sequence[Mutation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mean_row, "SAMPLED_TOKENS", 2**10)
    fuzz(run, file, mutations, of_run, tmp_path)


def of_checkpoint(folder: Path) -> Any:
    if find_damage(folder) is not None:
        return None
    files, tensors = TensorFiles(folder), dict[str, torch.Tensor]()
    for name in files.forms:
        tensors[name] = files.tensor(name)
    return {"state": read_state(folder, OF_A_RUN), "config": asdict(load_resolved(folder / CONFIG)), "tensors": tensors}


@pytest.mark.parametrize("file", [STATE, CONFIG, "manifest.json", "tensors"])
def test_checkpoints(run: Path, file: str, tmp_path: Path) -> None:
    checkpoint = checkpoints(run / "checkpoints")[-1]
    name = next(path.name for path in checkpoint.glob("*.safetensors")) if file == "tensors" else file
    fuzz(
        checkpoint,
        name,
        BYTES if file == "tensors" else JSON if "json" in file else YAML,
        of_checkpoint,
        tmp_path,
        True,
    )


def of_state(folder: Path) -> Any:
    """The state that a run that goes on reads."""
    assert find_damage(folder) is None
    state, config = read_state(folder, OF_A_RUN), load_resolved(folder / CONFIG)
    SpikeDetector(10.0, 4).load_state_dict(state["spikes"])
    source = build_source(config.data)
    source.load_state_dict(state["data"])
    return state, last_shape(config, state), Rollbacks(**state["rollbacks"])


@pytest.mark.parametrize("file", [STATE, CONFIG])
def test_checkpoints_with_a_right_manifest(run: Path, file: str, tmp_path: Path) -> None:
    def seal(folder: Path) -> None:
        (folder / "manifest.json").unlink()
        write_manifest(folder, entries(sorted(folder.iterdir())))

    mutations = JSON if file == STATE else YAML
    fuzz(checkpoints(run / "checkpoints")[-1], file, mutations, of_state, tmp_path, seal=seal)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = train_tokenizer(make_texts(40), 320, folder / "tokenizer.model")
    write_shards(folder / "shards", make_texts(12), tokenizer, name="test", shard_bytes=20_000)
    return folder


def of_shards(folder: Path) -> Any:
    found = TokenShards(folder)
    places = [(shard, at) for shard in range(found.num_shards) for at in range(len(found.lengths(shard)))]
    return found.fingerprint, found.vocab_size, [found.document(*place).tolist() for place in places]


@pytest.mark.parametrize("file", ["index.json", "*.tar", "*.npy"])
def test_shards(corpus: Path, file: str, tmp_path: Path) -> None:
    name = sorted((corpus / "shards").glob(file))[0].name
    # The index has no checksum of its own: a run keeps the fingerprint of what it has read.
    fuzz(corpus / "shards", name, JSON if "json" in name else BYTES, of_shards, tmp_path, file != "index.json")


def of_tokenizer(folder: Path) -> Any:
    found = load_tokenizer(folder)
    ids = found.encode("The quick brown fox\n  jumps \u2581 漢 <s>")
    found.decode(range(min(found.vocab_size, 1000)))
    with suppress(UserError):
        fast_files(found)
    return found.hash, found.vocab_size, ids, found.decode(ids)


def test_sentencepiece(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    shutil.copy(corpus / "tokenizer.model", tmp_path / "t")
    fuzz(tmp_path / "t", "tokenizer.model", BYTES, of_tokenizer, tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_hugging_face_tokenizers(file: str, tmp_path: Path) -> None:
    ends = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": True, "model_max_length": 64}
    fuzz(make_tokenizer(tmp_path / "t", ends), file, JSON, of_tokenizer, tmp_path)


def of_model(folder: Path) -> Any:
    model = SleepForCausalLM.from_pretrained(folder)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {**weights, "generation": model.generation_config.to_dict(), "sleep": model.config.sleep}


def of_description(folder: Path) -> Any:
    describe(folder)
    return of_model(folder)


MODEL_FILES = [("config.json", JSON), ("generation_config.json", JSON), ("model.safetensors.index.json", JSON)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a family of transformers, and one of this package, both in several files."""
    root = tmp_path_factory.mktemp("models")
    config = disturbed(tiny_config(["attention", "gated_deltanet"]))
    (root / "native").mkdir()
    native(FAMILIES["qwen3_5_text"], config, root / "native").save_pretrained(root / "native", max_shard_size="4KB")
    (root / "native" / "model.safetensors").unlink(missing_ok=True)
    sleeping().save_pretrained(root / "saved", max_shard_size="4KB")
    for place in root.iterdir():
        if not (place / "generation_config.json").exists():
            (place / "generation_config.json").write_text(json.dumps({"eos_token_id": 3, "use_cache": True}))
    return root


@pytest.mark.parametrize("place", ["native", "saved"])
@pytest.mark.parametrize(("file", "mutations"), [*MODEL_FILES, ("weights", BYTES)])
def test_models(models: Path, place: str, file: str, mutations: Sequence[Mutation], tmp_path: Path) -> None:
    name = sorted((models / place).glob("*.safetensors"))[0].name if file == "weights" else file
    fuzz(models / place, name, mutations, of_description if place == "native" else of_model, tmp_path)


def test_memories(tmp_path: Path) -> None:
    model = sleeping()
    (tmp_path / "m").mkdir()
    text = torch.arange(14) % 17
    model.read(**padded([text, text[:7]])).save(tmp_path / "m" / "memory")

    def of_memory(folder: Path) -> Any:
        live = SleepCache.load(folder / "memory", model).live
        tensors = live.state.to_state_dict() | {f"start.{n}": t for n, t in live.at_start.to_state_dict().items()}
        return {**tensors, "rows": [live.filled, live.predicted, live.boundaries], "fed back": live.fed_back_BLD}

    fuzz(tmp_path / "m", "memory", BYTES, of_memory, tmp_path, guarded=True)


@pytest.mark.parametrize(("file", "mutations"), [("a.jsonl", LINES), ("a.parquet", BYTES), ("a.jsonl.zst", BYTES)])
def test_inputs(file: str, mutations: Sequence[Mutation], tmp_path: Path) -> None:
    place, texts = tmp_path / "in", make_texts(20)
    place.mkdir()
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    if file == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), place / file, row_group_size=4)
    else:
        (place / file).write_bytes(zstandard.compress(lines) if file.endswith("zst") else lines)

    def of_inputs(folder: Path) -> Any:
        units = plan_units(named_inputs([str(folder / file)]), "text", 5000)
        found = [text for unit in units for part in unit.slices for text in documents(part, "text")]
        return None if any(isinstance(text, Bad) for text in found) else found

    fuzz(place, file, mutations, of_inputs, tmp_path)
