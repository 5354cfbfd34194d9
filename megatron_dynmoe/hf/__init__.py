"""Hugging Face side: the model (`trust_remote_code`), the export of distributed checkpoints to it, and the import."""

from importlib import import_module

# Resolved on first use: transformers takes seconds to import, and the export itself does without it.
_HOMES = {
    "DynMoEHFConfig": "configuration_dynmoe",
    "DynMoEModel": "modeling_dynmoe",
    "DynMoEForCausalLM": "modeling_dynmoe",
    "export": "export",
    "ExportError": "errors",
    "import_model": "importing",
    "HFImportError": "errors",
}

__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
