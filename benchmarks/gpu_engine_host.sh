#!/usr/bin/env bash
# Runs on the GPU host, from the folder that gpu_engine_bundle.sh made: go.sh ENGINE_ARCHIVE OUT [option of the bench ...]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd); archive=$1; out=$2; shift 2
site=${GPU_ENGINE_SITE:-/opt/gpu_engine}
if [ ! -e "$site/engine/vllm" ]; then mkdir -p "$site/engine"; tar -C "$site/engine" -xJf "$archive"; fi
rm -rf "$site/ours"; python3 -m pip install -q --no-index --no-deps --no-compile --target "$site/ours" "$here"/*.whl
# Five engines import the same files: compiled once, they start much faster.
unset PYTHONDONTWRITEBYTECODE
python3 -m compileall -q -j 0 "$site/engine" "$site/ours" >/dev/null || true
export PYTHONPATH="$site/ours:$site/engine" HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/machine.txt"
{ uname -r; free -g; df -h / /dev/shm; cat "$here/commit"; python3 -m pip list 2>/dev/null | grep -iE '^(torch|triton|transformers|vllm|dynamo) '; } >>"$out/machine.txt"
# Alone, before the engines load: they find the figures on disk.
# Twice: the first compiles kernels, which is no part of a figure.
"$site/ours/bin/dynamo-connectors" calibrate >/dev/null 2>&1 || true
"$site/ours/bin/dynamo-connectors" calibrate --again >>"$out/machine.txt" 2>&1 || true
cd "$here/src"
exec python3 -m benchmarks gpu_engine --out "$out" --disk "$site" "$@"
