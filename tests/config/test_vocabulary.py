"""The vocabulary is that of the data, unless the model has a larger one."""

from __future__ import annotations

import pytest

from sleeptrain.config.schema import Config, ModelConfig
from sleeptrain.config.vocabulary import with_vocabulary
from sleeptrain.errors import ConfigError


def test_a_model_without_a_vocabulary_takes_the_datas() -> None:
    config = Config()
    assert with_vocabulary(config, 300).model.vocab_size == 300
    assert config.model.vocab_size == 0


@pytest.mark.parametrize("size", [300, 301])
def test_a_larger_vocabulary_stays(size: int) -> None:
    assert with_vocabulary(Config(model=ModelConfig(vocab_size=size)), 300).model.vocab_size == size


def test_a_smaller_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size=299 is smaller than the data's 300; leave it 0"):
        with_vocabulary(Config(model=ModelConfig(vocab_size=299)), 300)
