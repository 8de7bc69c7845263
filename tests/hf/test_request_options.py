"""Requests of the harness become arguments of generate."""

from __future__ import annotations

import pytest

from sleeptrain.errors import ConfigError
from sleeptrain.hf.request_options import generation_options

LENGTHS = [
    ({"max_new_tokens": 3}, 3), ({"max_tokens": 4}, 4), ({"max_completion_tokens": 5}, 5), ({}, 7),
    ({"max_gen_toks": "6", "max_tokens": 6}, 6), ({"max_gen_toks": None}, 7),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "length"), LENGTHS)
def test_the_length_has_several_names(arguments, length):
    assert generation_options(arguments, 7) == {"do_sample": False, "max_new_tokens": length}


OPTIONS = [
    ({"until": None, "temperature": 0}, {"do_sample": False}),
    ({"temperature": None, "num_beams": 4}, {"do_sample": False, "num_beams": 4}),
    ({"temperature": 0.7}, {"do_sample": True, "temperature": 0.7}),
    ({"temperature": 0.7, "do_sample": True}, {"do_sample": True, "temperature": 0.7}),
    ({"temperature": 0.7, "do_sample": False}, {"do_sample": False}),
    ({"do_sample": True, "top_k": 3}, {"do_sample": True, "top_k": 3}),
    ({"temperature": 0.0, "repetition_penalty": 1.5}, {"do_sample": False, "repetition_penalty": 1.5}),
]


@pytest.mark.parametrize(("arguments", "expected"), OPTIONS)
def test_other_generation_settings_stay(arguments, expected):
    assert generation_options(arguments, 7) == expected | {"max_new_tokens": 7}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_gen_toks": 3, "max_new_tokens": 4}, "max_gen_toks=3 and max_new_tokens=4: .* give one"),
        ({"max_length": 9}, "max_length .* give max_gen_toks"),
        ({"num_bems": 4}, "unknown generation setting 'num_bems'; did you mean 'num_beams'"),
        ({"passes": 4}, "unknown generation setting 'passes'"),
        ({"num_return_sequences": 2}, "num_return_sequences=2: only 1"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample=true and temperature=0 exclude each other"),
    ],
)
def test_impossible_generation_settings_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        generation_options(arguments, 7)
