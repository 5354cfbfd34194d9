"""Packaging of megatron_dynmoe; exact versions of everything that set-up installs are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).with_name("README.md")

# What a training run imports. megatron-core is pinned: the library subclasses it, and host/ knows its internals.
REQUIRES = [
    "torch>=2.11,<2.14",
    "megatron-core==0.19.2",
    "numpy",
    "packaging>=24.2",
    "omegaconf",  # megatron.training's configuration container
    "einops",  # megatron.core's attention
    "psutil",  # megatron.core's checkpoint writer
    "sentencepiece",
    "tokenizers",
    "transformers>=5.2",  # what the exported modeling code imports is not in 5.1
    "safetensors",
    "tqdm",
    "tensorboard",
]

EXTRAS = {
    # what its Python imports at its start; onnxscript brings onnx_ir and ml_dtypes
    "te": ["transformer-engine[core_cu13,pytorch]", "onnxscript", "onnx", "pydantic"],
    "data": ["zstandard", "orjson"],
    "wandb": ["wandb"],
    "plots": ["matplotlib"],
}
EXTRAS["dev"] = ["pytest", "ruff", "pre-commit", "mypy", *EXTRAS["data"], *EXTRAS["plots"]]

setup(
    name="megatron_dynmoe",
    version="0.1.0",
    description="Mixture-of-experts layers for Megatron in which each token chooses how many experts it uses",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12,<3.13",
    packages=find_packages(include=["megatron_dynmoe", "megatron_dynmoe.*"]),
    package_data={"megatron_dynmoe": ["py.typed"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "dynmoe-doctor=megatron_dynmoe.doctor:main",
            "dynmoe-demo=megatron_dynmoe.demo.__main__:main",
        ]
    },
    classifiers=[
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
