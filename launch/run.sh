#!/usr/bin/env bash
# Runs the program on one host of a job; the launchers call it on every host.
#
#   launch/run.sh --platform=gpu --config=configs/quickstart.py --workdir=/shared/run
#
#   --platform=gpu|tpu|cpu  where to run: nowhere else, and with whose compiler flags
#                           (launch/xla_flags.sh)
#   --no-flags              leave the compiler's flags as they are
#   --dry-run               print what would run
#
# Everything else goes to python -m ddrl_jax.main. Caches lie beside the workdir unless
# they are set: a restart on new machines compiles nothing again, and neither downloads
# weights nor encodes its data again. Exit status: the program's (2 for a mistake that it
# explains, 75 where another process of the run is gone), but 143 where a notice of
# preemption (SIGTERM) ended it. 75 and 143 tell a scheduler to start it again; the same
# command goes on from the last checkpoint.
set -euo pipefail
# shellcheck source=launch/arguments.sh
. "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

parse "platform= no-flags" "$@"
need platform
check_program
shared=$(dirname "$(workdir_of_program)")
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$shared/compile_cache}
# Not HF_HOME, where a login's token lies.
[[ -n ${HF_HOME:-} ]] || export HF_HUB_CACHE=${HF_HUB_CACHE:-$shared/huggingface}
config=$(of_program config)
if [[ -z $(of_program config.data.cache) ]] &&
  ! grep -q 'data\.cache\b' "$REPOSITORY/${config%%:*}"; then
  PROGRAM+=("--config.data.cache=$shared/data_cache")
fi

# The program refuses any other platform than the first: no silent run on the CPU.
case ${OPTION[platform]} in
  gpu) platforms=cuda,cpu ;;
  tpu) platforms=tpu,cpu ;;
  cpu) platforms=cpu ;;
  *) fail "--platform=${OPTION[platform]} is not gpu, tpu or cpu" ;;
esac
export JAX_PLATFORMS=${JAX_PLATFORMS:-$platforms}
if [[ -z ${OPTION[no-flags]:-} ]]; then
  # shellcheck source=launch/xla_flags.sh
  . "$REPOSITORY/launch/xla_flags.sh" "${OPTION[platform]}"
fi

# xpk tells each node of a GPU workload its place by these names; on TPU and Slurm the
# program finds it by itself.
if [[ -n ${JAX_COORDINATOR_ADDRESS:-} && -n ${NNODES:-} && -n ${NODE_RANK:-} ]]; then
  coordinator=$JAX_COORDINATOR_ADDRESS
  [[ $coordinator == *:* ]] || coordinator+=:${JAX_COORDINATOR_PORT:-6002}
  export DDRL_COORDINATOR=${DDRL_COORDINATOR:-$coordinator}
  export DDRL_PROCESSES=${DDRL_PROCESSES:-$NNODES}
  export DDRL_PROCESS=${DDRL_PROCESS:-$NODE_RANK}
fi

cd "$REPOSITORY"
python=${PYTHON:-python3}
[[ -z ${PYTHON:-} && -x .venv/bin/python ]] && python=.venv/bin/python
if [[ -n ${OPTION[dry-run]:-} ]]; then
  for name in JAX_PLATFORMS JAX_COMPILATION_CACHE_DIR HF_HUB_CACHE \
    JAX_OPTIMIZATION_LEVEL XLA_PYTHON_CLIENT_MEM_FRACTION XLA_FLAGS LIBTPU_INIT_ARGS \
    CUDA_DEVICE_MAX_CONNECTIONS NCCL_NVLS_ENABLE \
    DDRL_COORDINATOR DDRL_PROCESSES DDRL_PROCESS; do
    [[ -z ${!name:-} ]] || echo "export $name=$(quoted "${!name}")"
  done
  run "$python" -m ddrl_jax.main "${PROGRAM[@]}"
  exit 0
fi

# The trap comes first: a notice that arrives while the program starts is not lost.
child='' noticed=''
trap 'noticed=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT
"$python" -m ddrl_jax.main "${PROGRAM[@]}" &
child=$!
[[ -z $noticed ]] || kill -TERM "$child" 2>/dev/null || true
# A signal ends `wait` early, so it is repeated until the program itself has ended.
wait "$child" || true
while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
status=0
wait "$child" || status=$?
[[ $status == 0 && -n $noticed ]] && status=143
exit "$status"
