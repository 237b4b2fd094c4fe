"""crossenc: train cross-encoders for question pairs on PyTorch Lightning, and use them everywhere."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["CrossEncoderModule", "PairDataModule", "__version__", "evaluate", "export", "mine", "rerank", "score"]

if TYPE_CHECKING:
    from .data import PairDataModule
    from .evaluating import evaluate
    from .exporting import export
    from .mining import mine
    from .module import CrossEncoderModule
    from .reranking import rerank
    from .scoring import score

_MODULES = {
    "CrossEncoderModule": "module",
    "PairDataModule": "data",
    "evaluate": "evaluating",
    "export": "exporting",
    "mine": "mining",
    "rerank": "reranking",
    "score": "scoring",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import crossenc` loads neither torch nor Lightning."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
