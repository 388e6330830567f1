"""Training and reading small sentencepiece models: the text side of the demo and of small own data sets."""

import io
from collections.abc import Iterable
from pathlib import Path

from unitok.core.errors import ConfigError, DataError, UserError

PAD, UNK, BOS, EOS = 0, 1, 2, 3


def train_sentencepiece(texts: Iterable[str], path: Path, vocab_size: int, symbols: list[str] | None = None) -> Path:
    """Train a unigram model on `texts` and write it to `path`.

    `vocab_size` is an upper bound: a small corpus gives fewer pieces. `symbols` become single pieces of their own.
    Ids 0 to 3 are padding, unknown, begin and end. ConfigError when `vocab_size` does not even hold the characters.
    """
    import sentencepiece as spm

    corpus = sorted(set(texts))
    if not corpus:
        raise DataError("no text to train a sentencepiece model on: the source has no captions or conversations")
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            byte_fallback=False,
            split_digits=True,
            add_dummy_prefix=True,
            remove_extra_whitespaces=True,
            normalization_rule_name="nmt_nfkc",
            user_defined_symbols=symbols or [],
            pad_id=PAD,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"vocab_size={vocab_size}: sentencepiece cannot train on {len(corpus)} texts with it ({str(error).strip()})"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return path


def load_sentencepiece(path: Path):
    """A `sentencepiece.SentencePieceProcessor`; UserError when the file is missing or not such a model."""
    import sentencepiece as spm

    if not path.is_file():
        raise UserError(f"{path}: no such sentencepiece model")
    try:
        return spm.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError as error:
        raise UserError(f"{path}: not a sentencepiece model ({error})") from error
