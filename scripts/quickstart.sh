#!/usr/bin/env bash
# From nothing to a trained model: sets up .venv, builds a corpus from the text of Python's standard
# library, trains a small GPT on contexts that mix tokens and gists, and shows what it learned.
#
#   bash scripts/quickstart.sh [FLAG...]     flags are added to those below, and win over them
#
# Everything is written to runs/quickstart. A repeated run trains anew: it removes the checkpoints
# and curves of the last one, and keeps the corpus.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$MC_ROOT"

run=runs/quickstart
corpus=$run/data/stdlib

# fresh_folder PATH: an empty folder, in place of the one that an earlier quickstart made there.
fresh_folder() {
  if [[ -e $1 ]]; then
    if [[ ! -e $1/.made-by-quickstart ]]; then
      mc_say "$1 was not made by this script: move it away and run this again."
      exit 1
    fi
    mc_say "Removing $1 of the last quickstart."
    rm -rf "$1"
  fi
  mkdir -p "$1"
  touch "$1/.made-by-quickstart"
}

model=(
  --num-layers 4 --hidden-size 128 --ffn-hidden-size 384 --num-attention-heads 4
  --group-query-attention --num-query-groups 2
  --normalization RMSNorm --swiglu --disable-bias-linear
  --attention-dropout 0 --hidden-dropout 0
  --position-embedding-type gaussian_rope
  # 256 rows stand for 3232 tokens: the newest 64 as they are, most of the others in gists. 3232 is
  # 256 + 96 * 31, so that collapsing reaches 256 rows exactly and three spans of 1024 tokens stay whole
  --seq-length 256
  --megacontext --mc-source-length 3232 --mc-variants 2 --mc-block-size 32 --mc-max-level 2
  --mc-recent-tokens 64 --mc-horizon 64 --mc-level2-prob 0.3 --gaussian-rope-learnable-sigma level
  --init-method-std 0.06
)
data=(
  --train-data-path 1.0 "${corpus}_train" --valid-data-path 1.0 "${corpus}_valid"
  --data-cache-path "$run/data/cache"
  --tokenizer-type NullTokenizer --vocab-size 320 --null-tokenizer-eod-id 256
  --make-vocab-size-divisible-by 16
)
training=(
  --micro-batch-size 8 --global-batch-size 16 --train-iters 300
  --lr 4e-3 --min-lr 4e-4 --lr-decay-style cosine --lr-warmup-iters 30
  --weight-decay 0.1 --adam-beta2 0.98 --clip-grad 1.0 --seed 1234
  --log-interval 10 --eval-interval 150 --eval-iters 2
  --tensorboard-dir "$run/tensorboard" --tensorboard-log-interval 1
  --save "$run/checkpoints" --save-interval 150
)

mc_setup analysis
device=()
if [[ " $* " == *" --cpu "* ]]; then
  device=(--cpu)
elif mc_has_gpu; then
  model+=(--bf16 --transformer-impl local)
  # one process is enough for a model of this size
  export NPROC_PER_NODE=${NPROC_PER_NODE:-1}
fi
if [[ -z ${NPROC_PER_NODE:-} ]]; then
  # without a GPU: two data-parallel processes of one thread each beat one process of two threads
  export NPROC_PER_NODE=$(($(nproc) > 1 ? 2 : 1))
fi

"$(mc_python)" -m megacontext_megatron.data.corpus --input stdlib --output-prefix "$corpus" \
  --held-out 0.05 --tokenizer byte --overwrite
fresh_folder "$run/checkpoints"
fresh_folder "$run/tensorboard"
bash scripts/train.sh "${model[@]}" "${data[@]}" "${training[@]}" "$@"
# the model and the data are those that the checkpoint records
MC_MODULE=megacontext_megatron.evaluate bash scripts/train.sh --load "$run/checkpoints" \
  --micro-batch-size 2 --mc-eval-samples 32 --mc-eval-bigram "${device[@]}"
"$(mc_python)" -m megacontext_megatron.telemetry.report "$run/checkpoints"
