"""UniTok: one visual tokenizer for generation and understanding, and the unified model on top of it.

The sub-packages `unitok.tokenizer`, `unitok.mllm`, `unitok.data`, `unitok.eval`, `unitok.configs` and `unitok.scripts`
are the folders of the same names at the top of the repository. In an installed wheel they lie inside this package; in
a checkout the parent folder is added to the search path below.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "setup.py").is_file() and (_checkout / "tokenizer" / "__init__.py").is_file():
    __path__.append(str(_checkout))

if TYPE_CHECKING:
    from unitok.mllm.pipeline import UniTokPipeline


def __getattr__(name: str) -> Any:
    if name == "UniTokPipeline":  # imported on first use: it needs torch and transformers
        from unitok.mllm.pipeline import UniTokPipeline

        return UniTokPipeline
    raise AttributeError(f"module 'unitok' has no attribute {name!r}")


__all__ = ["UniTokPipeline", "__version__"]
