"""Documents without images, and when each one is its turn."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unitok.core.errors import DataError
from unitok.core.permutation import Permutation
from unitok.core.rng import derive_seed
from unitok.core.sampling import Recent, SampleOrder
from unitok.data.bad import BadSamples, SampleError
from unitok.data.records import line_starts
from unitok.data.words import check_text, load_json_object

_SUFFIXES = (".jsonl", ".txt")


class TextSource(BadSamples):
    """Map-style reader of documents: `source[i]` is a text. Where each line begins is indexed once, at the start.

    Args:
        files: `.jsonl` (objects with a "text") or `.txt`; a line is a document, empty lines are passed over.

    Raises:
        DataError: no such file, another ending, or no document in all of them.
    """

    def __init__(self, files: Sequence[Path | str], max_bad_fraction: float = 0.01) -> None:
        super().__init__(", ".join(map(str, files)), max_bad_fraction)
        self.files = [Path(file) for file in files]
        for file in self.files:
            if file.suffix not in _SUFFIXES:
                raise DataError(f"{file}: expected texts as {' or '.join(_SUFFIXES)}")
            if not file.is_file():
                raise DataError(f"{file}: no such file of texts")
        self.starts = [np.fromiter(line_starts(file), dtype=np.int64) for file in self.files]
        self.ends = np.cumsum([len(starts) for starts in self.starts])
        if len(self) == 0:
            raise DataError(f"{self.name}: no document in it; expected one in a line")

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def key(self, index: int) -> str:
        file, start = self._place(index)
        return f"{file} at byte {start}"

    def __getitem__(self, index: int) -> str:
        file, start = self._place(index)
        with file.open("rb") as lines:
            lines.seek(start)
            line = lines.readline()
        where = self.key(index)
        try:
            found = line.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise SampleError(f"{where}: text is not UTF-8", "not UTF-8") from None
        text = load_json_object(found, where).get("text") if file.suffix == ".jsonl" else found
        if not isinstance(text, str) or not text.strip():
            wanted = 'words, as {"text": "..."}' if file.suffix == ".jsonl" else "words"
            raise SampleError(f"{where}: the text is {text!r:.60}; expected {wanted}", "wrong type")
        check_text(text, where)
        return text.strip()

    def _place(self, index: int) -> tuple[Path, int]:
        number = int(np.searchsorted(self.ends, index, side="right"))
        before = int(self.ends[number - 1]) if number else 0
        return self.files[number], int(self.starts[number][index - before])


class TextOrder:
    """Which samples of an epoch give their place to a document, and to which: a pure function of (seed, epoch, index).

    Every epoch has equally many such places, drawn anew. Documents follow each other in a shuffled order through all
    epochs: none comes again before every other one had its turn.

    Args:
        num_samples: samples of an epoch. share: the documents' share of them. num_texts: documents.
    """

    def __init__(self, num_samples: int, share: float, num_texts: int, seed: int) -> None:
        self.num_samples, self.num_texts, self.seed = num_samples, num_texts, seed
        self.per_epoch = max(1, round(share * num_samples))
        self._order = SampleOrder(num_texts, derive_seed("texts", seed))
        self._ranks = Recent(lambda epoch: Permutation(num_samples, "places of texts", seed, epoch))

    def turn(self, index: int, epoch: int) -> tuple[int, int] | None:
        """(document, how often it had its turn before) for sample `index` of `epoch`; None if it keeps its place."""
        rank = self._ranks[epoch][index]
        if rank >= self.per_epoch:
            return None
        position = epoch * self.per_epoch + rank
        return self._order.index(position), self._order.epoch(position)
