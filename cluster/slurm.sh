#!/usr/bin/env bash
# Train on the nodes of a Slurm allocation: sbatch cluster/slurm.sh [flags of spartan train]. The environment with the
# package and the run folder must be on storage that all nodes see. The same command again continues the run.
#SBATCH --job-name=spartan-ray
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail

python=${SPARTAN_PYTHON:-.venv/bin/python}
port=${SPARTAN_PORT:-6379}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# This job has a token of its own, so that nobody else on these nodes can join.
RAY_AUTH_TOKEN=$("$python" -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT

step=(srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --overlap)
# Runs in the background. `exec` replaces the subshell, so that the trap kills srun itself, not a waiting shell.
start() {
    exec "${step[@]}" --nodelist="$1" "$python" -m ray.scripts.scripts start "${@:2}" \
        --num-cpus="$SLURM_CPUS_PER_TASK" --block --disable-usage-stats
}

start "$head" --head --node-ip-address="$head" --port="$port" --include-dashboard=false &
while read -r node; do
    [ "$node" = "$head" ] || start "$node" --address="$head:$port" &
done < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

wait_for='import ray, sys; ray.init(sys.argv[1], log_to_driver=False); sys.exit(len(ray.nodes()) < int(sys.argv[2]))'
until "${step[@]}" --nodelist="$head" "$python" -c "$wait_for" "$head:$port" "$SLURM_NNODES" 2>/dev/null; do
    if ((SECONDS > 600)); then
        echo "slurm.sh: not all $SLURM_NNODES nodes have joined after ten minutes" >&2
        exit 1
    fi
    sleep 2
done
"${step[@]}" --nodelist="$head" "$python" -m spartan_ray train --cluster.address "$head:$port" --run.resume auto "$@"
