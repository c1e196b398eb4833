#!/usr/bin/env bash
# Tests and measures the CUDA kernels on device 0, from a folder that scripts/bundle.sh made. Needs an NVIDIA driver only; takes
# compute-sanitizer from PATH or the CUDA toolkit, cuBLASLt from LD_LIBRARY_PATH or PyTorch's packages, and torch, timm, peft and
# pytest from python3, where they are.
#
#     ./run.sh                    all parts, in less than 10 minutes
#     ./run.sh device sweep       only these, in this order; one alone may take all of the time
#
#     hopper       probes of a Hopper GPU, which decide the design of kernels
#     device       device tests: those of family sm90 first, each a process of its own, smallest first; then all others
#     sanitizer    compute-sanitizer's four tools on one small test of each kernel of sm90
#     sweep        every variant of the kernels of sm90, and the layers of a ViT-B by each family, beside cuBLASLt's GEMM
#     step         a training step of a ViT-B beside PyTorch and PEFT; bf16 first
#     profile      where the time goes: Nsight Compute on each shipped kernel of sm90, the kernels of a step; not among `all parts`
#     rest         other benchmarks, layers beside PyTorch, tests of the PyTorch package
#
# PACE_SECONDS is the time for everything (570), SANITIZER_TESTS the tests of `sanitizer`. What each step prints goes to a file of its
# own in results/ (or $OUT) as it comes; figures are there as JSON too. A step that takes too long is killed, and one that cannot be
# killed, because the driver waits for its kernel, is left behind; either way the next one goes on. A table of the steps comes last.
set -uo pipefail
cd "$(dirname "$0")" || exit 1

# A part and its seconds, where there are others.
declare -A part_seconds=([hopper]=100 [device]=110 [sanitizer]=90 [sweep]=120 [step]=150 [rest]=300 [profile]=120)
parts=("$@")
[ $# -gt 0 ] || parts=(hopper device sanitizer sweep step rest)
for part in "${parts[@]}"; do
    [ -n "${part_seconds[$part]:-}" ] || { echo "run.sh: no part $part among hopper device sanitizer sweep step rest profile" >&2; exit 2; }
done
deadline=$((SECONDS + ${PACE_SECONDS:-570}))

results="${OUT:-results}"
mkdir -p "$results"
results="$(cd "$results" && pwd)"
table="$results/steps.tsv"
touch "$table"
earlier=$(wc -l <"$table")
failed=0

# note NAME STATUS SECONDS: a line of the table
note() {
    printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$table"
    echo "-- $1: $2, $3 s"
    case "$2" in ok* | skipped* | ignored*) ;; *) failed=$((failed + 1)) ;; esac
}

# Seconds that are left to the current part.
left() {
    echo $((part_end < deadline ? part_end - SECONDS : deadline - SECONDS))
}

# step LIMIT NAME COMMAND...: runs it for so many seconds at most
step() {
    local limit="$1" name="$2" file process begin=$SECONDS status=0 word
    shift 2
    file="$results/$name.txt"
    [ "$limit" -le "$(left)" ] || limit=$(left)
    if [ "$limit" -lt 5 ]; then
        note "$name" "skipped: no time left" 0
        return
    fi
    {
        echo "== $name"
        echo "date: $(date -u +%FT%TZ)"
        echo "device: ${device:-nvidia-smi names none}"
        echo "command: $*"
    } >"$file"
    # Not in a pipe: whoever reads that would wait for a process that cannot be killed.
    timeout -k 5 "$limit" "$@" >>"$file" 2>&1 </dev/null &
    process=$!
    while kill -0 $process 2>/dev/null && [ $((SECONDS - begin)) -lt $((limit + 8)) ]; do
        sleep 0.1
    done
    if kill -0 $process 2>/dev/null; then
        word="HANGS: left behind"
        disown $process
    else
        wait $process 2>/dev/null || status=$?
        case $status in
            0) word=ok ;;
            124 | 137) word="TIMEOUT: $limit s" ;;
            *) word="FAILED: status $status" ;;
        esac
    fi
    # A test program that runs nothing is content too.
    if [ "$word" = ok ] && grep -Eq '^test result: ok\. 0 passed; .* [1-9][0-9]* ignored' "$file"; then
        word="ignored: all of it"
    elif [ "$word" = ok ] && grep -Eq '^test result: ok\. 0 passed' "$file"; then
        word="FAILED: no such test"
    fi
    case "$word" in
        ok* | ignored*) ;;
        *) tail -n +5 "$file" | tail -n 20 | cut -c1-300 ;;
    esac
    note "$name" "$word" $((SECONDS - begin))
}

declare -A imports
# pytorch MODULES LIMIT NAME COMMAND...: a step, if python3 has the modules
pytorch() {
    local modules="$1" limit="$2" name="$3"
    shift 3
    if [ -z "${imports[$modules]:-}" ]; then
        imports[$modules]=no
        timeout -k 5 60 python3 -c "import $modules" >/dev/null 2>&1 && imports[$modules]=yes
    fi
    if [ "${imports[$modules]}" = yes ]; then
        step "$limit" "$name" "$@"
    else
        note "$name" "skipped: python3 cannot import $modules" 0
    fi
}

# peers LIMIT NAME ARGUMENT...: peers.py, which ends by itself before it would be killed, and keeps what it has
peers() {
    local limit="$1" name="$2"
    shift 2
    [ "$limit" -le "$(left)" ] || limit=$(left)
    pytorch "torch, timm, numpy" "$limit" "$name" python3 repository/benches/peers/peers.py --device cuda \
        --seconds $((limit > 40 ? limit - 20 : limit / 2)) --out "$results/$name.json" "$@"
}

# bench LIMIT NAME REGEX [VARIABLE=VALUE...]: those benchmarks
bench() {
    local limit="$1" name="$2" filter="$3"
    shift 3
    step "$limit" "$name" env "$@" CRITERION_HOME="$results/criterion" PACE_BENCH_JSON="$results/$name.json" \
        ./bench_cuda --bench --warm-up-time 0.05 --measurement-time 0.15 --nresamples 1000 "$filter"
}

hopper() {
    case "$capability" in
        9.0) step 120 hopper env OUT="$results/hopper" ./hopper/run.sh ;;
        *) note hopper "skipped: no device of compute capability 9.0" 0 ;;
    esac
}

device() {
    local tests test first='low_rank_linear::one_gradient low_rank_linear::batch_split noisy_linear::batch_split lora_mul_linear::bf16'
    # Smallest first.
    tests="$(timeout -k 5 20 ./test_cuda --list device::sm90:: 2>/dev/null | sed -n 's/^device::sm90::\(.*\): test$/\1/p')"
    tests="$({ tr ' ' '\n' <<<"$first"; echo "$tests"; } | awk 'NF && !seen[$0]++')"
    for test in $tests; do
        step 25 "device_sm90_${test//::/_}" ./test_cuda --test-threads=1 --exact "device::sm90::$test"
    done
    step 60 device_others ./test_cuda device:: --skip device::sm90::
}

sanitizer() {
    # Forward and gradients of the low-rank layer; the dense one exact, folded and backward. Other operators are made of these kernels.
    local program tool test tests='low_rank_linear::batch_split low_rank_linear::one_gradient noisy_linear::batch_split'
    program="$(PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin:/usr/local/cuda/bin" command -v compute-sanitizer)" || {
        note sanitizer "skipped: no compute-sanitizer" 0
        return
    }
    for tool in memcheck synccheck racecheck initcheck; do
        for test in ${SANITIZER_TESTS:-$tests}; do
            step 40 "${tool}_${test//::/_}" "$program" --tool "$tool" --error-exitcode 1 --print-limit 20 \
                ./test_cuda --test-threads=1 --exact "device::sm90::$test"
        done
    done
}

# What chooses constants and families. First every variant of the kernels of sm90, then every bf16 layer by one family after the other,
# through the crate. A family that does not take a layer leaves it to another, under its own name. The GEMM of cuBLASLt is measured
# in each process again, so that both have the same clock and temperature.
sweep() {
    local family
    case "$capability" in
        9.0) step 90 sweep_variants env OUT="$results/hopper" LIMIT=80 ./hopper/run.sh sweep ;;
        *) note sweep_variants "skipped: no device of compute capability 9.0" 0 ;;
    esac
    for family in sm90 cublaslt sm80; do
        bench 60 "sweep_$family" "copy|cuBLASLt product|_linear .*/$family bf16" PACE_BENCH_FAMILY=$family
    done
}

# A family that PACE_FAMILY forces is part of the name.
step_number=0
step_of() {
    peers "$1" "peers_$((++step_number))_$3_$4${PACE_FAMILY:+_$PACE_FAMILY}" --shapes "$2" --operators "$3" --dtypes "$4" --rounds "$5" "${@:6}"
}

training_step() {
    local operator plain='eager|PyTorch|as a graph|rows'
    # A compilation takes half a minute, and a peer is compiled for given and for drawn noise: what needs none comes first.
    for operator in step_lora_mul_vpt step_lora_add; do
        step_of 50 vit_b_step $operator bf16 11 --peers "$plain"
    done
    for operator in step_lora_mul_vpt step_lora_add; do
        step_of 130 vit_b_step $operator bf16 11 --peers 'official, torch.compile|as a graph'
    done
    for operator in step_lora_mul_vpt step_lora_add; do
        step_of 200 vit_b_step $operator bf16 11 --peers 'compiled|reduce|as a graph'
    done
    for operator in step_lora_mul_vpt step_lora_add; do
        step_of 50 vit_b_step $operator tf32 5 --peers "$plain"
    done
    step_of 90 vit_b_step step_lora_mul_vpt f32 3 --peers "$plain"
}

rest() {
    bench 60 bench "copy|noise_fill|epilogue|loss|drop_path|_weight|prompt_bias|merge|norm|distance"
    peers 90 peers_layers --shapes vit_b_proj,vit_b_fc1,vit_b_fc2 --dtypes bf16 --rounds 11
    pytorch "torch, timm, safetensors, pytest" 90 pytorch python3 -m pytest -q -rs repository/python/tests/test_cuda.py
    peers 60 peers_loss --shapes loss_100,loss_1000,loss_32768 --dtypes bf16 --rounds 11
    peers 90 peers_autocast --shapes vit_b_autocast --dtypes bf16 --rounds 5 --peers 'eager|PyTorch|as a graph|rows'
    pytorch "torch, numpy" 60 effective_weights python3 repository/benches/peers/effective_weights.py
    pytorch "torch, timm, safetensors, pytest" 120 pytorch_all python3 -m pytest -q -rs repository/python/tests
}

profile() {
    local program family
    if [ "$capability" = 9.0 ] && program="$(command -v ncu)"; then
        step 90 ncu "$program" --clock-control none --set full -k 'regex:^(low_rank|exact|folded|weight|nvjet|.*gemm)' \
            -f -o "$results/ncu" ./hopper/bin/sweep --profile
        step 30 ncu_details "$program" --import "$results/ncu.ncu-rep" --page details
        # Samples of each instruction of the machine code.
        step 60 ncu_source "$program" --import "$results/ncu.ncu-rep" --page source --csv
    else
        note ncu "skipped: no ncu, or no device of compute capability 9.0" 0
    fi
    for family in sm90 cublaslt; do
        PACE_FAMILY=$family pytorch "torch, timm, numpy" 60 "profile_step_$family" python3 repository/benches/peers/profile_step.py
    done
}

query() {
    timeout -k 5 20 nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null | head -n 1
}
device="$(query name,driver_version,clocks.max.sm,power.limit)"
capability="$(query compute_cap)"

# cuBLASLt of PyTorch's packages, where the loader knows no other.
libraries="$(timeout -k 5 20 python3 -c 'import glob, site
folders = site.getsitepackages() + [site.getusersitepackages()]
print(":".join({p.rsplit("/", 1)[0] for f in folders for p in glob.glob(f + "/nvidia/**/libcublasLt.so.*", recursive=True)}))' \
    2>/dev/null)"
[ -z "$libraries" ] || export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$libraries"
export PACE_KERNELS_LIBRARY="$PWD/libpace_kernels.so" PYTHONPATH="$PWD/repository/python/src"

for part in "${parts[@]}"; do
    part_end=$deadline
    [ ${#parts[@]} -eq 1 ] || part_end=$((SECONDS + part_seconds[$part]))
    echo "== $part"
    case "$part" in
        step) training_step ;;
        *) "$part" ;;
    esac
done

# What is asked first: the figures, then how each step ended.
for part in "${parts[@]}"; do
    case "$part" in
        sweep)
            grep -h '^|' "$results/hopper/sweep.txt" 2>/dev/null | awk '!seen[$0]++' | cut -c1-160 | head -n 60
            for family in sm90 cublaslt sm80; do
                grep -hE '^\| (operator|[a-z_]*_linear|cuBLASLt)' "$results/sweep_$family.txt" 2>/dev/null
            done | awk '!seen[$0]++'
            ;;
        step) grep -hE '^ +(training step|official|ours|PEFT)' "$results"/peers_*_step_*.txt 2>/dev/null | cut -c1-130 ;;
    esac
done
echo
echo "step | how it ended | s"
tail -n +$((earlier + 1)) "$table" | awk -F '\t' '{ printf "%-44s %-44s %4d\n", $1, $2, $3 }'
[ -n "$device" ] || echo "nvidia-smi names no device: probably nothing ran on one"
echo "$failed of $(($(wc -l <"$table") - earlier)) steps failed, $SECONDS s; everything is in $results"
[ "$failed" -eq 0 ]
