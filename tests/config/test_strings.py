"""String settings keep the text as written: on the command line, in files, sweeps, lists and sections of lists."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from sleeptrain.config import load_resolved, save_resolved
from sleeptrain.config.compose import compose, validate_sweep
from sleeptrain.config.overrides import override
from sleeptrain.config.schema import ShardSource
from sleeptrain.config.strings import quote_override, quote_yaml
from sleeptrain.errors import ConfigError

# hydra or YAML reads most of these as a number, a boolean, a date or nothing.
WRITTEN = ("2026_07_20", "1e3", "true", "Off", "0x10", "1:30", "2026-07-20", ".5", "nan", "007", "+5", "1.")


@pytest.mark.parametrize("text", [*WRITTEN, "null"])
def test_a_string_on_the_command_line_stays(text: str) -> None:
    assert OverridesParser.create().parse_override(quote_override(f"run.name={text}")).value() == text


@pytest.mark.parametrize("text", WRITTEN)
def test_a_string_in_yaml_stays(text: str) -> None:
    assert OmegaConf.create(quote_yaml(f"run:\n  name: {text}  # a name")) == {"run": {"name": text}}


def test_strings_of_files_and_overrides_stay(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nrun:\n  name: 2026_07_20\ntrain: {tokens: 1_000, device: cpu}\nwandb: {entity: null}\n"
        "data:\n  shards: {cache: 1:30, sources: [{name: 1e3, train: 0x10, validation: on, weight: 2}]}\n"
    )
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "mine.yaml").write_text("project: 007\n")
    overrides = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine", "+wandb=mine", "data.shards.tokenizer=1e3"]
    config = compose(overrides)
    shards = config.data.shards
    assert (config.run.name, config.wandb.project, shards.cache, shards.tokenizer) == (
        "2026_07_20",
        "007",
        "1:30",
        "1e3",
    )
    assert shards.sources == [ShardSource("1e3", "0x10", "on", 2.0)]
    assert (config.train.tokens, config.wandb.entity) == (1000, None)
    save_resolved(config, tmp_path / "config.yaml")
    assert load_resolved(tmp_path / "config.yaml") == config


def test_a_resolved_configuration_that_somebody_has_edited(tmp_path: Path) -> None:
    save_resolved(compose(["experiment=rule110"]), path := tmp_path / "config.yaml")
    path.write_text(path.read_text().replace("name: rule110", "name: 2026_07_20"))
    assert load_resolved(path).run.name == "2026_07_20"


def test_strings_of_the_jobs_of_a_sweep_stay() -> None:
    assert validate_sweep(["experiment=rule110", "run.name=1e3,2_0"]) == [
        Path("runs/multirun/1e3"),
        Path("runs/multirun/2_0"),
    ]
    sweep = ["experiment=rule110", "wandb.project=choice(1e3,2_0)", "data.shards.cache=007"]
    assert validate_sweep(sweep) == [Path("runs/multirun/rule110")]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.shards.sources=[{name: 1, weight: 3}]", "data.shards.sources=[{name: '1', weight: 3}]"),
        ("data.shards.sources.0.train= 20 ", "data.shards.sources.0.train= '20' "),
        ("run.allow_changes=[1, a, true]", "run.allow_changes=['1', a, 'true']"),
        ("++run.name=1,'2',c", "++run.name='1','2',c"),
        ("model=4", "model='4'"),
    ],
)  # fmt: skip
def test_text_that_would_be_read_as_another_value_is_quoted(override: str, expected: str) -> None:
    assert quote_override(override) == expected


ANY = ("a", "it's", "a\\", "a\\\\", "\\'x", "a,b=c {d} [e]", "", "1e3", "x\\'\\\\'y", 'a"b', "é ü")
UNTOUCHED = (
    "run.name=a b",
    "run.name=",
    "run.name='1'",
    "run.name=${model.dim}",
    "run.name=[",
    "run.name",
    "~run.name",
    "wandb.entity=null",
    "train.tokens=1000",
    "optim.adamw_betas=[0.9,1]",
    "data.shards.curriculum=[{tokens: 1, weights: {a: 2}}]",
    "hydra.verbose=true",
    "nothing.of.it=1",
)


@pytest.mark.parametrize("override", UNTOUCHED)
def test_other_overrides_stay(override: str) -> None:
    assert quote_override(override) == override


def test_yaml_that_is_not_plain_stays() -> None:
    text = "run:\n  name: &n 'a'\n  root: *n\n  init_from: |\n    1\ntrain: {tokens: 5}\nother: 1\n"
    assert quote_yaml(text) == text
    assert quote_yaml("a: [") == "a: [" and quote_yaml("") == ""
    assert OmegaConf.create(quote_yaml("name: it's 1\nroot: 1\n", "run")) == {"name": "it's 1", "root": "1"}


@pytest.mark.parametrize(
    "text", ["a", "it's", "a\\", "a\\\\", "\\'x", "a,b=c {d} [e]", "", "1e3", "x\\'\\\\'y", 'a"b', "é ü"]
)
def test_any_string_can_be_a_value(text: str) -> None:
    assert OverridesParser.create().parse_override(override("run.root", text)).value() == text


def test_null_is_no_value_where_a_setting_may_be_empty() -> None:
    config = compose(["experiment=rule110", "wandb.entity=null", "train.max_time=null"])
    assert config.wandb.entity is None and config.train.max_time is None
    with pytest.raises(ConfigError, match=r"train\.device: unknown value 'null'"):
        compose(["experiment=rule110", "train.device=null"])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("run: &r {name: a, more: *r}", "an alias in it refers to a part of the file that contains it"),
        ("\n".join(["a0: &a0 x", *(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]" for n in range(1, 12))]), "aliases expand it"),
        ("run: " + "[" * 600, "nested deeper than 64 levels"),
        ("run: {name: " + "a" * 2**18 + "}", "more than the 262,144 that are read"),
        ("run: {name: ", "expected"),
        ("run: !!python/object/apply:os.getcwd []", "constructor"),
        ("run: \xff", "utf-8"),
    ],
    ids=["self", "laughs", "deep", "large", "cut", "object", "binary"],
)
def test_a_file_of_options_is_checked_before_hydra_loads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, why: str
) -> None:
    loaded = list[str]()
    load = OmegaConf.load
    monkeypatch.setattr(OmegaConf, "load", lambda file: loaded.append(getattr(file, "name", "")) or load(file))
    (tmp_path / "experiment").mkdir()
    path = tmp_path / "experiment" / "mine.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=rf"mine\.yaml is not the YAML that it should be: .*{why}") as refusal:
        compose([f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"])
    assert "\n" not in str(refusal.value)
    assert (str(path) in loaded) == (why == "constructor")
