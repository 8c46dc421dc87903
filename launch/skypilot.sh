#!/usr/bin/env bash
# A run on one machine of spot GPUs, of any cloud that SkyPilot has credentials for.
#
#   launch/skypilot.sh --name=mine --bucket=my-runs --gpus=H100:8 \
#       --config=configs/quickstart.py --workdir=/mnt/shared/mine
#
#   --name=NAME      of the managed job
#   --bucket=BUCKET  mounted at /mnt/shared; created where it does not exist
#   --gpus=TYPE:N    accelerators (H100:8)
#   --cuda=12|13     CUDA of JAX's wheels (13, whose driver is 580 or later)
#   --infra=WHERE    as aws, gcp/us-central1, k8s (wherever it is cheapest)
#   --on-demand      no spot machine
#   --dry-run        print the command and run nothing
#
# A preempted machine is replaced, and the run goes on from its last checkpoint that is
# whole: the bucket is written behind a local cache, so the newest one may have got
# there in part, and --config.checkpoint.resume=last_good passes over it. One machine:
# several of them would not see each other's files in time.
set -euo pipefail
# shellcheck source=launch/arguments.sh
. "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

parse "name= bucket= gpus= cuda= infra= on-demand" "$@"
need name bucket
check_program
tool sky "pip install skypilot"
[[ $(of_program workdir) == /mnt/shared/* ]] ||
  fail "--workdir=$(of_program workdir) is not below /mnt/shared, where the bucket is"
case ${OPTION[cuda]:-13} in
  12) extra=gpu-cuda12 ;;
  13) extra=gpu ;;
  *) fail "--cuda=${OPTION[cuda]} is not 12 or 13" ;;
esac
[[ -n $(of_program config.checkpoint.resume) ]] ||
  PROGRAM+=(--config.checkpoint.resume=last_good)

launch=(
  sky jobs launch --yes --name="${OPTION[name]}" --gpus="${OPTION[gpus]:-H100:8}"
  --env="BUCKET=${OPTION[bucket]}" --env="EXTRA=$extra"
  --env="ARGUMENTS=$(quoted "${PROGRAM[@]}")"
)
if [[ -n ${OPTION[infra]:-} ]]; then launch+=("--infra=${OPTION[infra]}"); fi
if [[ -n ${OPTION[on-demand]:-} ]]; then launch+=(--no-use-spot); fi
cd "$REPOSITORY"
run "${launch[@]}" launch/skypilot.yaml
