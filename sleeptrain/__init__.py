"""Pretraining of language models that sleep."""
