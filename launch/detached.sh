#!/usr/bin/env bash
# The program on one host, in the background: no dropped connection ends it.
#
#   launch/detached.sh start ARGUMENTS  starts launch/run.sh with these
#   launch/detached.sh follow [LINES]   prints its log until it ends, and has its status
#   launch/detached.sh status           prints "ddrl_jax: running", "... ended STATUS"
#   launch/detached.sh stop             SIGTERM: returns when it has saved and ended
#
# tpu_pod.sh calls it on every worker. DETACHED (~/ddrl_jax.run) holds its log.
set -euo pipefail

state=${DETACHED:-$HOME/ddrl_jax.run}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$state"

is_running() {
  [[ -f $state/pid && ! -f $state/status ]] && kill -0 "$(cat "$state/pid")" 2>/dev/null
}

# What was killed with all around it, as by a reboot, has left no status.
status() {
  cat "$state/status" 2>/dev/null || echo 137
}

# Called by start, without a terminal.
supervise() {
  local code=0
  bash "$here/run.sh" "$@" &
  echo $! >"$state/pid"
  wait $! || code=$?
  echo "$code" >"$state/status.tmp"
  mv "$state/status.tmp" "$state/status"
}

start() {
  if is_running; then
    echo "detached.sh: error: it is running already" >&2
    exit 2
  fi
  rm -f "$state/pid" "$state/status"
  setsid bash "$here/detached.sh" supervise "$@" >"$state/log" 2>&1 </dev/null &
  until [[ -f $state/pid ]]; do sleep 0.1; done
}

follow() {
  if ! [[ -f $state/pid ]]; then
    echo "detached.sh: error: nothing was started" >&2
    exit 2
  fi
  tail -n "${1:-+1}" -f --pid="$(cat "$state/pid")" "$state/log"
  local look
  for look in 1 2 3 4 5; do
    [[ -f $state/status ]] || sleep "0.$look"
  done
  exit "$(status)"
}

stop() {
  local second
  is_running || return 0
  echo "stopping what still runs here, which saves first"
  kill -TERM "$(cat "$state/pid")" 2>/dev/null || true
  for ((second = 0; second < ${STOP_SECONDS:-180}; second++)); do
    is_running || return 0
    sleep 1
  done
  echo "it has not ended, and is killed"
  # with its supervisor, which is in the same session and so writes no status
  pkill -KILL -s "$(ps -o sid= -p "$(cat "$state/pid")" | tr -d ' ')"
  echo 137 >"$state/status"
}

case ${1:-} in
  start | supervise | follow | stop) "$@" ;;
  status)
    if is_running; then echo "ddrl_jax: running"; else echo "ddrl_jax: ended $(status)"; fi
    ;;
  *)
    sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
    [[ ${1:-} == --help ]] || exit 2
    ;;
esac
