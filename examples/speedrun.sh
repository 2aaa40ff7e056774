#!/usr/bin/env bash
# The whole path on one node of eight GPUs: a corpus and a Hugging Face model go in; the same model with a
# context of 128K tokens comes out, with its loss before and after and its needle heatmap.
#
#   MODEL=/models/Meta-Llama-3-8B CORPUS=/data/SlimPajama BOOK=/data/long_book.txt WORK=/runs/llama3-128k \
#       examples/speedrun.sh [flags for training]
#
# The paper's own run: RECIPE=llama2_7b_80k LENGTH=80K MODEL=/models/Llama-2-7b-hf. Llama-3-8B and 5B tokens are
# 1,192 steps, about two days on eight H100, and take about 600 GB of disk. What the machine lacks:
# tools/doctor.py --recipe llama3_8b_128k. Started again, the script skips finished steps and resumes the others.
set -euo pipefail

# Yours.
: "${MODEL:?set it to the Hugging Face model folder, with its tokenizer}"
: "${CORPUS:?set it to the folder of .jsonl, .jsonl.zst or .parquet files (docs/data_format.md)}"
: "${BOOK:?set it to a long text file in UTF-8, in which needles are hidden}"
: "${WORK:?set it to the folder for everything that is made}"
RECIPE=${RECIPE:-llama3_8b_128k}  # tools/show_recipe.py lists them
LENGTH=${LENGTH:-128K}            # the window that is trained, and the context that is measured
TOKENS=${TOKENS:-5B}              # training tokens of the dataset; --train-iters says how many are read
GPUS=${GPUS:-8}
LAYOUT=(--tensor-model-parallel-size "${TP:-2}" --context-parallel-size "${CP:-4}")  # of the evaluations
GRID=(--num-lengths "${NUM_LENGTHS:-40}" --num-depths "${NUM_DEPTHS:-10}" --min-length "${MIN_LENGTH:-1K}")
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TOOLS=$REPOSITORY/tools

once() {  # run a command unless what it makes is there; outputs appear whole or not at all
    if [[ -e $1 ]]; then echo "$1 is there"; else "${@:2}"; fi
}
on_gpus() { torchrun --standalone --nproc-per-node "$GPUS" "$@"; }
mkdir -p "$WORK"

# 1. Mix: documents of each source in their shares, long ones kept whole; $WORK/data/report/index.html shows it.
once "$WORK/data" python "$TOOLS/preprocess_mix.py" --input "$CORPUS" --tokenizer "$MODEL" \
    --output "$WORK/data" --train-tokens "$TOKENS" --workers "$(nproc)"

# 2. Convert to a checkpoint that every layout loads.
once "$WORK/base" python "$TOOLS/convert_checkpoint.py" hf-to-megatron --input "$MODEL" --output "$WORK/base"

# 3. Measure the model as released: loss of held-out documents by source and position.
once "$WORK/before.json" on_gpus "$TOOLS/evaluate_loss.py" --checkpoint "$WORK/base" --dataset "$WORK/data" \
    --context-length "$LENGTH" --output "$WORK/before.json" "${LAYOUT[@]}"

# 4. Train. The recipe gives layout, batch, learning rate and RoPE base; flags of yours come last and win.
CHECKPOINT=$WORK/base DATASET=$WORK/data OUTPUT=$WORK/ckpt RECIPE=$RECIPE NPROC_PER_NODE=$GPUS \
    "$REPOSITORY/examples/pretrain_llama_128k.sh" --seq-length "$LENGTH" "$@"

# 5. Measure again: the paper's Table 5 against the model as released, and the needle heatmap.
once "$WORK/after.json" on_gpus "$TOOLS/evaluate_loss.py" --checkpoint "$WORK/ckpt" --dataset "$WORK/data" \
    --context-length "$LENGTH" --output "$WORK/after.json" --plot "$WORK/after.png" \
    --compare "$WORK/before.json" "${LAYOUT[@]}"
on_gpus "$TOOLS/evaluate_needle.py" --checkpoint "$WORK/ckpt" --haystack "$BOOK" --context-length "$LENGTH" \
    --output-dir "$WORK/needle" "${GRID[@]}" "${LAYOUT[@]}"

# 6. Export with the RoPE that was trained, read back and compared, and put the run on one page.
once "$WORK/hf" python "$TOOLS/convert_checkpoint.py" megatron-to-hf --input "$WORK/ckpt" --output "$WORK/hf" --verify
python "$TOOLS/report.py" "$WORK" --dataset "$WORK/data" --output "$WORK/report.html" --force
echo "the model: $WORK/hf; what it can do: $WORK/report.html"
