#!/usr/bin/env bash
# Runs on a host of two GPUs, inside the folder DIR that gpu_engine_bundle.sh made, in two calls, because the archives are large:
#   DIR/src/benchmarks/gpu_disaggregation_host.sh probe NIXL_ARCHIVE OUT                    what copies, NIXL and our transport do between the GPUs, every byte compared
#   the same ipc NIXL_ARCHIVE OUT              whether a reader keeps the HBM of an owner that was killed
#   the same bench ENGINE_ARCHIVE OUT [option ...]     the engines; done after CALL_SECONDS (480)
set -euo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd); what=$1; archive=$(realpath "$2"); out=$(mkdir -p "$3" && realpath "$3"); shift 3
site=${GPU_ENGINE_SITE:-/opt/gpu_engine}; mkdir -p "$site"
# Multicast over NVLink can put the GPUs of a shared host out of service.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export PYTHONPATH="$site/ours:$site/engine:$site/nixl" HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 PYTHONUNBUFFERED=1
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/usr/local/nvidia/lib64"
say() { echo "[$(date -u +%T), $SECONDS s] $*"; }
if ! cmp -s "$here/commit" "$site/commit"; then
  rm -rf "$site/ours" "$site/src"
  python3 -m pip install -q --no-index --no-deps --no-compile --target "$site/ours" "$here"/*.whl; cp -r "$here/src" "$here/commit" "$site"
fi
cd "$site/src"
if [ "$what" != bench ]; then
  if [ ! -e "$site/nixl" ]; then mkdir -p "$site/nixl.new"; tar -C "$site/nixl.new" -xJf "$archive"; mv "$site/nixl.new" "$site/nixl"; fi
  say "NIXL unpacked"
fi
if [ "$what" = ipc ]; then
  timeout ${CALL_SECONDS:-300} python3 -m benchmarks.served.window_kept "$out/window_kept.json" || say "the check ended with $?"
  exit 0
fi
if [ "$what" = probe ]; then
  { nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader; nvidia-smi topo -m; nvidia-smi nvlink -s; uname -r; nproc; free -g
    df -h / /dev/shm; cat "$site/commit"; } >"$out/machine.txt" 2>&1 || true
  cat "$out/machine.txt"
  timeout 110 python3 -m benchmarks.served.peer_floors "$out/probe.json" || say "the probe ended with $?"
  say "now our own transport"
  for gb in 1.0 0.25; do
    NIXL_LOG_LEVEL=ERROR timeout 60 python3 -m benchmarks.served.window_check "$out/window-$gb.json" 15 4.3 $gb >"$out/probe-window-$gb.log" 2>&1 ||
      say "the check with $gb GB ended with $?"
    tail -n 1 "$out/probe-window-$gb.log"
    python3 -c 'import json, sys
for each in json.load(open(sys.argv[1]))["rounds"]: print(each)' "$out/window-$gb.json" | head -n 16 || true
  done
  tail -n 8 "$out"/probe-*.log || true; tar -C "$out" -czf "$out/probe-logs.tgz" --remove-files $(cd "$out" && ls -d probe-*.log) || true
  rm -rf "$out"/probe-mail-*; cp "$out/probe.json" "$site/" || true
  say "probed"; exit 0
fi
[ -e "$site/nixl" ] || { say "no NIXL here: another machine than that of the probe; run it first"; exit 3; }
# Six engines import the same files: compiled once, they start much faster.
unset PYTHONDONTWRITEBYTECODE
mkdir -p "$site/engine"; [ -e "$site/engine/vllm" ] || tar -C "$site/engine" -xJf "$archive"
say "vLLM unpacked"
timeout 40 python3 -m compileall -q -j 0 "$site/engine" "$site/ours" >/dev/null || true
say "compiled"
buffer=cpu; if grep -q '"vram_right": true' "$site/probe.json"; then buffer=cuda; fi
say "the stock arm reads from $buffer"
left=$((${CALL_SECONDS:-480} - SECONDS - 25))
timeout $((left + 15)) python3 -m benchmarks gpu_disaggregation --out "$out" --seconds $left --stock-buffer $buffer "$@" || say "the bench ended with $?"
for log in "$out"/*.log; do echo "== $log"; grep -E "Error|WARNING.*(nixl|dynamo)|dynamo:" "$log" | cut -c1-300 | head -n 12 || true; done
tar -C "$out" -czf "$out/logs.tgz" --remove-files $(cd "$out" && ls ./*.log) || true
say "done"
