"""Checkpoints that know no layout: whole tensors under canonical names, written in the background, read by any run."""
