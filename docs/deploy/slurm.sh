#!/usr/bin/env bash
# A Ray cluster inside a SLURM allocation, and one hearsae command on it:
#     sbatch --nodes=4 docs/deploy/slurm.sh cache --dataset /shared/speech --model tiny --sites encoder.blocks.2 --out /shared/tiny.zarr
# The same again goes on from what is committed, so an allocation that ends too soon (or is requeued) costs the shards in flight.
# HEARSAE_PYTHON: the interpreter that has hearsae, on every node; default: python.
#SBATCH --job-name=hearsae
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: sbatch slurm.sh COMMAND [options of hearsae COMMAND]" >&2
    exit 2
fi
python=${HEARSAE_PYTHON:-python}
ray=("$python" -m ray.scripts.scripts)
started_within=${HEARSAE_START_SECONDS:-300}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 20000))
resources=(--num-cpus="${SLURM_CPUS_PER_TASK:-1}")
if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
    resources+=(--num-gpus="$SLURM_GPUS_ON_NODE")
fi

# Other users of the cluster's network reach these ports too: without the token they get nowhere.
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN=$("$python" -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN
# A folder of its own: on a shared node /tmp/ray may be another user's. Short, for sockets have short paths.
sessions=/tmp/ray-$SLURM_JOB_ID

trap 'kill $(jobs -p) 2>/dev/null || true; wait || true' EXIT

srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
    "${ray[@]}" start --head --block --node-ip-address="$ip" --port="$port" --temp-dir="$sessions" --include-dashboard=false "${resources[@]}" &
until "${ray[@]}" health-check --address "$ip:$port" >/dev/null 2>&1; do
    sleep 1
    if [ $SECONDS -gt "$started_within" ]; then
        echo "slurm.sh: Ray's head did not start on $head within $started_within s" >&2
        exit 1
    fi
done

if [ ${#nodes[@]} -gt 1 ]; then
    srun --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --exclude="$head" --overlap \
        "${ray[@]}" start --block --address="$ip:$port" "${resources[@]}" &
fi
"$python" - "$ip:$port" "${#nodes[@]}" "$started_within" <<'PYTHON'
import sys
import time

import ray

address, wanted, patience = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
ray.init(address=address, log_to_driver=False)
end = time.monotonic() + patience
while (there := sum(node["Alive"] for node in ray.nodes())) < wanted and time.monotonic() < end:
    time.sleep(1)
print(f"slurm.sh: {there} of {wanted} nodes, {ray.cluster_resources().get('CPU', 0):g} cores", file=sys.stderr)
PYTHON

"$python" -m cluster.cli "$@" --address "$ip:$port"
