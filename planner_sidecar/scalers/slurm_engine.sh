#!/bin/bash
# The job: one engine on a free port of its node. PROXY_ADMIN is the proxy's admin URL, ENGINE_COMMAND starts the engine
# on $PORT ('vllm serve MODEL --port $PORT'). The proxy hears of it at once and sends when it is healthy.
set -euo pipefail
PORT=$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export PORT
url=http://${ENGINE_HOST:-$(hostname)}:$PORT
scontrol update "JobId=$SLURM_JOB_ID" "Comment=$url"
bash -c "exec $ENGINE_COMMAND" &
engine=$!
forget() { curl --silent --output /dev/null --request DELETE --url-query "url=$url" "$PROXY_ADMIN/engines" || true; }
trap 'kill -TERM $engine 2> /dev/null || true; wait $engine || true; forget' TERM EXIT
curl --silent --show-error --fail --retry 60 --retry-connrefused --retry-delay 2 --output /dev/null \
    --data "{\"url\": \"$url\"}" "$PROXY_ADMIN/engines"
wait $engine
