"""vlm_jax: contrastive and generative vision-language models in JAX."""

__version__ = "0.1.0"

_PUBLIC = {
    "Pretrained": "vlm_jax.pretrained",
    "UserError": "vlm_jax.errors",
    "list_models": "vlm_jax.zoo.known",
    "load": "vlm_jax.zoo.load",
    "load_adapter": "vlm_jax.zoo.adapters",
    "push_to_hub": "vlm_jax.zoo.save",
    "save_pretrained": "vlm_jax.zoo.save",
}
__all__ = [
    "Pretrained",
    "UserError",
    "__version__",
    "list_models",
    "load",
    "load_adapter",
    "push_to_hub",
    "save_pretrained",
]


def __getattr__(name):
    """Imports a public name at its first use, so that data workers and `--help` start without jax."""
    import importlib

    from vlm_jax.errors import near

    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    hint = near(name, __all__, f"public names: {', '.join(__all__)}")
    raise AttributeError(f"module `vlm_jax` has no attribute `{name}`; {hint}")


def __dir__():
    return __all__
