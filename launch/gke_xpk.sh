#!/usr/bin/env bash
# A run on a GKE cluster that was made with xpk.
#
#   launch/gke_xpk.sh --name=mine --cluster=C --project=P --zone=us-east5-a \
#       --tpu=v6e-16 --image=IMAGE --storage=shared \
#       --config=configs/quickstart.py --workdir=/mnt/shared/mine
#
#   --name --cluster --project --zone  of the workload and its cluster
#   --tpu=TYPE      TPU type, as v6e-16, or
#   --gpu=TYPE      device type, as h100-mega-80gb-8, with --nodes
#   --slices=N      TPU slices (1)
#   --nodes=N       GPU nodes (1)
#   --image=IMAGE   built from launch/Dockerfile.tpu or launch/Dockerfile.gpu
#   --storage=NAME  shared file system attached with `xpk storage`; holds the workdir
#   --restarts=N    restarts before the workload fails (50)
#   --dry-run       print the command and run nothing
set -euo pipefail
# shellcheck source=launch/arguments.sh
. "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

parse "name= cluster= project= zone= tpu= gpu= slices= nodes= image= storage= restarts=" "$@"
need name cluster project zone image storage
check_program
tool xpk "pip install xpk"

if [[ -n ${OPTION[gpu]:-} ]]; then
  platform=gpu
  devices=(--device-type="${OPTION[gpu]}" --num-nodes="${OPTION[nodes]:-1}")
else
  need tpu
  platform=tpu
  devices=(--tpu-type="${OPTION[tpu]}" --num-slices="${OPTION[slices]:-1}")
fi
# 75 is how the others end when a process is gone; xpk itself restarts after 127-255, and
# not after 2, a mistake that the program has explained.
run xpk workload create --workload="${OPTION[name]}" --cluster="${OPTION[cluster]}" \
  --project="${OPTION[project]}" --zone="${OPTION[zone]}" "${devices[@]}" \
  --docker-image="${OPTION[image]}" --storage="${OPTION[storage]}" \
  --max-restarts="${OPTION[restarts]:-50}" --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=120 \
  --command="bash launch/run.sh --platform=$platform $(quoted "${PROGRAM[@]}")"
