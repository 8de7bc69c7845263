"""config.json of Jet-Nemotron-2B, Ouro-1.4B and Qwen3.5-2B: the settings that a model's shape depends on."""

from __future__ import annotations

from typing import Any

# jetai/modeling/configs/jetlm_2B.json: the settings that a model's shape depends on.
JET_2B: dict[str, Any] = {
    "model_type": "jet_nemotron",
    "efficient_attention_config": {
        "jet": {
            "conv_size": 4,
            "dconv_generator_reduction": 8,
            "expand_v": 2.6666666667,
            "head_dim": 96,
            "norm_eps": "1e-5",
            "num_heads": 12,
        },
        "swa": {"window_size": 1152},
    },
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "layer_types": ["jet"] * 14 + ["attn"] + ["jet"] * 4 + ["attn", "swa", "swa"] + ["jet"] * 6,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}

# config.json of ByteDance/Ouro-1.4B: the settings that a model's shape depends on.
OURO_1_4B: dict[str, Any] = {
    "model_type": "ouro",
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "layer_types": ["full_attention"] * 24,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "total_ut_steps": 4,
    "early_exit_threshold": 1.0,
    "vocab_size": 49152,
}

# The text model of Qwen/Qwen3.5-2B. Missing settings are the defaults of transformers.
QWEN3_5_2B: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 6,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_value_head_dim": 128,
    "num_attention_heads": 8,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25},
    "tie_word_embeddings": True,
    "vocab_size": 248320,
}
