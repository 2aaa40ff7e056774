"""A Hugging Face folder of random weights with a trained model's deviations, written in parallel shards.

    python -m benchmarks.walk.hf_model --output DIR --tokenizer DATA/mix/tokenizer [--size full] [--layers N]

Each tensor has its own seed, from its name; a GPU draws different numbers from the host.
"""

import json
import math
import shutil
import sys
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks.walk.settings import Settings
from megatron_long.cli import run_tool, tool_parser
from megatron_long.conversion.formats.hf_folder import INDEX_FILE, plan_shards
from megatron_long.files import atomic_path, refuse_overwrite
from megatron_long.model.geometry import LlamaGeometry
from megatron_long.model.mapping import units_of

SHARD_BYTES = 2 * 10**9
"""5 GB is the usual maximum; more processes can write smaller shards."""
DEVIATION = 0.02
SEED = 1

Named = tuple[str, tuple[int, ...]]


def tensors_of(geometry: LlamaGeometry) -> list[Named]:
    """Name and shape of every tensor, in the order of the layers."""
    return [
        (name, tuple(shape))
        for unit in units_of(geometry)
        for name, shape in zip(unit.hf_names, unit.rule.layout.hf_shapes(geometry), strict=True)
    ]


def deviation(name: str, num_layers: int) -> float:
    """Standard deviation of a tensor's weights.

    >>> deviation("model.layers.0.mlp.down_proj.weight", 32)
    0.0025
    """
    is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
    return DEVIATION / math.sqrt(2 * num_layers) if is_output else DEVIATION


def write_shard(path: Path, tensors: Sequence[Named], num_layers: int, gpu: int) -> None:
    """Generate and write the tensors of one file."""
    import torch
    from safetensors.torch import save_file

    has_gpu = torch.cuda.is_available()
    device = f"cuda:{gpu % torch.cuda.device_count()}" if has_gpu else "cpu"
    held = {}
    for name, shape in tensors:
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{SEED} {name}".encode()))
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        values *= deviation(name, num_layers)
        if name.endswith("norm.weight"):
            values += 1
        held[name] = values.bfloat16().cpu()
    save_file(held, path, metadata={"format": "pt"})


def write_model(folder: Path, geometry: LlamaGeometry, processes: int) -> int:
    """Write weights and config.json.

    Returns: Bytes of the weights.
    """
    tensors = tensors_of(geometry)
    sizes = [2 * math.prod(shape) for _, shape in tensors]
    shards = plan_shards(sizes, SHARD_BYTES)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(
                write_shard, folder / file, [tensors[i] for i in shard], geometry.num_layers, gpu
            )
            for gpu, (file, shard) in enumerate(zip(names, shards, strict=True))
        ]
        for job in jobs:
            job.result()
    places = {tensors[i][0]: file for file, shard in zip(names, shards, strict=True) for i in shard}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1))
    config = geometry.to_hf_config() | {
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return sum(sizes)


def main() -> None:
    """Write the folder atomically."""
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder to write")
    add(
        "--tokenizer",
        type=Path,
        required=True,
        help="folder whose files are copied next to the weights",
    )
    add("--size", choices=("full", "tiny"), default="full")
    add("--layers", type=int, help="fewer layers")
    add("--workers", type=int, default=8, help="processes that write (8)")
    args = parser.parse_args()
    refuse_overwrite(args.output, force=False)
    geometry = Settings(size=args.size, layers=args.layers).geometry
    with atomic_path(args.output, directory=True) as folder:
        size = write_model(folder, geometry, args.workers)
        for path in args.tokenizer.iterdir():
            shutil.copy(path, folder / path.name)
    print(f"wrote {args.output}: {size / 1e9:.3f} GB")


if __name__ == "__main__":
    sys.exit(run_tool(main))
