#!/bin/bash
# As many engines as dynamo-planner wants, each a container of this host with a GPU of its own:
#   dynamo-planner --no-advisory --proxy-admin http://proxy:8081 --scale-command '/path/docker.sh {replicas} {victims}'
# with PROXY_ADMIN, ENGINE_IMAGE and ENGINE_ARGS ('--model MODEL') in its environment. The n-th port is the n-th GPU's.
set -euo pipefail
wanted=$1 victims=${2:-} host=${ENGINE_HOST:-127.0.0.1} first=${ENGINE_FIRST_PORT:-8100} gpus=${ENGINE_GPUS:-8}

ports() { docker ps --filter label=dynamo-engine --format '{{.Label "dynamo-engine"}}' | sort -n; }

tell() { curl --silent --show-error --fail --retry 30 --retry-connrefused --output /dev/null "$@" "$PROXY_ADMIN/engines"; }

for url in ${victims//,/ }; do # drained: nothing is in flight there
    docker stop --time 60 "dynamo-engine-${url##*:}" > /dev/null
done
for ((number = 0; number < gpus && $(ports | wc -l) < wanted; number++)); do
    port=$((first + number))
    ! ports | grep -qx "$port" || continue
    docker run --detach --rm --name "dynamo-engine-$port" --label "dynamo-engine=$port" --gpus "device=$number" \
        --ipc host --publish "$port:8000" "$ENGINE_IMAGE" ${ENGINE_ARGS:-} > /dev/null
    tell --data "{\"url\": \"http://$host:$port\"}"
done
if (($(ports | wc -l) < wanted)); then
    echo "only $(ports | wc -l) of $wanted engines fit on $gpus GPUs; lower --max-replicas" >&2
    exit 1
fi
