#!/usr/bin/env bash
# Builds the Dockerfile as it is on a stand-in for its base image, and trains in the result. Needs root on Debian or
# Ubuntu, buildah, mmdebstrap and a network. What it does not show is in docs/containers.md.
#
# The stand-in is a small Debian under the base's name, with a CPU build of torch and Triton that have versions as vendors
# give them. Images and storage are this script's own, in a temporary folder, and are gone in the end.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
SUITE=bookworm PYTHON_VERSION=3.11
locked() { grep -oE "^$1==[^ ]+" requirements/gpu.txt; }

for program in buildah mmdebstrap; do
    command -v "$program" >/dev/null || { echo "docker/check.sh: no $program; apt-get install buildah mmdebstrap" >&2; exit 3; }
done
[ "$(id -u)" = 0 ] || { echo "docker/check.sh: only root can build images without an engine" >&2; exit 3; }

work=$(mktemp -d)
store() { buildah --root "$work/storage" --runroot "$work/run" "$@"; }
tidy() {
    store rm --all >/dev/null 2>&1 || true
    store rmi --all --force >/dev/null 2>&1 || true
    umount --lazy "$work/storage/overlay" 2>/dev/null || true
    rm -rf "$work"
}
trap tidy EXIT

shared=(--isolation chroot --network host)
bundle=/etc/ssl/certs/ca-certificates.crt # of this machine, which a proxy may have added to
[ ! -f $bundle ] || shared+=(--volume "$bundle:$bundle:ro")
build() { store build --format docker --layers --pull-never --quiet "${shared[@]}" "$@" >/dev/null; }

say() { printf '== %s\n' "$*"; }
base=$(sed -n 's/^ARG BASE_IMAGE=//p' docker/Dockerfile)

say "a stand-in for $base"
mkdir "$work/base"
index=()
"$PYTHON" -m pip config list | grep find-links >/dev/null ||
    index=(--extra-index-url https://download.pytorch.org/whl/cpu)
"$PYTHON" -m pip download --quiet --no-deps --dest "$work/base" "${index[@]}" --only-binary=:all: \
    --python-version $PYTHON_VERSION --implementation cp --platform manylinux_2_28_x86_64 \
    --platform manylinux_2_27_x86_64 "$(locked torch)" "$(locked triton)"
mmdebstrap --quiet --variant=minbase --include=python3,python3-pip,ca-certificates $SUITE "$work/base/root.tar"
cat >"$work/base/Dockerfile" <<'FILE'
FROM scratch
ADD root.tar /
COPY *.whl /wheels/
RUN python3 -m pip install --break-system-packages --no-cache-dir --quiet --root-user-action=ignore /wheels/*.whl \
    && rm -r /wheels
ARG TORCH=2.13.0a0+standin
ARG TRITON=3.7.1+standin
RUN cd /usr/local/lib/python3.11/dist-packages \
    && mv torch-*.dist-info "torch-$TORCH.dist-info" && mv triton-*.dist-info "triton-$TRITON.dist-info" \
    && sed -i "s/^Version: .*/Version: $TORCH/" "torch-$TORCH.dist-info/METADATA" \
    && sed -i "s/^Version: .*/Version: $TRITON/" "triton-$TRITON.dist-info/METADATA"
FILE
build --file "$work/base/Dockerfile" --tag "$base" "$work/base"
build --file "$work/base/Dockerfile" --tag old-torch --build-arg TORCH=2.12.0a0+standin "$work/base"
build --file "$work/base/Dockerfile" --tag old-triton --build-arg TRITON=3.7.0+standin "$work/base"
rm "$work"/base/*.whl "$work/base/root.tar"

# The versions of torch and Triton, and a sum over all files of each.
cat >"$work/torch.sh" <<'FILE'
for name in torch triton; do
    python3 -m pip show --no-color $name 2>/dev/null | grep -E '^(Name|Version|Location):'
    place=$(python3 -c "import importlib.util; print(importlib.util.find_spec('$name').submodule_search_locations[0])")
    (cd "$place" && find . -name '*.py' -o -name '*.so' | LC_ALL=C sort | xargs sha256sum | sha256sum)
done
FILE
in_container() { # IMAGE ROOT|USER COMMAND...
    local container=$1
    shift
    store run --isolation chroot --network host --volume "$work/torch.sh:/torch.sh:ro" "$container" -- "$@"
}
plain=$(store from --pull-never "$base")
before=$(in_container "$plain" sh /torch.sh)

say "docker/Dockerfile"
build --file docker/Dockerfile --tag sleeptrain .
image=$(store from --pull-never sleeptrain)

say "the base's torch and Triton are untouched"
after=$(in_container "$image" sh /torch.sh)
echo "$after"
[ "$before" = "$after" ] || { echo "docker/check.sh: they were $before" >&2; exit 1; }

say "the rest has the versions of the lock"
for name in transformers deepspeed numpy; do
    version=$(in_container "$image" python3 -c "from importlib.metadata import version; print(version('$name'))")
    echo "$name==$version"
    [ "$name==$version" = "$(locked $name)" ] || { echo "docker/check.sh: the lock has $(locked $name)" >&2; exit 1; }
done

say "a base whose torch or Triton does not fit is refused, not mended"
for name in torch triton; do
    if build --file docker/Dockerfile --build-arg BASE_IMAGE=localhost/old-$name . 2>"$work/refused"; then
        echo "docker/check.sh: it was built" >&2
        exit 1
    fi
    grep "Cannot install.*$name" "$work/refused"
done

say "who runs, and what it is labelled"
[ "$(in_container "$image" id -u)" = 10001 ] || { echo "docker/check.sh: the image runs as root" >&2; exit 1; }
store inspect --type image --format '{{.Docker.Config.Labels}}' sleeptrain | tee "$work/labels"
grep -q "org.opencontainers.image.base.name:$base" "$work/labels"

say "sleeptrain doctor"
in_container "$image" sleeptrain doctor --brief experiment=rule110

say "a job of two processes"
in_container "$image" env OMP_NUM_THREADS=1 sleeptrain train experiment=rule110 run.name=two parallel.tensor=2 \
    train.tokens=20_000 train.eval_every=0 data.rule110.validation_samples=64 wandb.mode=disabled
in_container "$image" python3 -c 'import json; print(json.load(open("runs/two/status.json"))["state"])' | tee "$work/state"
grep -qx finished "$work/state"
say "all good"
