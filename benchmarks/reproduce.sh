#!/usr/bin/env bash
# The figures of docs/RESULTS.md and docs/ABLATIONS.md that need a GPU, by stages:
#
#   benchmarks/reproduce.sh data table rates ablate options hero frontier evaluate minutes
#
#   data      83/17 mixture of the corpus' prose and code, and what of the questions is in it
#   table     a training step of every config and back end, beside its peers
#   rates     learning rates, weight decay and batch of the hero and of the ablations' model
#   ablate    one change a row, three seeds
#   options   changes to the hero at 32768 tokens a step, one seed: what frontier_152m is made of
#   hero      0.54 billion tokens with base_152m_v2, killed once by SIGKILL and resumed
#   frontier  the same with frontier_152m, where that config is
#   evaluate  every question set, beside Pythia after as many tokens
#   minutes   minutes to the same held-out loss, beside nanoGPT and nanochat
#
# CORPUS      folder with corpus-edu-*.jsonl.zst, corpus-code-*.jsonl.zst and evals/ (data/raw)
# PEERS       folder with checkouts nanoGPT and nanochat (../peers)
# RUNS        where data, runs and figures go (runs/results)
# PAGES       folder of the pages that get the tables (docs); PAGES/measured gets the results as
#             JSON, and from there a study goes on where the machine that began it is gone
# LR          the hero's rate, from `rates` (what its config says)
# BATCH       tokens of a step of `hero` and `frontier`: 32768 to 262144 (65536)
# SHORT_BATCH tokens of a step of ours in `minutes`: 16384 to 131072 (32768)
# GPUS        GPUs to use, 1, 2, 4 or 8 (default: those that nvidia-smi lists)
# PYTHON      interpreter (default: the environment that `uv sync --all-packages` makes)
# CASES       of benchmarks/step.py (all)
# STOP_AFTER  seconds after which studies save and stop, and before which `minutes` begins what would
#             end by then; 75 then says: run it again
# QUICK=1     toy models on a CPU, to try the stages
#
# A stage that was stopped or killed goes on when it is asked for again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
corpus=${CORPUS:-data/raw}
peers=${PEERS:-../peers}
runs=${RUNS:-runs/results}
pages=${PAGES:-docs}
quick=${QUICK:-}
batch=${BATCH:-65536}
short_batch=${SHORT_BATCH:-32768}
rate=() # of the hero, where it is not its config's
if [ -n "${LR:-}" ]; then rate=("optim.lr=$LR"); fi
gpus=${GPUS:-$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)}
data_dir=$runs/data
measured=$pages/measured
export PYTHON=$python

app() { "$python" "apps/$1.py" "${@:2}"; }

data() {
    if [ -n "$quick" ]; then
        app prepare_text --input 'packages/**/*.py' --out-dir "$data_dir" --tokenizer byte
    else
        app prepare_text --out-dir "$data_dir" --tokenizer gpt2 \
            --source prose=83 "$corpus"/corpus-edu-*.jsonl.zst \
            --source code=17 "$corpus"/corpus-code-*.jsonl.zst
    fi
    if [ -d "$corpus/evals" ]; then
        "$python" -m matilda_data overlap --evals "$corpus"/evals/*.jsonl* \
            --data-dir "$data_dir" --json "$measured/overlap.json"
    fi
}

table() {
    if [ -n "$quick" ]; then
        "$python" benchmarks/step.py --quick --json "$measured/step.json" --write "$pages/RESULTS.md"
        return
    fi
    "$python" benchmarks/step.py --peer-dir "$peers" --data-dir "$data_dir" --tokens-per-step 524288 \
        --jobs 6 --profile hero --json "$measured/step.json" --write "$pages/RESULTS.md" \
        --cases "${CASES:-nanoGPT,nanochat,transformers Qwen3,hero,v1,350m,hero *}"
}

study() { # name, config, further arguments of apps/ablate.py
    local known=()
    if [ -e "$measured/$1.json" ]; then known=(--earlier "$measured/$1.json"); fi
    if [ -n "${STOP_AFTER:-}" ]; then
        if [ "$SECONDS" -ge "$STOP_AFTER" ]; then return 75; fi
        known+=(--stop-after "$((STOP_AFTER - SECONDS))")
    fi
    app ablate --config "configs/$2.json" --data-dir "$data_dir" --out "$runs/$1" --name "$1" \
        --gpus "$((gpus > 1 && ${quick:-0} == 0 ? gpus : 1))" --discard-checkpoints --json "$measured/$1.json" \
        --write "$pages/ABLATIONS.md" "${known[@]}" "${@:3}"
}

rates() {
    if [ -n "$quick" ]; then
        study rates quickstart --grid optim.lr=0.003,0.01 --seeds 1 \
            --set train.total_steps=6 optim.warmup_steps=2 eval.every_steps=6 eval.tokens=4096
        return
    fi
    local turns=(--seeds 1 --jobs-per-gpu 3 --take-turns)
    # The points decide the rate and the decay: what the configs say of them may change meanwhile.
    local hero=("${turns[@]}" --set optim.lr=0.004 optim.weight_decay=0.01
        train.micro_batch_size=32 eval.tokens=524288 eval.sample_tokens=0)
    study hero-rates base_152m_v2 --grid optim.lr=0.001,0.002,0.004 optim.weight_decay=0.01,0.1 \
        "${hero[@]}" train.total_steps=160 train.tokens_per_step=131072 optim.warmup_steps=20 \
        eval.every_steps=160
    local half=("${hero[@]}" train.total_steps=320 train.tokens_per_step=65536
        optim.warmup_steps=40 eval.every_steps=320)
    study hero-half-batch base_152m_v2 --grid optim.lr=0.001,0.002,0.004,0.008 \
        optim.weight_decay=0.1 "${half[@]}"
    study hero-embedding-rates base_152m_v2 --grid optim.embedding_lr=0.003,0.006,0.012,0.024 \
        optim.weight_decay=0.1 "${half[@]}"
    study hero-quarter-batch base_152m_v2 --grid optim.lr=0.002,0.004 optim.weight_decay=0.1 \
        "${hero[@]}" train.total_steps=640 train.tokens_per_step=32768 train.micro_batch_size=16 \
        optim.warmup_steps=80 eval.every_steps=640
    study hero-eighth-batch base_152m_v2 --grid optim.lr=0.0005,0.001,0.002 \
        optim.weight_decay=0.1 "${hero[@]}" train.total_steps=1280 train.tokens_per_step=16384 \
        train.micro_batch_size=8 optim.warmup_steps=160 eval.every_steps=1280
    study rates ablation_48m --grid optim.lr=0.001,0.002,0.004 optim.weight_decay=0.01,0.1 \
        "${turns[@]}" --set optim.lr=0.008 optim.weight_decay=0.01 \
        train.total_steps=160 optim.warmup_steps=20
}

ablate() {
    if [ -n "$quick" ]; then
        study study quickstart --variants mha --seeds 2 \
            --set train.total_steps=6 optim.warmup_steps=2 eval.every_steps=6 eval.tokens=4096
        return
    fi
    local adamw=optim.algorithm=adamw,optim.weight_decay=0.1 # at other rates than its row's too
    local rows=(no_qk_norm mha mqa adamw)
    local more=(swiglu softcap_off z_loss_off cosine untied depth_12)
    # What the first rows raised: the rate of the embedding, and a cosine of the same mean rates.
    local asked=("embedding_0.012:optim.embedding_lr=0.012" "embedding_0.03:optim.embedding_lr=0.03"
        "untied_0.03:model.tie_embeddings=false,optim.embedding_lr=0.03"
        "cosine_0.004:optim.schedule=cosine,optim.lr=0.004,optim.adamw_lr=0.006")
    local options=(zero_init_outputs residual_scalars value_embeddings window head_dim_128
        document_mask logit_scale softcap_15 decay_60:optim.decay_fraction=0.6)
    local adamw_rates=("adamw_own:$adamw,optim.lr=0.001,optim.embedding_lr=0.003"
        "adamw_0.002:$adamw,optim.lr=0.002")
    one_change() {
        study study ablation_48m --variants "$@" --seeds 3 --jobs-per-gpu 3 --take-turns \
            --set log.autopsies=0
    }
    one_change "${rows[@]}" # whole first; then a whole seed of all before the next
    one_change "${rows[@]}" "${more[@]}" "${asked[@]}" "${options[@]}" "${adamw_rates[@]}"
}

options() {
    if [ -n "$quick" ]; then
        study options quickstart --variants mha --seeds 1 \
            --set train.total_steps=6 optim.warmup_steps=2 eval.every_steps=6 eval.tokens=4096
        return
    fi
    study options base_152m_v2 --seeds 1 --jobs-per-gpu 3 --take-turns \
        --variants mha swiglu zero_init_outputs value_embeddings head_dim_128 depth_12 \
        untied "untied_0.03:model.tie_embeddings=false,optim.embedding_lr=0.03" softcap_15 logit_scale \
        "embedding_0.0015:optim.embedding_lr=0.0015" "decay_40:optim.decay_fraction=0.4" \
        --set optim.lr=0.002 train.total_steps=640 train.tokens_per_step=32768 \
        train.micro_batch_size=16 optim.warmup_steps=80 eval.every_steps=640 \
        eval.tokens=524288 eval.sample_tokens=0 log.autopsies=0
}

family() { # a process and all that came of it: torchrun's workers are in sessions of their own
    local child
    echo "$1"
    for child in $(grep -ls "^PPid:[[:space:]]*$1\$" /proc/[0-9]*/status | cut -d / -f 3); do
        family "$child"
    done
}

train() { # name, config, more of --set: to its end, once killed when two fifths of it are done
    local run=$runs/$1 metrics=$runs/$1/metrics.jsonl steps=$((4120 * 131072 / batch)) sizes
    local each=$((batch / 2048 / (gpus > 1 ? gpus : 1)))
    sizes=("train.total_steps=$steps" "train.tokens_per_step=$batch"
        "train.micro_batch_size=$((each > 64 ? 64 : each))"
        "optim.warmup_steps=$((steps / 20))" "eval.every_steps=$((steps / 10))" eval.tokens=1048576
        "ckpt.every_steps=$((steps / 40))" "${@:3}")
    if [ -n "$quick" ]; then
        steps=20
        sizes=(train.total_steps=20 optim.warmup_steps=2 eval.every_steps=10 eval.tokens=4096
            ckpt.every_steps=4 log.every_steps=1 train.micro_batch_size=2)
    fi
    local command=(launchers/train.sh --config "configs/$2.json" --data-dir "$data_dir"
        --run-dir "$run" --set "${sizes[@]}")
    if [ ! -e "$run.killed" ]; then
        env GPUS="$gpus" "${command[@]}" &
        local leader=$! last
        while kill -0 "$leader" 2>/dev/null; do
            last=$({ tail -n 1 "$metrics" 2>/dev/null || true; } |
                sed -n 's/^{"step": *\([0-9]*\).*/\1/p')
            if [ "${last:-0}" -ge $((2 * steps / 5)) ]; then
                # shellcheck disable=SC2046  # one word a process
                kill -KILL $(family "$leader")
                touch "$run.killed"
            fi
            sleep 0.2
        done
        wait "$leader" || true
    fi
    GPUS=$gpus "${command[@]}"
    app report "$run" --svg "$pages/images/$1-loss.svg" || echo "the run is whole, but has no report" >&2
}

hero() { train hero "$([ -n "$quick" ] && echo quickstart || echo base_152m_v2)" "${rate[@]}"; }

frontier() {
    if [ -z "$quick" ] && [ ! -e configs/frontier_152m.json ]; then
        echo "configs/frontier_152m.json is not there: it holds what the study finds best" >&2
        return 2
    fi
    train frontier "$([ -n "$quick" ] && echo quickstart || echo frontier_152m)"
}

evaluate() {
    if [ ! -d "$corpus/evals" ]; then
        echo "no question sets in $corpus/evals: give CORPUS" >&2
        return 2
    fi
    local run known=()
    if [ -e "$measured/overlap.json" ]; then
        known=(--contamination "$measured/overlap.json")
    fi
    for run in hero frontier; do
        [ -d "$runs/$run" ] || continue
        app evaluate --run "$runs/$run" --task-dir "$corpus/evals" "${known[@]}" \
            --compare pythia-160m,pythia-410m --write "$pages/RESULTS.md" \
            --json "$measured/$run-scores.json" ${quick:+--limit 20}
    done
}

minutes() {
    if [ -n "$quick" ]; then
        "$python" benchmarks/time_to_loss.py --quick
        return
    fi
    local common=(--data-dir "$data_dir" --out "$measured/minutes" --work "$runs/minutes"
        --peer-dir "$peers" --gpus "$((gpus > 1 ? gpus : 1))" --evaluate-every 15
        --write "$pages/RESULTS.md")
    # Rates from `rates`: the best falls with the batch.
    local ours=("train.micro_batch_size=$((short_batch / 2048))" log.autopsies=0
        "optim.lr=$((short_batch < 32768 ? 1 : 2))e-3")
    local frontier=() code=0
    systems() { # what fails or has no time keeps nothing else from it
        local stop=() ended=0
        if [ -n "${STOP_AFTER:-}" ]; then stop=(--stop-after "$((STOP_AFTER - SECONDS))"); fi
        "$python" benchmarks/time_to_loss.py "${common[@]}" "${stop[@]}" --systems "$@" || ended=$?
        if [ "$code" -eq 0 ] || [ "$code" -eq 75 ]; then code=$((ended ? ended : code)); fi
    }
    if [ -e configs/frontier_152m.json ]; then
        frontier=("frontier_152m@$short_batch:2.7" "frontier_152m@$short_batch:2.2")
    fi
    # nanoGPT's own batch is half a million tokens, of which minutes make few steps: smaller ones
    # are its best chance. What is no part of the target comes last.
    systems nanogpt@32768:8 "hero@$short_batch:4" nanogpt@65536:8 \
        "hero@$short_batch:2.7" --set "${ours[@]}"
    systems "${frontier[@]}" nanochat:8 nanogpt@131072:8 nanogpt:8 --set "${ours[@]}"
    return "$code"
}

if [ $# -eq 0 ]; then
    sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
fi
for stage in "$@"; do
    case $stage in
        data | table | rates | ablate | options | hero | frontier | evaluate | minutes) ;;
        *)
            echo "no stage '$stage': data, table, rates, ablate, options, hero, frontier, evaluate, minutes" >&2
            exit 2
            ;;
    esac
done
mkdir -p "$runs" "$measured/minutes" "$pages/images"
for stage in "$@"; do
    echo "== $stage"
    "$stage"
done
