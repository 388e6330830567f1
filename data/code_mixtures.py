"""Several sources of codes as one, each with its share of every epoch of stage two (see `mixtures`)."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unitok.core.errors import DataError
from unitok.data.classes import ClassSource
from unitok.data.codes import PREPROCESS, TEXT_ONLY, CodeSource
from unitok.data.mixtures import Mixed, SourceShare, parse_mixture

_LOGGER = logging.getLogger(__name__)


class CodeMixture(Mixed[CodeSource]):
    """A mixture of code folders of one tokenizer, which each member has been checked against. Members watch over their
    own bad samples: `source, number = mixture.turn(index, epoch)`, then `source.first_good(number, ...)`.

    header: of the first member, with the count of all.
    """

    def __init__(self, members: Sequence[CodeSource], shares: Sequence[SourceShare], seed: int = 0) -> None:
        self.name = " + ".join(member.name for member in members)
        self.share_out(members, shares, seed)
        ways = {member.name: member.header[PREPROCESS] for member in members}
        if len(set(ways.values())) > 1:
            raise DataError(
                f"{self.name}: pictures became squares in different ways ({ways}), and the model would see those of "
                "chats in one of them; encode them alike (unitok data codes --preprocess)"
            )
        text_only = sum(member.header[TEXT_ONLY] for member in members)
        self.header = members[0].header | {"count": len(self), TEXT_ONLY: text_only}

    def read_latents(self) -> None:
        """From now on samples come with their latents; DataError where a member holds none."""
        for member in self.parts:
            member.read_latents()


def open_codes(
    spec: str | Sequence[SourceShare],
    expect: Mapping[str, Any],
    max_bad_fraction: float = 0.01,
    classes: Path | str | None = None,
    seed: int = 0,
    preprocess: str | None = None,
) -> CodeSource | CodeMixture:
    """Opens the codes that stage two trains on.

    Args:
        spec: a folder of code shards or a brace pattern of several; or a mixture of these: a list of {source, weight},
            "mix:WEIGHT=FOLDER;WEIGHT=FOLDER" or a YAML file that holds such a list.
        expect: header fields that must hold for each folder.
        classes: file of class folders: the words are then class tokens (`ClassSource`).
        seed: of a mixture's order.
        preprocess: see `CodeSource`.

    Raises:
        DataError: see `CodeSource` and `parse_mixture`.
    """

    def open_one(folder: str) -> CodeSource:
        if classes is None:
            return CodeSource(folder, expect, max_bad_fraction, preprocess)
        return ClassSource(folder, classes, expect, max_bad_fraction, preprocess)

    shares = parse_mixture(spec)
    if shares is None:
        return open_one(str(spec))
    mixture = CodeMixture([open_one(share.source) for share in shares], shares, seed)
    _LOGGER.info("%s", mixture.describe())
    return mixture
