#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster that has the JobSet controller.
#
#   launch/gke_jobset.sh --name=mine --image=IMAGE --tpu=tpu-v6e-slice --topology=4x4 \
#       --claim=shared --config=configs/quickstart.py --workdir=/mnt/shared/mine
#
#   --name=NAME       of the JobSet
#   --image=IMAGE     built from launch/Dockerfile.tpu
#   --tpu=LABEL       tpu-v5-lite-podslice, tpu-v5p-slice or tpu-v6e-slice
#   --topology=AxB    of one slice, or AxBxC
#   --chips=N         chips a host (4)
#   --slices=N        slices (1)
#   --claim=NAME      ReadWriteMany volume claim, mounted at /mnt/shared
#   --spot            on spot nodes
#   --restarts=N      restarts before the JobSet fails (50)
#   --namespace=NAME  (default)
#   --dry-run         print the command with its manifest and run nothing
set -euo pipefail
# shellcheck source=launch/arguments.sh
. "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

parse "name= image= tpu= topology= chips= slices= claim= spot restarts= namespace=" "$@"
need name image tpu topology claim
check_program
tool kubectl "the Kubernetes CLI"
whole 1 chips slices
whole 0 restarts
[[ ${OPTION[topology]} =~ ^[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}$ ]] ||
  fail "--topology=${OPTION[topology]} is not like 4x4 or 2x2x4"
[[ $(of_program workdir) == /mnt/shared/* ]] ||
  fail "--workdir=$(of_program workdir) is not below /mnt/shared, where the claim is"

chips=${OPTION[chips]:-4}
total=$((${OPTION[topology]//x/*}))
((total % chips == 0)) || fail "${OPTION[topology]} chips do not divide by --chips=$chips"

# A YAML flow sequence of double-quoted strings; " and \ are the two to escape.
sequence() {
  local text="" argument
  for argument in "$@"; do
    argument=${argument//\\/\\\\}
    text+=", \"${argument//\"/\\\"}\""
  done
  printf '%s' "${text#, }"
}

manifest() {
  local text
  text=$(cat "$REPOSITORY/launch/jobset.yaml")
  if [[ -z ${OPTION[spot]:-} ]]; then text=$(grep -v gke-spot <<<"$text"); fi
  fill NAME "${OPTION[name]}"
  fill NAMESPACE "${OPTION[namespace]:-default}"
  fill RESTARTS "${OPTION[restarts]:-50}"
  fill SLICES "${OPTION[slices]:-1}"
  fill HOSTS "$((total / chips))"
  fill CHIPS "$chips"
  fill TPU "${OPTION[tpu]}"
  fill TOPOLOGY "${OPTION[topology]}"
  fill IMAGE "${OPTION[image]}"
  fill CLAIM "${OPTION[claim]}"
  text=${text//'"@ARGS@"'/"$(sequence "${PROGRAM[@]}")"}
  printf '%s\n' "$text"
}

fill() {
  text=${text//"@$1@"/"$2"}
}

if [[ -n ${OPTION[dry-run]:-} ]]; then
  printf "kubectl apply -f - <<'EOF'\n%s\nEOF\n" "$(manifest)"
else
  manifest | kubectl apply -f -
fi
