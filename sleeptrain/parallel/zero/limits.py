"""How much DeepSpeed's ZeRO sends and keeps at once, in elements. A plan counts by the same numbers."""

# Gradients travel in messages of at most so many.
MAX_BUCKET = 200_000_000

# Under ZeRO-3, DeepSpeed's own defaults: a gathered weight stays where it is used again before so many others,
MAX_REUSE = 1_000_000_000
# parameters of at most so many are always there,
PERSISTENT = 100_000
# and so many are gathered ahead.
AHEAD = 50_000_000
