#!/usr/bin/env bash
# Builds the wheel and tries it as a user gets it: check_wheel.sh VENV. A new environment outside of the checkout gets
# the wheel with its own requirements, in the versions of cpu.txt, and trains, evaluates and plans from there.
# VENV is the one of `make install`, which builds without a network.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$PWD/$1 lock=$PWD/requirements/cpu.txt
away=$(mktemp -d)
trap 'rm -rf "$away"' EXIT

"$venv/bin/python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$away" .
wheel=$(ls "$away"/sleeptrain-*.whl)
"$venv/bin/python" -m venv "$away/venv"
cd "$away"
index=()
if [ "$(uname -s)" = Linux ] && ! venv/bin/python -m pip config list | grep find-links >/dev/null; then
    index=(--extra-index-url https://download.pytorch.org/whl/cpu)
fi
venv/bin/python -m pip install --quiet --no-compile -c "$lock" ${index[@]+"${index[@]}"} "$wheel"
venv/bin/sleeptrain train experiment=rule110 run.name=wheel train.tokens=5_376 train.eval_every=1 \
    data.rule110.validation_samples=32 wandb.mode=disabled
venv/bin/sleeptrain evaluate runs/wheel --passes 1 2 --batches 1
venv/bin/sleeptrain plan experiment=pretrain_2b model.vocab_size=32_000 --processes 32 --gpu H200 >plan.txt
venv/bin/python -c 'import sleeptrain; [getattr(sleeptrain, name) for name in sleeptrain.__all__ if not name.startswith("Sleep")]'
echo "$(basename "$wheel") works in an environment of its own"
