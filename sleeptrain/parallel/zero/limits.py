"""Limits of DeepSpeed's ZeRO for sending and keeping tensors, in elements. The plan counts with the same numbers."""

# The largest message of gradients.
MAX_BUCKET = 200_000_000

# The following are DeepSpeed's defaults for ZeRO-3.
# A gathered weight stays if it is used again before this many other elements.
MAX_REUSE = 1_000_000_000
# A parameter of at most this size always stays gathered.
PERSISTENT = 100_000
# The number of elements that are gathered ahead of their use.
AHEAD = 50_000_000
