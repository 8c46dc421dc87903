"""RL post-training for image and video diffusion and flow models in JAX."""

__version__ = "0.1.0"
