# What the steps of a workflow call, on any node: `writesae ARGUMENTS`, and `share N ARGUMENTS` for N processes that
# share the work. PYTHON is the interpreter that called Snakemake.

writesae() {
    on_free_gpu "$PYTHON" -m writesae "$@"
}

share() {
    local n=$1
    shift
    if ((n > 1)); then
        "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$n" -m writesae "$@"
    else
        writesae "$@"
    fi
}

# Of the GPUs of a machine each step has the first that no other step of the run has locked; the lock goes with the
# step. Where CUDA_VISIBLE_DEVICES is there, the scheduler of a cluster or --device has chosen.
on_free_gpu() {
    local gpu gpus
    if [[ -z ${CUDA_VISIBLE_DEVICES+chosen} ]] && gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null); then
        mkdir -p .snakemake
        for gpu in $gpus; do
            exec 9>".snakemake/gpu-$gpu"
            if flock --nonblock 9; then
                CUDA_VISIBLE_DEVICES=$gpu "$@"
                return
            fi
        done
    fi
    "$@"
}
