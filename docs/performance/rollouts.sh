#!/bin/sh
# Every number of docs/performance/rollouts.md that `bench rollout` gives, as JSON lines: the models at five batches, 0.5B at
# every power of two, and the time to the first token of a long prompt. About two minutes on an H200.
#
#     docs/performance/rollouts.sh target/release/grpo-host > rollouts.jsonl
set -eu
binary=${1:?usage: rollouts.sh BINARY [FLAG …]}
shift

# SHAPE PROMPTS N PROMPT_TOKENS NEW_TOKENS [FLAG …]
bench() {
    shape=$1 prompts=$2 n=$3 prompt_tokens=$4 new_tokens=$5
    shift 5
    "$binary" bench rollout --shape "$shape" --random-weights --prompts "$prompts" --n "$n" \
        --prompt-tokens "$prompt_tokens" --new-tokens "$new_tokens" --ignore-eos --repeats 1 --quiet --json "$@" | tail -n 1
}

for batch in 1x1 2x1 4x1 8x1 2x8 4x8 8x8 16x8 32x8 64x8; do
    bench qwen2.5-0.5b "${batch%x*}" "${batch#*x}" 128 256 "$@"
done
for shape in qwen2.5-1.5b qwen3-0.6b smollm2-135m; do
    for batch in 1x1 8x1 8x8 32x8 64x8; do
        bench "$shape" "${batch%x*}" "${batch#*x}" 128 256 "$@"
    done
done
bench qwen2.5-0.5b 1 1 1024 16 "$@"
