"""Images per second and core from tar shards to training batches: ours, plain webdataset and PIL alone, in turns.

    python scripts/benchmark_input.py [--images 256] [--repeats 5] [--size 256] [--batch 64] [--out FILE]

Every side reads the same JPEG files, made here, and takes a random resized crop of at least half of the image with a
bicubic filter, mirrored half of the time. webdataset's pipeline is the one of its documentation: decode("pil"),
torchvision's transforms, to_tuple, batched. "PIL alone" has the files' bytes in memory and makes no tensors: a bound
for all that decode by PIL. Times are CPU seconds of one thread; the ratio is that of the medians.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unitok.core.rng import numpy_rng
from unitok.data.images import ImageBatches, ImageDataConfig
from unitok.data.shards import ShardReader, write_shards
from unitok.data.transforms import as_pixels, random_box

SIZES = ((256, 256), (512, 384), (1024, 768))
MIN_AREA = 0.5
OURS, OURS_FLOAT, OURS_FULL, PLAIN, PIL_ALONE = (
    "ours",
    "ours, and floats on this core",
    "ours, without draft",
    "webdataset + torchvision",
    "PIL alone",
)


def photo(width: int, height: int, rng: np.random.Generator) -> bytes:
    """A JPEG (quality 90) with about a photo's bytes per pixel: smooth colours, some edges, some noise."""
    small = rng.integers(0, 256, (max(2, height // 32), max(2, width // 32), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    for _ in range(6):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        smooth[y : y + height // 4, x : x + width // 4] *= rng.uniform(0.5, 1.3)
    noisy = smooth + rng.normal(0, 5, (height, width, 1)).astype(np.float32)
    stream = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def write_photos(folder: Path, count: int, width: int, height: int) -> Path:
    """One shard in img2dataset's layout."""
    samples = (
        {
            "__key__": f"{index:09d}",
            "jpg": photo(width, height, numpy_rng("photo", width, index)),
            "txt": f"photo number {index}",
            "json": {"caption": f"photo number {index}", "width": width, "height": height, "key": f"{index:09d}"},
        }
        for index in range(count)
    )
    return write_shards(samples, folder, max_per_shard=count)[0]


def ours(shard: Path, size: int, batch: int, floats: bool = False, draft: bool = True) -> Callable[[], int]:
    """Batches of the training loader over a shuffled epoch: uint8, as they go to the device, or floats."""
    batches = ImageBatches(ImageDataConfig(source=str(shard), augment="crop", draft=draft), size, seed=0)

    def epoch() -> int:
        order = numpy_rng("order").permutation(len(batches)).tolist()
        count = 0
        for start in range(0, len(order), batch):
            pixels = batches.load(order[start : start + batch], 0)["pixels"]
            count += len(as_pixels(pixels) if floats else pixels)
        return count

    return epoch


def plain_webdataset(shard: Path, size: int, batch: int) -> Callable[[], int]:
    """webdataset's own pipeline, without shuffling, which costs it nothing then."""
    import webdataset
    from torchvision import transforms

    bicubic = transforms.InterpolationMode.BICUBIC
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(MIN_AREA, 1.0), interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )

    def epoch() -> int:
        data = webdataset.WebDataset(str(shard), shardshuffle=False).decode("pil").to_tuple("jpg", "txt")
        return sum(len(pixels) for pixels, _ in data.map_tuple(transform, str).batched(batch))

    return epoch


def pil_alone(shard: Path, size: int, batch: int) -> Callable[[], int]:
    """Decoding, cropping and resizing of bytes in memory."""
    reader = ShardReader(shard)
    files = [reader.read(index, ["jpg"])["jpg"] for index in range(len(reader))]

    def epoch() -> int:
        for index, data in enumerate(files):
            image = Image.open(io.BytesIO(data)).convert("RGB")
            box = random_box(*image.size, numpy_rng("box", index), MIN_AREA)
            image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        return len(files)

    return epoch


def rounds(sides: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Images per CPU second of each side: medians over `repeats` rounds in which every side has its turn."""
    for run in sides.values():
        run()  # warm-up
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.process_time()
            count = run()
            rates[name].append(count / (time.process_time() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def measure(folder: Path, images: int, repeats: int, size: int, batch: int) -> Iterator[dict[str, Any]]:
    """A row of figures for each of SIZES."""
    for width, height in SIZES:
        shard = write_photos(folder / f"{width}x{height}", images, width, height)
        sides = {
            OURS: ours(shard, size, batch),
            OURS_FLOAT: ours(shard, size, batch, floats=True),
            OURS_FULL: ours(shard, size, batch, draft=False),
            PLAIN: plain_webdataset(shard, size, batch),
            PIL_ALONE: pil_alone(shard, size, batch),
        }
        rates = rounds(sides, repeats)
        kilobytes = shard.stat().st_size / images / 1024
        ratios = {name: rate / rates[PLAIN] for name, rate in rates.items()}
        yield {"width": width, "height": height, "kilobytes": kilobytes, "images_per_second": rates, "ratio": ratios}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256, help="of each size (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", type=int, default=256, help="pixels per side of a crop (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(Path(folder), arguments.images, arguments.repeats, arguments.size, arguments.batch):
            rows.append(row)
            print(f"{row['width']} x {row['height']} JPEG of {row['kilobytes']:.0f} kB to {arguments.size} px")
            for name, rate in row["images_per_second"].items():
                print(f"  {rate:7.0f} images/s {row['ratio'][name]:5.2f} x  {name}")
    if arguments.out:
        arguments.out.write_text(json.dumps({"size": arguments.size, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
