"""`unitok convert`: between our folders and the released checkpoint layouts."""

import argparse
from pathlib import Path

from unitok.core.errors import UserError

_FILES = (".pth", ".pt")


def convert_tokenizer(arguments: argparse.Namespace) -> int:
    """A released checkpoint file to a UniTok folder, or a UniTok folder to a released file."""
    from unitok.core.pretrained import load_model_folder
    from unitok.tokenizer import UniTok
    from unitok.tokenizer.official import save_official

    source, target = Path(arguments.source), Path(arguments.dest)
    if source.is_dir():
        if target.suffix not in _FILES or target.is_dir():
            raise UserError(
                f"{source} is a folder, so DEST must be a released file ending in {' or '.join(_FILES)}; got {target}"
            )
        left_out = save_official(load_model_folder(UniTok, source), target)
        if left_out:
            print(f"left out, as the released layout has no place for it: {', '.join(left_out)}")
    else:
        if target.suffix in (*_FILES, ".safetensors", ".bin") or target.is_file():
            raise UserError(f"{source} is a released file, so DEST must be a folder; got {target}")
        if target.is_dir() and any(target.iterdir()):
            raise UserError(f"{target} is not empty; name a new folder")
        UniTok.from_official(source).save_pretrained(target)
    print(target)
    return 0
