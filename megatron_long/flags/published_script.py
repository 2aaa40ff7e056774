"""A published recipe as a shell script, and all of them as one table."""

import json
import shlex
from collections.abc import Iterator

from megatron_long.flags.published import PUBLISHED, Published, Stage

HEADER = (
    *("recipe", "starts from", "window", "RoPE", "tokens", "batch, tokens", "learning rate"),
    *("masks", "data", "optimizer kept"),
)


def as_script(recipe: Published) -> str:
    """Return a bash script that makes the data of each stage and trains it; a second start resumes.

    It takes CORPUS, MODEL, WORK, and if wanted BASE (a name in `RECIPES`) and NPROC_PER_NODE, from the
    environment.
    """
    lines = [f"# {recipe.title}, from {recipe.start}"]
    lines += [f"# source: {source}" for source in recipe.sources]
    lines += [f"# note: {note}" for note in recipe.notes]
    lines += [
        "set -euo pipefail",
        ': "${CORPUS:?folder of texts}" "${MODEL:?Hugging Face folder}" "${WORK:?folder to write}"',
        f"BASE=${{BASE:-{recipe.base}}} NPROC_PER_NODE=${{NPROC_PER_NODE:-8}}",
        'mkdir -p "$WORK"',
    ]
    for number, stage in enumerate(recipe.stages, 1):
        lines += _stage_lines(number, len(recipe.stages), stage)
    return "\n".join(lines)


def _stage_lines(number: int, count: int, stage: Stage) -> Iterator[str]:
    data, run, shares = (f'"$WORK/{name}-{number}"' for name in ("data", "run", "shares"))
    yield f"\n# stage {number} of {count}"
    mixture = shlex.join([*stage.data_argv(), "--seed", str(number - 1)])  # another order
    if stage.shares:
        content = json.dumps({"shares": stage.shares})  # JSON is YAML
        yield f"printf '%s\\n' {shlex.quote(content)} > {shares}"
        mixture += f" --source-shares {shares}"
    yield f'[ -e {data} ] || megatron-long preprocess --input "$CORPUS" --tokenizer "$MODEL" \\'
    yield f"    --output {data} {mixture}"
    flag = "--next-stage-of" if stage.keeps_optimizer else "--pretrained-checkpoint"
    start = f'{flag} "$WORK/run-{number - 1}"' if number > 1 else '--hf-checkpoint "$MODEL"'
    yield 'megatron-long launch --nproc-per-node "$NPROC_PER_NODE" -m megatron_long.pretrain \\'
    flags = shlex.join(stage.training_argv())
    yield f'    --recipe "$BASE" {start} --dataset {data} --load {run} --save {run} {flags}'.rstrip()


def as_table() -> str:
    """Return the Markdown table of docs/recipes.md: a row for each stage; a dash is not known.

    Values of the paper's stage are those of its base recipe, which has no flag of its own here.
    """
    rows = [HEADER, ("---",) * len(HEADER)]
    for name, make in PUBLISHED.items():
        recipe = make()
        for number, stage in enumerate(recipe.stages, 1):
            label = f"`{name}`" + (f", stage {number}" if len(recipe.stages) > 1 else "")
            start = recipe.start if number == 1 else f"stage {number - 1}"
            kept = "yes" if number > 1 and stage.keeps_optimizer else "no"
            rows.append((label, start, *_cells(stage), kept))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(stage: Stage) -> tuple[str, ...]:
    base = "as `llama2_7b_80k`"
    if stage.seq_length is None:
        return (base, base, f"{stage.train_tokens:,}", base, base, "no", _data(stage))
    return (
        f"{stage.seq_length:,}",
        " ".join(f"{flag} {value}" for flag, value in stage.rope.items()).replace("--", ""),
        f"{stage.num_windows * stage.seq_length:,}",
        f"{stage.tokens_per_batch:,}" if stage.tokens_per_batch else "–",
        " ".join(f"{flag} {value}" for flag, value in stage.schedule.items()).replace("--", "")
        or "–",
        "yes" if stage.masks_documents else "no",
        _data(stage),
    )


def _data(stage: Stage) -> str:
    shares = ", ".join(f"{name} {share:g}" for name, share in stage.shares.items())
    flags = shlex.join(stage.data).replace("--", "").replace("|", "\\|")
    return flags + (f"; {shares}" if shares else "")
