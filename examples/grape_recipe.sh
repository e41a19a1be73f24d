#!/usr/bin/env bash
# The GRAPE recipe on contexts of tokens and gists: rotary with learned frequencies (GRAPE-M) on
# layers with a window of 128 rows; on every fourth layer, which is global, no rotary but learned
# linear biases (GRAPE-A); experts routed as DeepSeek-V3 does it, without an auxiliary loss.
#
#   bash examples/grape_recipe.sh [FLAG...]     flags are added to those below, and win over them
#
#   TRAIN_DATA, VALID_DATA   prefixes of .bin/.idx (default: the text of Python's standard library)
#   OUT                      checkpoints and curves; a repeated run goes on (default: runs/grape_recipe)
#   ARM                      recipe (default), or what scripts/ablation.sh compares it with: grapem
#                            (GRAPE-M on all layers), nope (global layers without biases) or rope
#   MC_CPU=1                 a size for two cores, in fp32: the default where there is no GPU, unless
#                            MC_CPU=0 asks for the other one
#   LAYERS HIDDEN HEADS QUERY_GROUPS FFN EXPERTS TOPK EXPERT_FFN ROWS HISTORY STEPS BATCH
#   MICRO_BATCH LR SEED      sizes, whose defaults are below; layouts, data and the rest: flags
#
# Starts through scripts/train.sh, whose variables apply. On a GPU windows and slopes run in the
# plugin's kernels, on either of Megatron's layers; --transformer-impl transformer_engine makes the
# rest of a layer faster where that package is installed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"
mc_check_installed

device=(--bf16) spread=0.03
if [[ ${MC_CPU:-} != 0 ]] && { [[ ${MC_CPU:-} == 1 ]] || ! mc_has_gpu; }; then
  device=(--cpu) spread=0.06
  : "${LAYERS:=4}" "${HIDDEN:=128}" "${HEADS:=4}" "${QUERY_GROUPS:=2}" "${FFN:=384}"
  : "${EXPERTS:=4}" "${TOPK:=2}" "${EXPERT_FFN:=96}" "${ROWS:=256}" "${HISTORY:=3232}"
  : "${STEPS:=300}" "${BATCH:=4}" "${MICRO_BATCH:=4}" "${LR:=4e-3}"
fi
: "${LAYERS:=12}" "${HIDDEN:=768}" "${HEADS:=12}" "${QUERY_GROUPS:=4}" "${FFN:=2048}"
: "${EXPERTS:=16}" "${TOPK:=4}" "${EXPERT_FFN:=512}" "${ROWS:=1024}" "${HISTORY:=8192}"
: "${STEPS:=4000}" "${BATCH:=32}" "${MICRO_BATCH:=4}" "${LR:=1e-3}"
: "${SEED:=1234}" "${OUT:=$root/runs/grape_recipe}" "${ARM:=recipe}"

if [[ -z ${TRAIN_DATA:-} ]]; then
  if ((${NNODES:-1} > 1)); then
    mc_say "Several nodes need TRAIN_DATA and VALID_DATA, made once for all of them."
    exit 1
  fi
  TRAIN_DATA=$root/runs/stdlib/text_train VALID_DATA=$root/runs/stdlib/text_valid
  if [[ ! -e $VALID_DATA.manifest.json ]]; then
    "$(mc_python)" -m megacontext_megatron.data.corpus --input stdlib --held-out 0.05 \
      --tokenizer byte --output-prefix "$root/runs/stdlib/text" --overwrite >&2
  fi
fi

# ALiBi's gentlest slope is 1/256 a token: gists thousands of tokens away are dead to all heads. Times
# 256 / HISTORY it takes 1 off the score of the oldest gist, and a quarter of the heads take 4 at most,
# so that all of history is seen at first; the slopes are learned from there
slope_scale=$(awk -v history="$HISTORY" 'BEGIN { printf "%.6g", 256 / history }')
# 128 rows, itself and the 127 before it
windows=(--window-size "127,0" --window-attn-skip-freq 4)
learned=(--position-embedding-type grapem --grapem-learnable-freq)
case $ARM in
  recipe)
    positions=("${learned[@]}" --no-rope-freq 4
      --grape-a --grape-a-learnable --bias-slope-scale "$slope_scale")
    ;;
  grapem) positions=("${learned[@]}") ;;
  nope) positions=("${learned[@]}" --no-rope-freq 4) ;;
  rope) positions=(--position-embedding-type rope) ;;
  *)
    mc_say "ARM=$ARM is none of recipe, grapem, nope and rope."
    exit 1
    ;;
esac

model=(
  --transformer-impl local
  --num-layers "$LAYERS" --hidden-size "$HIDDEN" --ffn-hidden-size "$FFN"
  --num-attention-heads "$HEADS" --group-query-attention --num-query-groups "$QUERY_GROUPS"
  --normalization RMSNorm --swiglu --disable-bias-linear --init-method-std "$spread"
  --attention-dropout 0 --hidden-dropout 0
)
experts=(
  --num-experts "$EXPERTS" --moe-layer-freq "([0]*1+[1]*$((LAYERS - 1)))"
  --moe-ffn-hidden-size "$EXPERT_FFN" --moe-shared-expert-intermediate-size "$EXPERT_FFN"
  --moe-router-topk "$TOPK" --moe-router-score-function sigmoid --moe-router-dtype fp32
  --moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-3
  --moe-router-load-balancing-type none --moe-router-topk-scaling-factor 2.5
  --moe-token-dispatcher-type alltoall
)
contexts=(
  --seq-length "$ROWS" --max-position-embeddings "$HISTORY"
  --megacontext --mc-source-length "$HISTORY" --mc-variants 2
  --mc-recent-tokens 64 --mc-horizon 64 --mc-level2-prob 0.3
)
data=(
  --train-data-path 1.0 "$TRAIN_DATA" --valid-data-path 1.0 "${VALID_DATA:-$TRAIN_DATA}"
  --data-cache-path "$OUT/cache"
  --tokenizer-type NullTokenizer --vocab-size 320 --null-tokenizer-eod-id 256
  --make-vocab-size-divisible-by 16
)
quarter=$((STEPS > 4 ? STEPS / 4 : 1))
training=(
  --micro-batch-size "$MICRO_BATCH" --global-batch-size "$BATCH" --train-iters "$STEPS"
  --lr "$LR" --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters $((STEPS / 20))
  --weight-decay 0.1 --adam-beta2 0.98 --clip-grad 1.0 --seed "$SEED"
  --log-interval 10 --eval-interval "$quarter" --eval-iters 8
  --save "$OUT" --load "$OUT" --save-interval "$quarter" --tensorboard-dir "$OUT/tensorboard"
)
exec bash "$root/scripts/train.sh" "${device[@]}" "${model[@]}" "${windows[@]}" "${positions[@]}" \
  "${experts[@]}" "${contexts[@]}" "${data[@]}" "${training[@]}" "$@"
