#!/usr/bin/env bash
# Packs this checkout for an offline GPU host: our wheel, the wheels that the host and its engine bundle lack, the bench.
#   PYTHON=.envs/vllm/bin/python benchmarks/gpu_engine_bundle.sh DIR
# On the host, beside engine.tar.xz (vLLM for that host's torch, unpacked by `tar -xJ`):  bash DIR/go.sh ENGINE_ARCHIVE OUT [option ...]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd); python=${PYTHON:-python3}
rm -rf "$1"; out=$(mkdir -p "$1/src" && cd "$1" && pwd); cd "$root"
"$python" -m hatchling build -t wheel -d "$out" >/dev/null
tags=(--python-version 3.12 --implementation cp --only-binary=:all: --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64)
"$python" -m pip download -q --no-deps "${tags[@]}" -d "$out" orjson msgspec xxhash pyzmq >"$out/pip.log" 2>&1
# The bench without our packages: what runs there is the wheel.
git ls-files -z benchmarks tools | tar --null -T - -cf - | tar -C "$out/src" -xf -
git rev-parse HEAD >"$out/commit"
cp benchmarks/gpu_engine_host.sh "$out/go.sh"
du -sh "$out"
