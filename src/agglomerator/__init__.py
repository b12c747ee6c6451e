"""Agglomerator: interpretable part-whole hierarchies for images (Garau et al., CVPR 2022)."""

__all__ = ["Agglomerator", "find_islands", "load_checkpoint"]


def __getattr__(name):
    # PyTorch takes seconds to import: only who asks for the model pays for it, not `--help`.
    if name == "Agglomerator":
        from agglomerator.model.agglomerator import Agglomerator

        return Agglomerator
    if name == "find_islands":
        from agglomerator.islands.inspection import find_islands

        return find_islands
    if name == "load_checkpoint":
        from agglomerator.runs.checkpoints import load_checkpoint

        return load_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
