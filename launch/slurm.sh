#!/usr/bin/env bash
# A run on GPU nodes of a Slurm cluster, from its login node.
#
#   launch/slurm.sh --nodes=2 --gpus=8 --time=24:00:00 \
#       --config=configs/quickstart.py --workdir=/shared/runs/mine
#
#   --nodes=N      nodes (1)
#   --gpus=N       GPUs a node (8); one task each
#   --cpus=N       cores a task (8)
#   --time=T       limit, as 24:00:00; the run saves before it and is queued again
#   --partition --account --constraint --qos --name  as sbatch has them
#   --dry-run      print the command and run nothing
#
# The repository and the workdir lie on a file system that every node sees; the
# environment (.venv, or $PYTHON) too.
set -euo pipefail
# shellcheck source=launch/arguments.sh
. "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

parse "nodes= gpus= cpus= time= partition= account= constraint= qos= name=" "$@"
check_program
tool sbatch "run this on a login node of the cluster"

gpus=${OPTION[gpus]:-8}
# All GPUs of a node stay visible to each task: JAX takes the one of its local rank.
submit=(
  sbatch --chdir="$REPOSITORY" --nodes="${OPTION[nodes]:-1}"
  --gpus-per-node="$gpus" --ntasks-per-node="$gpus" --cpus-per-task="${OPTION[cpus]:-8}"
)
for option in time partition account constraint qos; do
  if [[ -n ${OPTION[$option]:-} ]]; then submit+=("--$option=${OPTION[$option]}"); fi
done
if [[ -n ${OPTION[name]:-} ]]; then submit+=("--job-name=${OPTION[name]}"); fi
run "${submit[@]}" "$REPOSITORY/launch/slurm.sbatch" "${PROGRAM[@]}"
