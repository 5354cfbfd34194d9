"""Packaging of megatron_dynmoe; exact versions of everything that set-up installs are in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
README = ROOT / "README.md"
# Said once, in the package; not imported, for a build has none of what it requires.
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "megatron_dynmoe/__init__.py").read_text(encoding="utf-8"), re.M)

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

# A command a file of megatron_dynmoe/programs, but for the diagnosis and the demo.
COMMANDS = {
    "corpus": "programs.collect_corpus",
    "tokenizer": "programs.train_tokenizer",
    "preprocess": "programs.preprocess_data",
    "pretrain": "programs.pretrain",
    "export": "programs.export_hf",
    "import": "programs.import_hf",
    "generate": "programs.generate",
    "plan": "programs.plan_cluster",
    "report": "programs.report",
    "doctor": "doctor",
    "demo": "demo.__main__",
}


class WithExamples(build_py):
    """Puts examples/ into the package of a wheel: `dynmoe-doctor --examples` names the folder."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the checkout's are used
            return
        for pattern in ("*.sh", "*.py", "models/*.args"):
            for path in sorted((ROOT / "examples").glob(pattern)):
                target = Path(self.build_lib, "megatron_dynmoe", path.relative_to(ROOT))
                self.mkpath(str(target.parent))
                self.copy_file(str(path), str(target))


setup(
    name="megatron_dynmoe",
    version=VERSION[1],
    description="Mixture-of-experts layers for Megatron in which each token chooses how many experts it uses",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12,<3.13",
    packages=find_packages(include=["megatron_dynmoe", "megatron_dynmoe.*"]),
    package_data={"megatron_dynmoe": ["py.typed"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    cmdclass={"build_py": WithExamples},
    entry_points={
        "console_scripts": [f"dynmoe-{name}=megatron_dynmoe.{module}:main" for name, module in COMMANDS.items()]
    },
    classifiers=[
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
