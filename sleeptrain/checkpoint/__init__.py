"""Checkpoints independent of the layout: whole tensors by canonical names, written in the background."""
