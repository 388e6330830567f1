"""`unitok eval speed mllm`: how fast a unified model samples images, answers and trains, beside a plain loop."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unitok.commands.speed import DEVICES, PRECISIONS
from unitok.core.errors import UserError

if TYPE_CHECKING:
    from unitok.eval.speed import Setting
    from unitok.eval.speed_mllm import MllmSpeedConfig
    from unitok.mllm import UniTokMLLM

DEFAULT_CONFIG = "mllm/bench.yaml"
HEADERS = ("part", "tokens/s", "images/s", "ms a position", "floor ms", "x floor", "GFLOP/s", "MFU", "note")
# What one waits for: a GPU runs large batches in the time of small ones.
BATCHES = {"cpu": (1, 2, 4), "cuda": (1, 2, 4, 8, 16, 32, 64)}
POSITIONS = {"cpu": (16, 64), "cuda": (64, 256, 1024)}
CODEBOOKS = (1, 2, 4, 8)


def add_mllm_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of the command, and the command itself (`run`)."""
    from unitok.cli import positive_int

    parser.add_argument("--model", metavar="DIR", help="folder of a trained model")
    parser.add_argument("--config", metavar="FILE", help=f"YAML file of sizes (default: {DEFAULT_CONFIG})")
    for name, what in (("batches", "images"), ("positions", "image positions"), ("codebooks", "codes a position")):
        parser.add_argument(f"--{name}", type=int_list, metavar="N,N,...", help=f"numbers of {what} to go through")
    parser.add_argument("--weights", choices=("int8", "int4"), help="quantize the linear layers first")
    parser.add_argument("--repeats", type=positive_int, default=3, help="the best counts (default: %(default)s)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="default: %(default)s")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default: a GPU if there is one")
    for name in ("baseline", "answers", "train"):
        parser.add_argument(f"--no-{name}", action="store_true", help=f"leave the {name} part out")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts and weights (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured, and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of --config")
    parser.set_defaults(run=("speed_mllm", "mllm"), positional="overrides")


def int_list(text: str) -> tuple[int, ...]:
    """Numbers of at least 1 between commas."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers between commas, such as 1,2,4") from error
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers of at least 1")
    return numbers


def mllm(arguments: argparse.Namespace) -> int:
    """Sampling by batch, positions and codes; against a plain loop; answers; the training step."""
    import torch

    from unitok.eval.speed import Setting

    config = _config(arguments)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no GPU here; use --device auto or cpu")
    cuda = torch.cuda.is_available() and arguments.device != "cpu"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    setting = Setting(device, arguments.precision, arguments.repeats, arguments.seed)
    arguments.batches = arguments.batches or BATCHES[device.type]
    arguments.codebooks = arguments.codebooks or (() if arguments.model or arguments.weights else CODEBOOKS)
    _check(arguments, config)
    if arguments.dry_run:
        parts = [name for name in ("baseline", "answers", "train") if not getattr(arguments, f"no_{name}")]
        positions = arguments.positions or POSITIONS[device.type]
        print(
            f"would measure: batches {arguments.batches}, positions {positions}, codes a position "
            f"{arguments.codebooks or '-'}, {', '.join(parts) or 'nothing else'}; {setting.precision} on {device.type}"
        )
        return 0
    try:
        found = _measure(arguments, config, setting)
    except torch.OutOfMemoryError as error:
        raise UserError("the GPU's memory is too small for this; give smaller --batches or --weights int8") from error
    return _finish(arguments, config, setting, found)


def _config(arguments: argparse.Namespace) -> "MllmSpeedConfig":
    from unitok.core.config import load_config
    from unitok.eval.speed_mllm import MllmSpeedConfig

    if arguments.model is not None and (arguments.config is not None or arguments.overrides):
        raise UserError("give one of --model DIR and --config FILE [key=value ...], not both")
    return load_config(MllmSpeedConfig, arguments.config or DEFAULT_CONFIG, arguments.overrides)


def _check(arguments: argparse.Namespace, config: "MllmSpeedConfig") -> None:
    """UserError for options that cannot be met, ConfigError for sizes of a backbone that do not fit."""
    from unitok.mllm.build import new_text_config

    if arguments.codebooks and (arguments.model or arguments.weights):
        raise UserError("--codebooks makes new models with random weights; leave out --model and --weights")
    if arguments.weights and not arguments.no_train:
        raise UserError("--weights: quantized weights are not trained; add --no-train")
    if arguments.model is None:
        if config.model.image_token_id is None:
            raise UserError(
                "model.image_token_id is not set: answers and training need the placeholder of image positions"
            )
        new_text_config(config.text_config, "text_config")


def _model(arguments: argparse.Namespace, config: "MllmSpeedConfig", setting: "Setting") -> "UniTokMLLM":
    import torch

    from unitok.core.pretrained import load_model_folder
    from unitok.eval.speed_mllm import random_model
    from unitok.mllm import UniTokMLLM
    from unitok.mllm.quantize import quantize_weights

    if arguments.model is None:
        model = random_model(config, setting)
    else:
        dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
        model = load_model_folder(UniTokMLLM, arguments.model, dtype=dtype).to(setting.device).eval()
    return quantize_weights(model, arguments.weights) if arguments.weights else model


def _measure(arguments: argparse.Namespace, config: "MllmSpeedConfig", setting: "Setting") -> dict[str, Any]:
    """Figures of every part, training last: it changes the weights."""
    from unitok.eval import speed_mllm as speed
    from unitok.eval.speed_chat import answer_speed

    bandwidth = speed.memory_bandwidth(setting)
    model, sizes, positions = _model(arguments, config, setting), config.sampling, POSITIONS[setting.device.type]
    if arguments.model is not None:  # the sizes that nobody gave were chosen for other models
        most = model.config.num_image_positions
        sizes = sizes.model_copy(update={"num_positions": min(sizes.num_positions, most)})
        positions = [count for count in positions if count <= most] or [most]
    arguments.positions = arguments.positions or positions
    found: dict[str, Any] = {"bytes_per_second": bandwidth, "bytes_per_position": speed.bytes_per_position(model)}

    def sample(of: "UniTokMLLM", images: int, positions: int) -> dict[str, Any]:
        return speed.sampling_speed(of, sizes, images, positions, setting, bandwidth)

    found["batches"] = [sample(model, images, sizes.num_positions) for images in arguments.batches]
    found["positions"] = [sample(model, sizes.images, positions) for positions in arguments.positions]
    found["codebooks"] = []
    for count in arguments.codebooks:
        other = speed.random_model(config, setting, num_codebooks=count)
        found["codebooks"].append({"num_codebooks": count} | sample(other, sizes.images, sizes.num_positions))
    if not arguments.no_baseline:
        found["baseline"] = [speed.plain_loop(model, sizes, cache, setting) for cache in ("consistent", "released")]
    if not arguments.no_answers:
        found["answers"] = answer_speed(model, config.answers, setting.repeats)
    if not arguments.no_train:
        found["train"] = speed.training_speed(model, config.training, setting)
    return found


def _finish(arguments: argparse.Namespace, config: "MllmSpeedConfig", setting: "Setting", found: dict[str, Any]) -> int:
    """Print one table and write the figures with their protocol."""
    import torch

    from unitok.eval.results import print_table, protocol, run_results, write_run
    from unitok.eval.speed import device_peak
    from unitok.eval.speed_mllm import speed_metrics

    print_table(_rows(found), HEADERS)
    rate = found["bytes_per_second"] / 1e9
    print(
        f"floor: {found['bytes_per_position'] / 1e6:.1f} MB of weights a position, {rate:.1f} GB/s by summing a tensor"
    )
    if arguments.out:
        name = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "cpu"
        block = protocol(
            "unified model speed",
            setting.seed,
            {"repeats": setting.repeats},
            model=arguments.model,
            config=config.model_dump(mode="json") if arguments.model is None else None,
            weights=arguments.weights,
            device=name,
            threads=torch.get_num_threads(),
            precision=setting.precision,
            peak_flops=device_peak(setting.device, setting.precision),
            clock="wall time" if setting.device.type == "cuda" else "CPU time of the process",
        )
        metrics, model = speed_metrics(found, setting.repeats), Path(arguments.model) if arguments.model else None
        results = run_results("unified model speed", metrics, block, [setting.seed], model)
        print(write_run(arguments.out, {**results, **found}))
    return 0


def _rows(found: dict[str, Any]) -> list[list[str]]:
    rows = [_sampling_row(f"{part['images']} images", part) for part in found["batches"]]
    rows += [_sampling_row(f"{part['positions']} positions", part) for part in found["positions"]]
    rows += [_sampling_row(f"{part['num_codebooks']} codes a position", part) for part in found["codebooks"]]
    for part in found.get("baseline", []):
        equal = "equal codes" if part["equal_codes"] else "DIFFERENT CODES"
        note = f"{part['ratio']:.2f}x the plain loop's {part['plain_visual_tokens_per_second']:.1f}, {equal}"
        rate = f"{part['visual_tokens_per_second']:.1f}"
        rows.append([f"plain loop, {part['embedder_cache']}", rate, *["-"] * 6, note])
    if "answers" in found:
        rows += [_answer_row(part) for part in found["answers"]]
    if "train" in found:
        part = found["train"]
        mfu = "-" if part["mfu"] is None else f"{100 * part['mfu']:.1f}%"
        note = f"all {part['tokens_per_second']:.1f}, batch {part['batch_size']}, packed"
        rate = f"{part['visual_tokens_per_second']:.1f}"
        rows.append(["train", rate, *["-"] * 4, f"{part['gflop_per_second']:.1f}", mfu, note])
    return rows


def _answer_row(part: dict[str, Any]) -> list[str]:
    equal = "equal ids" if part["same_ids"] else "DIFFERENT IDS"
    decoding = part["decode_tokens_per_second"]
    later = "" if decoding is None else f"; after the first id {decoding:.1f}"
    note = f"{part['ratio']:.2f}x generate, {equal}{later}"
    return [f"answers: {part['way']}", f"{part['answer_tokens_per_second']:.1f}", *["-"] * 6, note]


def _sampling_row(name: str, part: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{part['visual_tokens_per_second']:.1f}",
        f"{part['images_per_second']:.3g}",
        f"{part['ms_per_position']:.2f}",
        f"{part['floor_ms_per_position']:.2f}",
        f"{part['times_floor']:.2f}",
        "-",
        "-",
        f"{part['images']} x {part['positions']}",
    ]
