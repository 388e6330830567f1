"""Text side of the contrastive loss: open_clip's text transformer and the tokenizers that feed it.

B batch, T text positions (always `context_length`).
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from unitok.core.errors import UserError
from unitok.data.sentencepieces import load_sentencepiece
from unitok.tokenizer.configuration import TextTowerConfig

TEXT_MODEL_FILE = "text_tokenizer.model"


def build_text_tower(config: TextTowerConfig, embed_dim: int) -> nn.Module:
    """open_clip's causal text transformer: ids `[B, T]` -> `[B, embed_dim]`, pooled at the largest id (the end)."""
    from open_clip.transformer import TextTransformer

    return TextTransformer(
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        width=config.width,
        heads=config.heads,
        layers=config.layers,
        output_dim=embed_dim,
        pool_type="argmax",
    )


class TextTokenizer:
    """Captions -> ids `[B, context_length]`: start, pieces, end, zeros. Too long captions are cut, the end kept."""

    def __init__(self, config: TextTowerConfig, model_file: Path | None) -> None:
        self.config, self.model_file = config, model_file
        if config.tokenizer == "clip":
            from open_clip import SimpleTokenizer

            clip = SimpleTokenizer(context_length=config.context_length)
            self._pieces = clip.encode
            end = clip.vocab_size - 1
        else:
            if model_file is None:
                raise UserError(
                    f"text_tower.tokenizer=sentencepiece needs {TEXT_MODEL_FILE} beside the tokenizer's config.json"
                )
            pieces = load_sentencepiece(model_file)
            self._pieces = pieces.encode
            end = pieces.get_piece_size() + 1
        if end >= config.vocab_size:
            raise UserError(
                f"text_tower.vocab_size={config.vocab_size}: the {config.tokenizer} tokenizer needs {end + 1} ids"
            )
        # The tower pools at the largest id, so the end token takes the highest one and the start token the next.
        self.start, self.end = config.vocab_size - 2, config.vocab_size - 1

    def __call__(self, texts: list[str]) -> Tensor:
        length = self.config.context_length
        ids_BT = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in zip(ids_BT, texts, strict=True):
            ids = [self.start, *self._pieces(text)[: length - 2], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return ids_BT
