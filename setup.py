"""Package metadata. Exactly pinned versions for a reproducible environment are in requirements.txt."""

from pathlib import Path

from setuptools import find_packages, setup

version = next(
    line.split('"')[1]
    for line in Path(__file__).with_name("loopmem_pretrain").joinpath("__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="loopmem_pretrain",
    version=version,
    description="Distributed pretraining of transformers whose layers loop adaptively and read gated memory banks",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["loopmem_pretrain", "loopmem_pretrain.*"]),
    package_data={"loopmem_pretrain": ["py.typed", "eval/tasks/*.yaml"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8,<0.20",
        "megatron-core==0.16.*",
        "sentencepiece>=0.2.1",
        "datasets>=5.0",
        "wandb>=0.26",
        "pyyaml>=6.0",
        "pytest>=8.0",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "numpy>=2.0",
        "pydantic>=2.12",
        "transformers>=5.16,<6",
        "safetensors>=0.6",
        "zstandard>=0.23",
        "pyarrow>=20",
        "tqdm>=4.66",
        "matplotlib>=3.9",
        "tensorboard>=2.19",
    ],
    extras_require={
        "dev": ["ruff", "mypy", "hypothesis", "types-PyYAML"],
        "eval": ["lm_eval>=0.4.13,<0.5", "accelerate>=1.15"],
    },
    entry_points={"console_scripts": ["loopmem = loopmem_pretrain.cli:main"]},
)
