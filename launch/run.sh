#!/usr/bin/env bash
# Runs the program on one host of a job; the launchers call it on every host.
#
#   launch/run.sh --platform=gpu --config=configs/quickstart.py --workdir=/shared/run
#
#   --platform=gpu|tpu|cpu  whose compiler flags to set (launch/xla_flags.sh)
#   --no-flags              leave the compiler's flags as they are
#   --dry-run               print what would run
#
# Everything else goes to python -m ddrl_jax.main. The compile cache lies beside the
# workdir, so that a restart on new machines compiles nothing again. Exit status: the
# program's, but 143 where a notice of preemption (SIGTERM) ended it, which tells a
# scheduler to start it again; the same command goes on from the last checkpoint.
set -euo pipefail
# shellcheck source=launch/arguments.sh
. "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

parse "platform= no-flags" "$@"
need platform
check_program
workdir=$(of_program workdir)
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(dirname "$workdir")/compile_cache}
if [[ -z ${OPTION[no-flags]:-} ]]; then
  # shellcheck source=launch/xla_flags.sh
  . "$REPOSITORY/launch/xla_flags.sh" "${OPTION[platform]}"
fi

cd "$REPOSITORY"
python=${PYTHON:-python3}
[[ -z ${PYTHON:-} && -x .venv/bin/python ]] && python=.venv/bin/python
if [[ -n ${OPTION[dry-run]:-} ]]; then
  for name in JAX_COMPILATION_CACHE_DIR JAX_OPTIMIZATION_LEVEL \
    XLA_PYTHON_CLIENT_MEM_FRACTION XLA_FLAGS LIBTPU_INIT_ARGS; do
    [[ -z ${!name:-} ]] || echo "export $name=$(quoted "${!name}")"
  done
  run "$python" -m ddrl_jax.main "${PROGRAM[@]}"
  exit 0
fi

"$python" -m ddrl_jax.main "${PROGRAM[@]}" &
child=$!
noticed=
trap 'noticed=1; kill -TERM "$child" 2>/dev/null || true' TERM INT
# A signal ends `wait` early, so it is repeated until the program itself has ended.
wait "$child" || true
while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
status=0
wait "$child" || status=$?
[[ $status == 0 && -n $noticed ]] && status=143
exit "$status"
