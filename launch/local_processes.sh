#!/usr/bin/env bash
# Several processes of one run on this machine, each with its own CPU devices.
#
#   launch/local_processes.sh [--dry-run] PROCESSES DEVICES_EACH -- ARGUMENTS
#
# ARGUMENTS are those of `python -m ddrl_jax.main`. SIGTERM and SIGINT tell every process
# to save and end; the exit status is the first one that is not 0. PYTHON names the
# interpreter (.venv/bin/python if it is there, else python3), PORT the port of process 0
# (a free one).
set -u

usage() {
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

dry=
[ "${1-}" = --dry-run ] && dry=yes && shift
[ $# -ge 4 ] && [ "$3" = -- ] || usage
count=$1 devices=$2
case "$count$devices" in *[!0-9]* | 0*) usage ;; esac
[ "$devices" -gt 0 ] || usage
shift 3

python=${PYTHON:-python3}
[ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ] && python=.venv/bin/python
free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
port=${PORT:-}
if [ -z "$port" ]; then
  [ "$dry" ] && port=PORT || port=$("$python" -c "$free_port") || exit 1
fi
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices

pids=()
# shellcheck disable=SC2317,SC2329 # called by the trap
hand_on() {
  told=yes stop=yes
  kill -s TERM "${pids[@]}" 2>/dev/null
}
# A terminal sends its INT to every process of the group itself, and a second one means
# "do not save": what is handed on is TERM, of which any number means the same.
stop=
trap hand_on TERM INT

for ((i = 0; i < count; i++)); do
  command=("$python" -m ddrl_jax.main "$@"
    "--distributed.coordinator=127.0.0.1:$port"
    "--distributed.processes=$count" "--distributed.process=$i")
  if [ "$dry" ]; then
    printf 'JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=%s' "$devices"
    printf ' %q' "${command[@]}"
    echo
    continue
  fi
  "${command[@]}" &
  pids+=($!)
done
[ "$dry" ] && exit 0
[ "$stop" ] && hand_on # to those that were started after it, too

status=0
for pid in "${pids[@]}"; do
  # a trapped signal ends `wait` early; the shell keeps the status of what has ended
  while
    told=
    wait "$pid"
    code=$?
    [ "$told" ]
  do :; done
  [ "$status" -eq 0 ] && status=$code
done
exit "$status"
