#!/usr/bin/env bash
# The whole pipeline on one node of eight GPUs. Input: a corpus and a Hugging Face model. Output: the same model with a
# context of 128K tokens, its loss before and after, and its needle heatmap.
#
#   MODEL=/models/Meta-Llama-3-8B CORPUS=/data/SlimPajama BOOK=/data/long_book.txt WORK=/runs/llama3-128k \
#       examples/speedrun.sh [flags for training]
#
# The paper's own run: RECIPE=llama2_7b_80k LENGTH=80K MODEL=/models/Llama-2-7b-hf. Llama-3-8B and 5B tokens are
# 1,192 steps, about two days on eight H100, and need about 600 GB of disk. tools/doctor.py --recipe llama3_8b_128k
# reports what the machine lacks. A second start skips finished steps and resumes the others.
set -euo pipefail

# Required.
: "${MODEL:?set it to the Hugging Face model folder, with its tokenizer}"
: "${CORPUS:?set it to the folder of the corpus (which files: docs/data_format.md)}"
: "${BOOK:?set it to a long text file in UTF-8, in which needles are hidden}"
: "${WORK:?set it to the folder for all output}"
RECIPE=${RECIPE:-llama3_8b_128k}  # tools/show_recipe.py lists them
LENGTH=${LENGTH:-128K}            # the training window and the evaluated context length
TOKENS=${TOKENS:-5B}              # training tokens of the dataset; --train-iters says how many are read
GPUS=${GPUS:-8}
LAYOUT=(--tensor-model-parallel-size "${TP:-2}" --context-parallel-size "${CP:-4}")  # of the evaluations
GRID=(--num-lengths "${NUM_LENGTHS:-40}" --num-depths "${NUM_DEPTHS:-10}" --min-length "${MIN_LENGTH:-1K}")
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TOOLS=$REPOSITORY/tools

once() {  # run a command unless its output exists; outputs are written atomically
    if [[ -e $1 ]]; then echo "$1 exists"; else "${@:2}"; fi
}
on_gpus() { torchrun --standalone --nproc-per-node "$GPUS" "$@"; }
mkdir -p "$WORK"

# 1. Mix: sources keep their shares, long documents are kept whole; see $WORK/data/report/index.html.
once "$WORK/data" python "$TOOLS/preprocess_mix.py" --input "$CORPUS" --tokenizer "$MODEL" \
    --output "$WORK/data" --train-tokens "$TOKENS" --workers "$(nproc)"

# 2. Convert to a checkpoint that every layout loads.
once "$WORK/base" python "$TOOLS/convert_checkpoint.py" hf-to-megatron --input "$MODEL" --output "$WORK/base"

# 3. Evaluate the model as released: loss of held-out documents by source and position.
once "$WORK/before.json" on_gpus "$TOOLS/evaluate_loss.py" --checkpoint "$WORK/base" --dataset "$WORK/data" \
    --context-length "$LENGTH" --output "$WORK/before.json" "${LAYOUT[@]}"

# 4. Train. The recipe sets layout, batch, learning rate and RoPE base; your flags come last and override it.
CHECKPOINT=$WORK/base DATASET=$WORK/data OUTPUT=$WORK/ckpt RECIPE=$RECIPE NPROC_PER_NODE=$GPUS \
    "$REPOSITORY/examples/pretrain_llama_128k.sh" --seq-length "$LENGTH" "$@"

# 5. Evaluate again: the paper's Table 5 against the model as released, and the needle heatmap.
once "$WORK/after.json" on_gpus "$TOOLS/evaluate_loss.py" --checkpoint "$WORK/ckpt" --dataset "$WORK/data" \
    --context-length "$LENGTH" --output "$WORK/after.json" --plot "$WORK/after.png" \
    --compare "$WORK/before.json" "${LAYOUT[@]}"
on_gpus "$TOOLS/evaluate_needle.py" --checkpoint "$WORK/ckpt" --haystack "$BOOK" --context-length "$LENGTH" \
    --output-dir "$WORK/needle" "${GRID[@]}" "${LAYOUT[@]}"

# 6. Export with the trained RoPE, verify the export, and summarize the run on one page.
once "$WORK/hf" python "$TOOLS/convert_checkpoint.py" megatron-to-hf --input "$WORK/ckpt" --output "$WORK/hf" --verify
python "$TOOLS/report.py" "$WORK" --dataset "$WORK/data" --output "$WORK/report.html" --force
echo "model: $WORK/hf; report: $WORK/report.html"
