"""What pyproject.toml has no words for: configs/ of the repository travels in a wheel as vlm_jax.configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vlm_jax", "vlm_jax.*"]), "vlm_jax.configs"],
    package_dir={"vlm_jax.configs": "configs"},
)
