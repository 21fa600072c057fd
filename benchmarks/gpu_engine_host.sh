#!/usr/bin/env bash
# Runs on the GPU host, from the folder that gpu_engine_bundle.sh made: go.sh ENGINE_ARCHIVE OUT [option of the bench ...]
# One call gives every figure: copies, calibration, engines. It is done after CALL_SECONDS (570).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd); archive=$1; out=$2; shift 2
site=${GPU_ENGINE_SITE:-/opt/gpu_engine}; mkdir -p "$out"
if [ ! -e "$site/engine/vllm" ]; then mkdir -p "$site/engine"; tar -C "$site/engine" -xJf "$archive"; fi
rm -rf "$site/ours"; python3 -m pip install -q --no-index --no-deps --no-compile --target "$site/ours" "$here"/*.whl
# Five engines import the same files: compiled once, they start much faster.
unset PYTHONDONTWRITEBYTECODE
python3 -m compileall -q -j 0 "$site/engine" "$site/ours" >/dev/null || true
export PYTHONPATH="$site/ours:$site/engine" HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/machine.txt"
{ uname -r; free -g; df -h / /dev/shm; cat "$here/commit"; python3 -m pip list 2>/dev/null | grep -iE '^(torch|triton|transformers|vllm|dynamo) '; } >>"$out/machine.txt"
cd "$here/src"
# Alone, before the engines load: they find the calibration's figures on disk. Compressed copies are part of it.
timeout 100 python3 -m benchmarks gpu_copy quick >"$out/gpu_copy.txt" 2>&1 || echo "gpu_copy ended with $?"
timeout 40 "$site/ours/bin/dynamo-connectors" calibrate >>"$out/machine.txt" 2>&1 || echo "calibrate ended with $?"
echo "before the engines: $SECONDS s"
exec python3 -m benchmarks gpu_engine --out "$out" --disk "$site" --seconds $((${CALL_SECONDS:-570} - SECONDS - 20)) "$@"
