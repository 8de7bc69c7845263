"""Settings that may hold a secret keep a variable's name; its value is read at the time of use and never shown."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from sleeptrain.config import load_resolved, resolved_yaml, save_resolved
from sleeptrain.config.changes import check_changes
from sleeptrain.config.compose import compose
from sleeptrain.config.environment import expand
from sleeptrain.config.resolved import shareable
from sleeptrain.config.schema import ShardSource
from sleeptrain.errors import ConfigError

SECRET = "hush-4711"
URL = "https://${oc.env:SLEEPTRAIN_TEST_KEY}@host/train"


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLEEPTRAIN_TEST_KEY", SECRET)


def with_source(train: str, *more: str) -> list[str]:
    return ["experiment=stdlib", f'data.shards.sources=[{{train: "{train}", validation: "data/$x"}}]', *more]


def test_a_source_keeps_the_name_of_the_variable() -> None:
    config = compose(with_source(URL, "run.name='${oc.env:SLEEPTRAIN_TEST_KEY}'"))
    assert config.data.shards.sources[0].train == URL
    assert config.run.name == SECRET, "what is no secret is resolved"
    assert (
        SECRET
        not in json.dumps(shareable(compose(with_source(URL)))) + resolved_yaml(compose(with_source(URL))).decode()
    )


def test_other_interpolations_of_a_source_are_resolved() -> None:
    found = compose(
        with_source("${data.shards.tokenizer}/${oc.env:SLEEPTRAIN_TEST_KEY,none}", "data.shards.tokenizer=a")
    )
    assert found.data.shards.sources[0].train == "a/${oc.env:SLEEPTRAIN_TEST_KEY,none}"
    with pytest.raises(ConfigError, match=r"nowhere"):
        compose(with_source("${nowhere}"))


def test_variables_of_a_shell_stay(tmp_path: Path) -> None:
    config = compose(with_source(r"pipe:get \${HOST}/shard-{0..1}.tar"))
    assert config.data.shards.sources[0].train == "pipe:get ${HOST}/shard-{0..1}.tar"
    save_resolved(config, tmp_path / "config.yaml")
    assert load_resolved(tmp_path / "config.yaml") == config
    assert expand(config.data.shards.sources[0].train).value == config.data.shards.sources[0].train


def test_credentials_of_a_url_are_not_shared() -> None:
    config = compose(with_source("https://me:hush@host/train"))
    assert shareable(config)["data"]["shards"]["sources"][0]["train"] == "https://***@host/train"


def test_a_run_whose_file_has_the_value_goes_on() -> None:
    """Older versions have saved the value."""
    old, new = compose(with_source(f"https://{SECRET}@host/train")), compose(with_source(URL))
    assert check_changes(old, new, "runs/r") == []


def test_expansion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLEEPTRAIN_TEST_NONE", raising=False)
    monkeypatch.setenv("SLEEPTRAIN_TEST_SHORT", "a")
    found = expand(
        "${oc.env:SLEEPTRAIN_TEST_KEY}/${oc.env:SLEEPTRAIN_TEST_NONE, 'b'}/${oc.env:SLEEPTRAIN_TEST_SHORT}/${X}"
    )
    assert found.value == f"{SECRET}/b/a/${{X}}" and SECRET not in repr(found)
    assert found.hide(f"a {SECRET} b") == "a ${oc.env:SLEEPTRAIN_TEST_KEY} b"
    with pytest.raises(ConfigError, match="the environment variable SLEEPTRAIN_TEST_NONE is not set"):
        expand("${oc.env:SLEEPTRAIN_TEST_NONE}")
    with pytest.raises(ConfigError, match="not nested"):
        expand("${oc.env:SLEEPTRAIN_TEST_NONE,${oc.env:SLEEPTRAIN_TEST_NONE}}")


# Configurations as data


def test_a_saved_configuration_is_data(tmp_path: Path) -> None:
    config = compose(["experiment=stdlib"])
    config.run.root = config.wandb.entity = "${oc.env:SLEEPTRAIN_TEST_KEY}"
    config.data.shards.tokenizer = r"\${run.name}\\${"
    save_resolved(config, tmp_path / "config.yaml")
    assert load_resolved(tmp_path / "config.yaml") == config
    written = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(written.replace("passes: 1", "passes: ${oc.env:SLEEPTRAIN_TEST_KEY}"))
    with pytest.raises(ConfigError, match="passes") as refusal:
        load_resolved(tmp_path / "config.yaml")
    assert SECRET not in str(refusal.value)


def test_any_text_of_a_setting_is_read_back(tmp_path: Path) -> None:
    pieces, draw = ["\\", "$", "{", "}", "a", ":", "oc.env:HOME", "'", '"', " ", "\n", "#", "é"], random.Random(0)
    config = compose(["experiment=stdlib"])
    texts = ["".join(draw.choices(pieces, k=draw.randrange(12))) for _ in range(300)]
    config.data.shards.sources = [ShardSource(train=text) for text in texts if text != "???"]
    save_resolved(config, tmp_path / "config.yaml")
    assert load_resolved(tmp_path / "config.yaml") == config
