# shellcheck shell=bash
# Sourced with a platform, `. launch/xla_flags.sh gpu|tpu|cpu`: the compiler's flags.
#
# What is set already in the environment comes after ours, so it wins. Sources: JAX's
# "GPU performance tips", NVIDIA JAX-Toolbox's "Tips for High-Performance LLMs with JAX
# and XLA", and for TPU the flags that the READMEs of MaxText and maxdiffusion give.

_tpu_flags=(
  # Overlap all-gathers of sharded weights with the matrix products around them.
  --xla_tpu_enable_async_collective_fusion=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true
  --xla_tpu_overlap_compute_collective_tc=true
  --xla_enable_async_all_gather=true
  # Overlap gradient all-reduces between slices (data-centre network) with compute.
  --xla_tpu_enable_data_parallel_all_reduce_opt=true
  --xla_tpu_data_parallel_opt_different_sized_ops=true
)

_gpu_flags=(
  # Moves collectives so that they overlap with compute; also part of O1.
  --xla_gpu_enable_latency_hiding_scheduler=true
  # JAX-Toolbox: under FSDP one collective should carry a layer's weights or more. 256
  # MiB are a block of 128 M parameters in bfloat16; XLA's own bound is about a tenth.
  --xla_gpu_all_gather_combine_threshold_bytes=268435456
  --xla_gpu_reduce_scatter_combine_threshold_bytes=268435456
  --xla_gpu_all_reduce_combine_threshold_bytes=268435456
)

# "9.0, NVIDIA H100 80GB HBM3", or nothing where there is no driver to ask.
_first_gpu() {
  command -v nvidia-smi >/dev/null || return 0
  nvidia-smi --query-gpu=compute_cap,name --format=csv,noheader 2>/dev/null |
    sed -n 1p || true
}

case ${1:-} in
  gpu)
    # O1: latency-hiding scheduler, pipelined collectives, double-buffered loops.
    export JAX_OPTIMIZATION_LEVEL=${JAX_OPTIMIZATION_LEVEL:-O1}
    # Leaves a tenth of the memory to NCCL, cuDNN and cuBLAS; JAX's default is a quarter.
    export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
    export XLA_FLAGS="${_gpu_flags[*]}${XLA_FLAGS:+ $XLA_FLAGS}"
    case $(_first_gpu) in
      9.0,*)
        # JAX-Toolbox: one queue keeps collectives in the scheduler's order on Hopper;
        # on Blackwell it is slower.
        export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
        ;;&
      9.0,*PCIe | 9.0,*NVL) ;; # no NVSwitch
      9.0,*)
        # Reductions in the switches of NVLink 4.
        export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-1}
        ;;
    esac
    ;;
  tpu)
    export LIBTPU_INIT_ARGS="${_tpu_flags[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
    ;;
  cpu) ;;
  *)
    echo "xla_flags.sh: error: platform ${1:-(none)} is not gpu, tpu or cpu" >&2
    return 2
    ;;
esac
unset _tpu_flags _gpu_flags
unset -f _first_gpu
