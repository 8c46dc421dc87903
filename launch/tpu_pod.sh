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
#   --restarts=N      after a worker failed on a healthy slice (3)
#   --keep            leave the slice running at the end
#   --dry-run         print the commands and run none
#
# Requests the slice, waits for it, copies the commit HEAD to all workers, and runs the
# program on all of them, in the background there: a dropped connection ends nothing. A
# preempted slice is deleted, requested again, and the run goes on from its last
# checkpoint. Keep this command alive (tmux); it is safe to start again: a slice that is
# there is used, and what still runs on it is stopped first, with a checkpoint.
set -euo pipefail
# shellcheck source=launch/arguments.sh
. "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

parse "name= project= zone= type= spot runtime= nfs= attempts= restarts= keep" "$@"
need name project zone type
check_program
whole 1 attempts
whole 0 restarts
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
tries=${SSH_TRIES:-20}
requests=${REQUEST_TRIES:-120}
queue=(gcloud compute tpus queued-resources)
node=(gcloud compute tpus tpu-vm)
program=(--platform=tpu "${PROGRAM[@]}")

# What is shipped is the commit, not the files as they lie here.
check_commit() {
  local config changed
  config=$(of_program config)
  if ! git -C "$REPOSITORY" rev-parse -q --verify HEAD >/dev/null 2>&1; then
    [[ -n ${OPTION[dry-run]:-} ]] && return
    fail "$REPOSITORY is no git repository with a commit, which is what is shipped"
  fi
  git -C "$REPOSITORY" cat-file -e "HEAD:${config%%:*}" 2>/dev/null ||
    fail "${config%%:*} is not in the commit HEAD, which is what is shipped; commit it"
  changed=$(git -C "$REPOSITORY" status --porcelain)
  [[ -z $changed ]] ||
    echo "tpu_pod.sh: warning: the commit HEAD is shipped, without what has changed since" >&2
}

# Sets STATE to what the cloud says, ABSENT where it knows of none. No answer (an expired
# login, no network) is none: nothing may be deleted for it.
look() {
  local answer try
  for ((try = 1; try <= 20; try++)); do
    if answer=$("$@" 2>&1); then
      STATE=${answer##*$'\n'}
      return
    fi
    if [[ $answer == *NOT_FOUND* ]]; then
      STATE=ABSENT
      return
    fi
    echo "$name: gcloud does not answer, trying again: ${answer##*$'\n'}" >&2
    sleep "$pause"
  done
  fail "gcloud did not answer 20 times; the slice $name is left as it is"
}

look_at_slice() {
  look "${queue[@]}" describe "$name" "${where[@]}" '--format=value(state.state)'
}

look_at_node() {
  look "${node[@]}" describe "$name" "${where[@]}" '--format=value(state)'
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
  while look_at_slice && [[ $STATE != ACTIVE ]]; do
    case $STATE in
      FAILED | SUSPENDED | ABSENT) return 1 ;;
      *) echo "$(date -u +%H:%M:%S) $name: $STATE" && sleep "$pause" ;;
    esac
  done
}

on_all() {
  run "${node[@]}" ssh "$name" "${where[@]}" --worker=all --command="$1"
}

# TPU VMs come with an older Python than the program needs; uv brings its own. What an
# earlier call has left running is stopped first: it holds the chips and the workdir.
prepare() {
  local mount=true apt="sudo apt-get -qy -o DPkg::Lock::Timeout=300"
  if [[ -n ${OPTION[nfs]:-} ]]; then
    mount="mountpoint -q /mnt/shared || { $apt update && $apt install nfs-common"
    mount+=" && sudo mkdir -p /mnt/shared && sudo mount $(quoted "${OPTION[nfs]}") /mnt/shared; }"
    # a new Filestore share is root's alone
    mount+="; [ -w /mnt/shared ] || sudo chmod 1777 /mnt/shared"
  fi
  run git -C "$REPOSITORY" archive --format=tar.gz --output="$archive" HEAD &&
    run "${node[@]}" scp "$archive" "$name:ddrl_jax.tar.gz" "${where[@]}" --worker=all &&
    on_all "set -e; ! [ -f ddrl_jax/launch/detached.sh ] || bash ddrl_jax/launch/detached.sh stop;\
 $mount; mkdir -p ddrl_jax; tar -xzf ddrl_jax.tar.gz -C ddrl_jax; cd ddrl_jax;\
 command -v uv || curl -LsSf https://astral.sh/uv/install.sh | sh;\
 export PATH=\$HOME/.local/bin:\$PATH; [ -d .venv ] || uv venv --python 3.11 .venv;\
 uv pip install --quiet --python .venv/bin/python -c launch/constraints.txt -e '.[tpu]'"
}

detached() {
  on_all "bash ddrl_jax/launch/detached.sh $(quoted "$@")"
}

# Follows the program through dropped connections; fails when it has. Workers that do
# not answer at all, SSH_TRIES times in turn, on a slice that is said to be well are no
# dropped connection: a key that has expired, a firewall.
attend() {
  local lines=+1 states silent=0
  until detached follow "$lines"; do
    healthy || return 1
    states=$(detached status | grep '^ddrl_jax: ') || states=""
    case $states in
      "") silent=$((silent + 1)) ;;
      *running*) silent=0 ;;
      *)
        judge "$states"
        return
        ;;
    esac
    ((silent < tries)) || abandon
    echo "$name: the connection was lost; attaching again" >&2
    lines=20
  done
}

abandon() {
  echo "$name: the workers did not answer $tries times; the slice and the program on it are" \
    "left as they are. Once gcloud compute tpus tpu-vm ssh works, start this again" >&2
  exit 1
}

# 0 where all have ended well. 2 is a mistake that the program has explained; the others
# end with 75 where one is gone.
judge() {
  if ! grep -qv ' ended 0$' <<<"$1"; then return 0; fi
  if grep -q ' ended 2$' <<<"$1"; then
    echo "$name: the program failed on a healthy slice, which is left as it is" >&2
    exit 1
  fi
  return 1
}

# A slice that is being taken away says so only after a while.
healthy() {
  local turn
  for turn in 1 2 3 4; do
    look_at_slice && [[ $STATE == ACTIVE ]] || return 1
    look_at_node && [[ $STATE == READY ]] || return 1
    ((turn == 4)) || sleep "$pause"
  done
}

finish() {
  if [[ -z ${OPTION[keep]:-} ]]; then delete; fi
}

# Returns when the slice is gone.
use_slice() {
  local restarts=${OPTION[restarts]:-3} turn
  for ((turn = 0; turn <= restarts; turn++)); do
    if prepare && detached start "${program[@]}" && attend; then
      finish
      exit 0
    fi
    healthy || return 0
    echo "$name: a worker failed on a healthy slice ($((turn + 1)) of $((restarts + 1)))" >&2
  done
  echo "$name: the slice is left as it is; ~/ddrl_jax.run/log on its workers says more" >&2
  exit 1
}

check_commit
if [[ -n ${OPTION[dry-run]:-} ]]; then
  request
  await
  prepare
  detached start "${program[@]}"
  remark "again after each dropped connection:"
  detached follow +1
  remark "after a preemption the slice is deleted, and all of the above is repeated;"
  remark "at the end, unless --keep is given:"
  finish
  exit 0
fi

# A request that was refused (quota, an error of the service) or came to nothing uses up no
# slice, and is repeated after a while.
not_granted() {
  refused=$((refused + 1))
  ((refused < requests)) || fail "$requests requests in turn were not granted"
  echo "$name: was not granted; asking again" >&2
  sleep "$pause"
}

attempts=${OPTION[attempts]:-20} lost=0 refused=0
while ((lost < attempts)); do
  look_at_slice
  if [[ $STATE == ABSENT ]] && ! request; then
    not_granted
    continue
  fi
  if await; then
    refused=0
    use_slice
    lost=$((lost + 1))
    echo "$name: the slice is gone ($lost of $attempts); asking for another" >&2
  else
    not_granted
  fi
  look_at_slice
  [[ $STATE == ABSENT ]] || delete || echo "$name: could not be deleted yet" >&2
done
fail "--attempts=$attempts slices were lost"
