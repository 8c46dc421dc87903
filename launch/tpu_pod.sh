#!/usr/bin/env bash
# A run on a Cloud TPU pod slice, from request to end, through preemptions.
#
#   launch/tpu_pod.sh --name=mine --project=P --zone=us-east5-a --type=v5p-64 --spot \
#       --config=configs/quickstart.py --workdir=/mnt/shared/mine --nfs=10.0.0.2:/share
#
#   --name=NAME       of the queued resource and its node
#   --project --zone  where
#   --type=TYPE       accelerator type, as v5litepod-16, v5p-64, v6e-16
#   --spot            may be preempted, and is requested again when it is
#   --runtime=NAME    software version; by default the one for the type
#   --nfs=HOST:/PATH  shared file system (Filestore), mounted at /mnt/shared on each host
#   --attempts=N      slices to use up before giving up (20)
#   --keep            leave the slice running at the end
#   --dry-run         print the commands and run none
#
# Requests the slice, waits for it, copies the commit HEAD to all workers, and runs the
# program on all of them. A preempted slice is deleted, requested again, and the run
# goes on from its last checkpoint. Keep this command alive (tmux); it is safe to
# start again: a slice that is there is used.
set -euo pipefail
# shellcheck source=launch/arguments.sh
. "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

parse "name= project= zone= type= spot runtime= nfs= attempts= keep" "$@"
need name project zone type
check_program
tool gcloud "the Google Cloud CLI"
tool git "needed to pack the commit"

name=${OPTION[name]}
where=("--project=${OPTION[project]}" "--zone=${OPTION[zone]}")
case ${OPTION[type]} in
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *) need runtime ;;
esac
runtime=${OPTION[runtime]:-$runtime}
archive=/tmp/ddrl_jax-$name.tar.gz
pause=${POLL_SECONDS:-30}
queue=(gcloud compute tpus queued-resources)
node=(gcloud compute tpus tpu-vm)

state_of_slice() {
  "${queue[@]}" describe "$name" "${where[@]}" --format='value(state.state)' 2>/dev/null ||
    echo ABSENT
}

state_of_node() {
  "${node[@]}" describe "$name" "${where[@]}" --format='value(state)' 2>/dev/null ||
    echo ABSENT
}

request() {
  run "${queue[@]}" create "$name" --node-id="$name" "${where[@]}" \
    --accelerator-type="${OPTION[type]}" --runtime-version="$runtime" \
    ${OPTION[spot]:+--spot}
}

delete() {
  run "${queue[@]}" delete "$name" "${where[@]}" --force --quiet
}

await() {
  if [[ -n ${OPTION[dry-run]:-} ]]; then
    remark "repeated until it says ACTIVE:"
    run "${queue[@]}" describe "$name" "${where[@]}" '--format=value(state.state)'
    return
  fi
  local state
  while state=$(state_of_slice) && [[ $state != ACTIVE ]]; do
    case $state in
      FAILED | SUSPENDED | ABSENT) return 1 ;;
      *) echo "$(date -u +%H:%M:%S) $name: $state" && sleep "$pause" ;;
    esac
  done
}

on_all() {
  run "${node[@]}" ssh "$name" "${where[@]}" --worker=all --command="$1"
}

# TPU VMs come with an older Python than the program needs; uv brings its own.
prepare() {
  local mount=true
  if [[ -n ${OPTION[nfs]:-} ]]; then
    mount="{ mountpoint -q /mnt/shared || { sudo apt-get install -qy nfs-common &&"
    mount+=" sudo mkdir -p /mnt/shared && sudo mount $(quoted "${OPTION[nfs]}") /mnt/shared; }; }"
  fi
  run git -C "$REPOSITORY" archive --format=tar.gz --output="$archive" HEAD &&
    run "${node[@]}" scp "$archive" "$name:ddrl_jax.tar.gz" "${where[@]}" --worker=all &&
    on_all "set -e; $mount; mkdir -p ddrl_jax; tar -xzf ddrl_jax.tar.gz -C ddrl_jax; cd ddrl_jax;\
 command -v uv || curl -LsSf https://astral.sh/uv/install.sh | sh;\
 export PATH=\$HOME/.local/bin:\$PATH; [ -d .venv ] || uv venv --python 3.11 .venv;\
 uv pip install --quiet --python .venv/bin/python \
 -c launch/constraints.txt -e '.[tpu]'"
}

train() {
  on_all "cd ddrl_jax && bash launch/run.sh --platform=tpu $(quoted "${PROGRAM[@]}")"
}

# A slice that is being taken away says so only after a while.
healthy() {
  local look
  for look in 1 2 3 4; do
    [[ $(state_of_slice) == ACTIVE && $(state_of_node) == READY ]] || return 1
    ((look == 4)) || sleep "$pause"
  done
}

finish() {
  if [[ -z ${OPTION[keep]:-} ]]; then delete; fi
}

if [[ -n ${OPTION[dry-run]:-} ]]; then
  request
  await
  prepare
  train
  remark "after a preemption the slice is deleted, and all of the above is repeated;"
  remark "at the end, unless --keep is given:"
  finish
  exit 0
fi

for ((attempt = 1; attempt <= ${OPTION[attempts]:-20}; attempt++)); do
  [[ $(state_of_slice) != ABSENT ]] || request
  if await && prepare && train; then
    finish
    exit 0
  fi
  if healthy; then
    echo "$name: the program failed on a healthy slice, which is left as it is" >&2
    exit 1
  fi
  echo "$name: the slice is gone (attempt $attempt); asking for another" >&2
  delete
done
fail "--attempts=${OPTION[attempts]:-20} slices were lost"
