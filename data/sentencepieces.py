"""Training and reading small sentencepiece models: the text side of the demo and of small own data sets."""

import io
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from unitok.core.checkpoint import on_main
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
        raise DataError(
            "no text to train a sentencepiece model on: the source has no captions (a tokenizer without the text side "
            "needs none: model.text_tower=null loss.contrastive=0)"
        )
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(model.getvalue())
    os.replace(temporary, path)
    return path


def run_sentencepiece(
    folder: Path,
    name: str,
    resumed: Path | None,
    texts: Callable[[], Iterable[str]],
    vocab_size: int,
    symbols: list[str] | None = None,
) -> Path:
    """`folder/name`, the text model of a run; call on every rank.

    A new run trains it on its `texts()`, whatever an earlier one left there. A resumed run takes that of the run whose
    folder is `resumed`: the weights belong to its pieces.
    """
    path = folder / name

    def provide() -> None:
        if resumed is None:
            train_sentencepiece(texts(), path, vocab_size, symbols)
            return
        load_sentencepiece(resumed / name)
        if resumed.resolve() != folder.resolve():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(resumed / name, path)

    on_main(provide)
    return path


def load_sentencepiece(path: Path):
    """A `sentencepiece.SentencePieceProcessor`; UserError when the file is missing or not such a model."""
    import sentencepiece as spm

    if not path.is_file():
        raise UserError(f"{path}: no such sentencepiece model")
    content = path.read_bytes()
    if not content:
        raise UserError(f"{path}: not a sentencepiece model (the file is empty)")
    try:
        return spm.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise UserError(f"{path}: not a sentencepiece model ({error})") from error
