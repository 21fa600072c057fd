#!/usr/bin/env bash
# Runs on a GPU host that has torch and Triton, from a checkout or from a folder with `benchmarks` and `kernels` of one:
#   benchmarks/gpu_copy_host.sh OUT [tma [h2d]]
# Shapes of the copy, what slows decode, and loads layer by layer, in about 270 s; with `tma` the stores by TMA alone, in
# about 120 s. Each bench may fail alone.
set -uo pipefail
cd "$(dirname "$0")/.." && mkdir -p "$1"
OUT=$(cd "$1" && pwd); export OUT PYTHONPATH=$PWD:$PWD/kernels PYTHONUNBUFFERED=1
{ nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm --format=csv,noheader; uname -r; nproc; cat commit; } \
  2>&1 | tee "$OUT/gpu_copy_host-machine.txt"
bench() { # SECONDS NAME FILE [option ...]
  local seconds=$1 name=$2 file=$3; shift 3
  timeout -k 5 "$seconds" python3 -m benchmarks "$name" "$@" 2>&1 | tee "$OUT/$file.txt"
  echo "-- $file ended with ${PIPESTATUS[0]} at $SECONDS s"
}
if [ "${2:-}" = tma ]; then
  export XDG_CACHE_HOME=$OUT/cache
  bench 80 gpu_copy_tma gpu_copy_tma
  bench 70 gpu_copy_shapes gpu_copy_shapes-tma kinds=tma only="${3:-d2h}" rounds=3 seconds=50
  exit
fi
bench 40 gpu_contention gpu_contention
bench 95 gpu_copy_shapes gpu_copy_shapes-ours kinds=ours seconds=75
bench 60 gpu_copy_shapes gpu_copy_shapes-bulk kinds=bulk seconds=45
bench 55 gpu_copy_shapes gpu_copy_shapes-words kinds=tensor,words seconds=40
bench 75 gpu_layerwise gpu_layerwise
