#!/bin/bash
# As many engines as dynamo-planner wants, each a Slurm job of slurm_engine.sh beside this file:
#   dynamo-planner --no-advisory --proxy-admin http://proxy:8081 --scale-command '/path/slurm.sh {replicas} {victims}'
# with PROXY_ADMIN and ENGINE_COMMAND (see slurm_engine.sh) in its environment; what a job asks for comes from sbatch's
# own SBATCH_* variables (SBATCH_PARTITION, SBATCH_GPUS, ...). Jobs that still wait count, so asking again adds nothing.
set -euo pipefail
wanted=$1 victims=${2:-} name=${ENGINE_JOB_NAME:-dynamo-engine}

# Those that wait come first, then the youngest; the comment is the engine's URL once it runs.
jobs() { squeue --noheader --user "$(id -un)" --name "$name" --states PENDING,CONFIGURING,RUNNING --sort=t,-i --format='%A %k'; }

for url in ${victims//,/ }; do # drained: nothing is in flight there
    jobs | while read -r job comment; do
        [ "$comment" != "$url" ] || scancel "$job"
    done
done
there=$(jobs | wc -l)
while ((there < wanted)); do
    sbatch --job-name="$name" --export=ALL --output="${ENGINE_LOG:-dynamo-engine-%j.log}" "$(dirname "$0")/slurm_engine.sh"
    there=$((there + 1))
done
if ((there > wanted)) && [ -z "$victims" ]; then # nobody was drained: those that wait, or no proxy says who serves
    jobs | head -n $((there - wanted)) | while read -r job _; do scancel "$job"; done
fi
