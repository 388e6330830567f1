"""Class-conditional training: images of class folders, whose only words are their class's token.

A class token, `<class_7>`, is one piece of the text tokenizer (`backbone.class_tokens`), so that a class is one id
before the image's codes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unitok.core.errors import DataError
from unitok.data.codes import CodeSample, CodeSource


def class_token(number: int) -> str:
    """The word for class `number`, counted from 0."""
    return f"<class_{number}>"


def read_classes(path: Path | str) -> list[str]:
    """Folder names of a file, one a line; the line is the class's number. DataError where one stands twice."""
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.classes={path} cannot be read ({type(error).__name__}); expected a folder a line"
        ) from None
    if not names or len(set(names)) < len(names):
        raise DataError(
            f"data.classes={path} holds {len(names)} names, {len(set(names))} of them different; expected all"
        )
    return names


class ClassSource(CodeSource):
    """Code shards of images in class folders (keys CLASS/NAME), each with its class token as the only caption."""

    def __init__(self, folder: Path | str, classes: Path | str, *options: Any) -> None:
        super().__init__(folder, *options)
        self.numbers = {name: number for number, name in enumerate(read_classes(classes))}

    def _sample(self, index: int, members: Mapping[str, bytes]) -> CodeSample:
        sample = super()._sample(index, members)
        name = sample.key.partition("/")[0]
        if "/" not in sample.key or name not in self.numbers:
            raise DataError(
                f"{self.folder}: {sample.key} is in none of the {len(self.numbers)} folders of data.classes"
            )
        sample.captions, sample.questions, sample.conversations = [class_token(self.numbers[name])], [], []
        return sample
