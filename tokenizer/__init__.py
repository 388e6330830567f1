"""UniTok, the visual tokenizer: images to codes `[B, K, L]` and back."""

from unitok.tokenizer.configuration import TextTowerConfig, UniTokConfig
from unitok.tokenizer.model import UniTok, UniTokOutput

__all__ = ["TextTowerConfig", "UniTok", "UniTokConfig", "UniTokOutput"]
