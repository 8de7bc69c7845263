"""Checkpoints independent of the layout: fragments of named tensors, written in the background."""
