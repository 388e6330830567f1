"""From images to code shards: what stage two trains on."""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils.data

from unitok.core.errors import ConfigError, UserError
from unitok.core.workers import begin_worker, loaded, loader_deaths
from unitok.data.bad import SourceError, patiently
from unitok.data.code_units import (
    UNIT_SIZE,
    CodeFolder,
    Failure,
    Unit,
    check_failures,
    known_failures,
    not_written,
    units_of,
)
from unitok.data.codes import LATENT_WIDTH, PREPROCESS, CodeSample
from unitok.data.source import Source
from unitok.data.transforms import eval_transform
from unitok.tokenizer.model import UniTok

_LOGGER = logging.getLogger(__name__)


def fingerprint(tokenizer: UniTok) -> str:
    """A short name for exactly these weights: codes of another tokenizer mean something else."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tokenizer.state_dict().items()):
        # what decides the codes; the running usage does not
        if name.startswith(("encoder.", "quant_proj.", "quantizer.")) and not name.startswith("quantizer.usage"):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Share:
    """This process's part of a job: units number rank, rank + world_size, ..."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank {self.rank} of {self.world_size}; expected 0 to {self.world_size - 1}")

    @classmethod
    def of_launcher(cls, rank: int | None = None, world_size: int | None = None) -> "Share":
        """What is given, or else what torchrun, deepspeed or srun say; alone without any."""
        if (rank is None) != (world_size is None):
            raise ConfigError("--rank and --world-size go together; give both or none")
        if rank is not None and world_size is not None:
            return cls(rank, world_size)
        for names in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
            values = [os.environ.get(name) for name in names]
            if all(value is not None and value.isdecimal() for value in values):
                return cls(*(int(value or 0) for value in values))
        return cls()


def extract_codes(
    tokenizer: UniTok,
    source: Source,
    out: Path,
    batch_size: int = 64,
    progress: bool = True,
    latents: bool = False,
    share: Share | None = None,
    num_workers: int = 0,
    unit_size: int = UNIT_SIZE,
    preprocess: str | None = None,
) -> Path:
    """Encode every image of `source` and write code shards with their header into `out`; its conversations without an
    image come behind, as they are.

    One shard of the source gives one of codes. What is complete already is kept, so that the same call goes on where
    another was cut short, also killed. Each process does its `share`; who finds all done writes the header, which
    training asks for. The bytes do not depend on the number of processes, nor on interruptions.

    Args:
        latents: with the vectors before quantization, for models that read those (`visual_input: continuous`).
        num_workers: processes that read images ahead. unit_size: images of a code shard where the source is no shards.
        preprocess: one of `unitok.data.preprocess.PREPROCESS` (None: the tokenizer's own). The header says which, and
            a model that is trained on the codes prepares the pictures of chats in the same way.

    Raises:
        DataError: more images than `source.max_bad_fraction` failed, or `out` holds codes of something else.
    """
    header = _header(tokenizer, latents, preprocess or tokenizer.config.preprocess)
    job = _Job(tokenizer, source, CodeFolder(out, header), batch_size, num_workers, latents)
    units, share = units_of(source, unit_size), share or Share()
    own = units[share.rank :: share.world_size]
    failed, total = 0, len(source) + source.num_text_only
    with loader_deaths(), ProgressLog(out / f"extract-rank{share.rank}.jsonl", total, progress) as log:
        for unit in own:
            said = job.folder.done(unit, source)
            if said is None:
                said = log.timed(unit, lambda unit=unit: job.encode_unit(unit, log.advance))
            failed += len(said["failures"])
            check_failures(out, failed, total, source.max_bad_fraction)
    job.folder.finish(units, source.max_bad_fraction)
    return out


def _header(tokenizer: UniTok, latents: bool, preprocess: str) -> dict[str, Any]:
    config = tokenizer.config
    header = {
        "tokenizer": fingerprint(tokenizer),
        "num_codebooks": config.num_codebooks,
        "codebook_size": config.codebook_size,
        "image_size": config.image_size,
        "num_positions": config.num_positions,
        PREPROCESS: preprocess,
    }
    return header | ({LATENT_WIDTH: config.code_width} if latents else {})


class _Images(torch.utils.data.Dataset):
    """Images of a source ready for the encoder: (sample without its image, pixels), or (key, why it failed). Where
    there is no image to be read, None are the pixels. An error that ends the job is given, not raised: torch would make
    a traceback of what a worker raises."""

    def __init__(self, source: Source, image_size: int, preprocess: str) -> None:
        self.source, self.image_size, self.preprocess = source, image_size, preprocess

    def __getitem__(self, index: int) -> tuple[CodeSample, torch.Tensor | None] | Failure | SourceError:
        try:
            return patiently(lambda: self._read(index), lambda: self.source.place(index))
        except SourceError as error:
            return error
        except (UserError, OSError) as error:
            return self.source.key(index), " ".join(str(error).split())

    def _read(self, index: int) -> tuple[CodeSample, torch.Tensor | None]:
        empty = torch.zeros(0, dtype=torch.int64)
        if index >= len(self.source):
            key, said = self.source.key(index), self.source.read_words(index)
            return CodeSample(key, empty, [], [], said.conversations, said.meta, has_image=False), None
        found = self.source.read(index)
        pixels = eval_transform(found.image, self.image_size, self.preprocess)
        words = (found.captions, found.questions, found.conversations, found.meta)
        return CodeSample(found.key, empty, *words), pixels


@dataclass
class _Job:
    tokenizer: UniTok
    source: Source
    folder: CodeFolder
    batch_size: int
    num_workers: int
    latents: bool

    def encode_unit(self, unit: Unit, advance: Callable[[int], None]) -> dict[str, Any]:
        failures = known_failures(self.source, unit)

        def samples() -> Iterator[CodeSample]:
            for batch in self._batches(unit):
                for error in (item for item in batch if isinstance(item, SourceError)):
                    raise error
                good = [item for item in batch if isinstance(item[0], CodeSample)]
                for key, reason in (item for item in batch if not isinstance(item[0], CodeSample)):
                    _LOGGER.warning("%s: sample %s left out: %s", self.source.name, key, reason)
                    failures.append((key, reason))
                if good:
                    yield from self._encode(good)
                advance(len(batch))

        return self.folder.write(unit, self.source, samples(), failures)

    def _batches(self, unit: Unit) -> Iterable[list[Any]]:
        """Never across units, so that a unit's bytes are its own."""
        config = self.tokenizer.config
        images = _Images(self.source, config.image_size, self.folder.header[PREPROCESS])
        parts = [
            list(range(start, min(start + self.batch_size, unit.stop)))
            for start in range(unit.start, unit.stop, self.batch_size)
        ]
        if self.num_workers == 0:
            return ([images[index] for index in part] for part in parts)
        loader = torch.utils.data.DataLoader(
            images,
            batch_sampler=parts,
            num_workers=self.num_workers,
            collate_fn=list,
            generator=torch.Generator(),  # the loader draws a seed, which must not be the caller's
            worker_init_fn=begin_worker,
        )
        return loaded(loader)

    @torch.no_grad()
    def _encode(self, batch: list[tuple[CodeSample, torch.Tensor | None]]) -> Iterator[CodeSample]:
        self.tokenizer.eval()
        pictured = [(sample, pixels) for sample, pixels in batch if pixels is not None]
        if pictured:
            pixels = torch.stack([pixels for _, pixels in pictured]).to(self.tokenizer.device)
            if self.latents:
                codes, vectors = self.tokenizer.codes_and_latents(pixels)
                codes, vectors = codes.cpu(), vectors.half().cpu()
            else:
                codes, vectors = self.tokenizer.encode(pixels).cpu(), None
        for row, (sample, _) in enumerate(pictured):
            sample.codes = codes[row]
            sample.latents = None if vectors is None else vectors[row]
        yield from (sample for sample, _ in batch)


class ProgressLog:
    """A bar, and one JSON line for each unit that this process encoded: images, failures, seconds, images/s."""

    def __init__(self, path: Path, total: int, progress: bool) -> None:
        from tqdm import tqdm

        self._path = path
        self._bar = tqdm(total=total, desc="encode", unit="image", disable=None if progress else True)

    def __enter__(self) -> "ProgressLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, images: int) -> None:
        self._bar.update(images)

    def timed(self, unit: Unit, encode: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        started = time.perf_counter()
        said = encode()
        seconds = time.perf_counter() - started
        record = {
            "unit": unit.name,
            "input": said["input"],
            "images": said["count"],
            "failures": len(said["failures"]),
            "seconds": round(seconds, 3),
            "images_per_s": round(said["count"] / max(seconds, 1e-9), 2),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self._write(json.dumps(record) + "\n")
        return said

    def _write(self, line: str) -> None:
        """One line, or nothing where the disk is full."""
        before = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a", encoding="utf-8") as log:
                log.write(line)
        except OSError as error:
            with contextlib.suppress(OSError):  # the file may not even have been made
                os.truncate(self._path, before)
            raise not_written(self._path, error) from None
