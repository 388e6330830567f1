"""`unitok convert`: between our folders and the released checkpoint layouts."""

import argparse
from pathlib import Path

from unitok.core.errors import UserError

_FILES = (".pth", ".pt")
_RELEASED = "a folder of the released model, or an export folder"


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


def convert_mllm(arguments: argparse.Namespace) -> int:
    """A released folder of the unified model to an export folder, or an export folder to the released layout."""
    from unitok.core.errors import CheckpointError
    from unitok.core.pretrained import read_json
    from unitok.mllm import UniTokMLLMConfig

    source, target = Path(arguments.source), Path(arguments.dest)
    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source}: expected {_RELEASED} (it has no config.json)")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"{target} is not an empty folder; name a new one")
    if read_json(source / "config.json").get("model_type") == UniTokMLLMConfig.model_type:
        missing = _export_to_released(source, target, arguments.tokenizer)
    else:
        missing = _released_to_export(source, target, arguments.tokenizer)
    for line in missing:
        print(line)
    print(target)
    return 0


def _released_to_export(source: Path, target: Path, tokenizer: str | None) -> list[str]:
    """Write the export folder; what it lacks, and how to get it."""
    from unitok.mllm import UniTokMLLM
    from unitok.mllm.official import TEXT_MODEL_FILE, official_processor
    from unitok.mllm.pipeline import TOKENIZER_FOLDER

    model = UniTokMLLM.from_official(source, tokenizer=tokenizer)
    model.save_pretrained(target)
    lacking = []
    if (source / TEXT_MODEL_FILE).is_file():
        official_processor(source, model).save_pretrained(target)
    else:
        lacking.append(f"ids only: {source} has no {TEXT_MODEL_FILE}; copy the release's there and convert again")
    if model.visual_tokenizer is not None:
        model.visual_tokenizer.save_pretrained(target / TOKENIZER_FOLDER)
    else:
        lacking.append(
            "codes only: without --tokenizer unitok_tokenizer.pth the export has no visual tokenizer, which pictures "
            "and chat need"
        )
    return lacking


def _export_to_released(source: Path, target: Path, tokenizer: str | None) -> list[str]:
    """Write the released layout; what it has no place for. The visual tokenizer is a file of its own there."""
    from unitok.core.pretrained import load_model_folder
    from unitok.mllm import UniTokMLLM, UniTokProcessor
    from unitok.mllm.official import load_visual_tokenizer, save_official
    from unitok.mllm.pipeline import TOKENIZER_FOLDER
    from unitok.mllm.processor import PROCESSOR_FILE

    model = load_model_folder(UniTokMLLM, source)
    visual = source / TOKENIZER_FOLDER
    if tokenizer is not None or visual.is_dir():
        model.keep_tokenizer(load_visual_tokenizer(tokenizer or visual))
    processor = UniTokProcessor.from_pretrained(source) if (source / PROCESSOR_FILE).is_file() else None
    left_out = save_official(model, target, processor)
    lines = [f"left out, as the released layout has no place for it: {', '.join(left_out)}"] if left_out else []
    if visual.is_dir():
        lines.append(f"the visual tokenizer is a file of its own: `unitok convert tokenizer {visual} FILE.pth`")
    return lines
