"""`unitok eval speed tokenizer`: how fast it encodes, decodes, searches its codebooks and trains, on random pixels."""

import argparse
from typing import TYPE_CHECKING, Any

from unitok.core.errors import UserError

if TYPE_CHECKING:
    from unitok.eval.speed import Setting
    from unitok.tokenizer import UniTok, UniTokConfig
    from unitok.tokenizer.task import TokenizerTrainConfig

PRECISIONS = ("fp32", "bf16")
DEVICES = ("auto", "cpu", "cuda")
HEADERS = ("part", "per second", "of", "ms a call", "peak MB", "GFLOP each", "GFLOP/s", "MFU")


def add_speed_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of the command, and the command itself (`run`)."""
    from unitok.cli import positive_int

    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="folder of a trained tokenizer (default: the demo's); trains its sizes with defaults",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of a stage-one run, such as tokenizer/shapes.yaml")
    parser.add_argument("--batch-size", type=positive_int, default=32, help="images a call (default: %(default)s)")
    parser.add_argument(
        "--train-batch-size",
        type=positive_int,
        metavar="N",
        help="images a training micro-batch (default: the configuration's)",
    )
    parser.add_argument("--image-size", type=positive_int, metavar="PX", help="pixels per side (default: the model's)")
    parser.add_argument("--repeats", type=positive_int, default=5, help="the median counts (default: %(default)s)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="bf16 = autocast; default: the configuration's, or fp32"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default: a GPU if there is one")
    parser.add_argument("--no-train", action="store_true", help="leave the training step out")
    parser.add_argument("--seed", type=int, default=0, help="seed of pixels and weights (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured, and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of --config")
    parser.set_defaults(run=("speed", "tokenizer"), positional="overrides")


def tokenizer(arguments: argparse.Namespace) -> int:
    """Encoding and decoding (images/s), codebook search (positions/s), training step (images/s), memory and FLOPs."""
    from unitok.cli import DEFAULT_TOKENIZER

    _check(arguments)
    if arguments.tokenizer is None and arguments.config is None:
        arguments.tokenizer = DEFAULT_TOKENIZER
    config = _training_config(arguments)
    setting = _setting(arguments, config)
    inference = f"encode, decode and search, {arguments.batch_size} images of {config.model.image_size} px a call"
    training = "" if arguments.no_train else f"; a training step of {config.engine.micro_batch_size} a micro-batch"
    if arguments.dry_run:
        print(f"would measure: {inference}{training}; {setting.precision} on {setting.device.type}")
        return 0
    return _finish(arguments, config, setting, _measure(arguments, config, setting))


def _check(arguments: argparse.Namespace) -> None:
    """UserError for options that contradict each other or cannot be met."""
    import torch

    from unitok.tokenizer.configuration import DOWNSAMPLING

    if arguments.tokenizer is not None and arguments.config is not None:
        raise UserError("give one of --tokenizer DIR and --config FILE, not both")
    if arguments.overrides and arguments.config is None:
        raise UserError(f"{arguments.overrides[0]}: settings go with --config, not with --tokenizer")
    for name, known in (("precision", PRECISIONS), ("device", DEVICES)):
        value = getattr(arguments, name)
        if value not in known and not (name == "precision" and value is None):
            raise UserError(f"--{name} {value}: expected one of {', '.join(known)}")
    for name in ("batch_size", "train_batch_size", "image_size", "repeats"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if arguments.image_size is not None and arguments.image_size % DOWNSAMPLING:
        raise UserError(f"--image-size {arguments.image_size} is not a multiple of {DOWNSAMPLING}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no GPU here; use --device auto or cpu")


def _training_config(arguments: argparse.Namespace) -> "TokenizerTrainConfig":
    """The checked configuration of the run whose step is measured; also that of the model."""
    from unitok.commands.train import stage_config
    from unitok.tokenizer.settings import check_settings, model_config

    if arguments.config is not None:
        config = stage_config("tokenizer", arguments.config, arguments.overrides)
    else:
        config = _default_config(arguments.tokenizer)
    if arguments.image_size is not None:
        config.model.image_size = arguments.image_size
    if arguments.train_batch_size is not None:
        config.engine.micro_batch_size = arguments.train_batch_size
    if arguments.precision == "fp32":
        config.engine.precision = "fp32"
    elif arguments.precision == "bf16" and config.engine.precision == "fp32":
        config.engine.precision = "autocast"
    check_settings(config)
    model_config(config.model)
    return config


def _default_config(folder: str) -> "TokenizerTrainConfig":
    """Default settings of a run with the sizes of the tokenizer in `folder`."""
    from pathlib import Path

    from unitok.core.pretrained import check_model_folder
    from unitok.tokenizer import UniTokConfig
    from unitok.tokenizer.settings import UniTokSizes
    from unitok.tokenizer.task import TokenizerTrainConfig

    check_model_folder(Path(folder), UniTokConfig.model_type)
    model = UniTokConfig.from_pretrained(folder)
    sizes = {name: getattr(model, name) for name in UniTokSizes.model_fields}
    sizes["distill_dim"] = None  # goes with a teacher, which the folder does not name
    loss = {} if model.text_tower is not None else {"contrastive": 0.0}
    return TokenizerTrainConfig.model_validate({"output_dir": folder, "model": sizes, "loss": loss})


def _setting(arguments: argparse.Namespace, config: "TokenizerTrainConfig") -> "Setting":
    import torch

    from unitok.eval.speed import Setting

    cuda = torch.cuda.is_available() and arguments.device != "cpu"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    precision = "fp32" if config.engine.precision == "fp32" else "bf16"
    return Setting(device, precision, arguments.repeats, arguments.seed)


def _measure(
    arguments: argparse.Namespace, config: "TokenizerTrainConfig", setting: "Setting"
) -> dict[str, dict[str, Any]]:
    """Figures of every part."""
    import torch

    from unitok.eval.speed import free_memory, inference_speed, measured_config, training_speed
    from unitok.tokenizer.settings import model_config

    def build() -> "UniTok":
        return _model(arguments.tokenizer, model_config(config.model), setting)

    option = "--batch-size"
    try:
        found = inference_speed(build, config.model.image_size, arguments.batch_size, setting)
        free_memory(setting.device)
        if not arguments.no_train:
            option = "--train-batch-size"
            found["train"] = training_speed(measured_config(config), setting)
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory is too small for this {option}; give a smaller one") from error
    return found


def _model(folder: str | None, config: "UniTokConfig", setting: "Setting") -> "UniTok":
    """The tokenizer in `folder`, or one of these sizes with random weights, made right on the device."""
    import torch

    from unitok.core.pretrained import load_model_folder
    from unitok.core.rng import derive_seed
    from unitok.tokenizer import UniTok

    if folder is not None:
        return load_model_folder(UniTok, folder).to(setting.device)
    torch.manual_seed(derive_seed("tokenizer", setting.seed))
    with torch.device(setting.device):
        return UniTok(config)


def _finish(
    arguments: argparse.Namespace,
    config: "TokenizerTrainConfig",
    setting: "Setting",
    found: dict[str, dict[str, Any]],
) -> int:
    """Print one table and write the figures with their protocol."""
    from unitok.eval.results import print_table, protocol, write_results

    print_table([_row(name, figures) for name, figures in found.items()], HEADERS)
    if arguments.out:
        counts = {"batch_size": arguments.batch_size, "repeats": setting.repeats}
        if "train" in found:
            counts["train_batch_size"] = config.engine.micro_batch_size
        block = protocol("tokenizer speed", setting.seed, counts, **_details(arguments, config, setting, found))
        print(write_results(arguments.out, {**found, "protocol": block}))
    return 0


def _row(name: str, figures: dict[str, Any]) -> list[str]:
    unit = "position" if "positions_per_second" in figures else "image"
    rate, flops = figures[f"{unit}s_per_second"], figures[f"gflop_per_{unit}"]
    mfu = "-" if figures["mfu"] is None else f"{100 * figures['mfu']:.1f}%"
    return [
        name,
        f"{rate:.4g}" if rate < 1000 else f"{rate:.0f}",
        f"{unit}s",
        f"{1000 * figures['seconds']:.4g}",
        f"{figures['peak_memory_mb']:.0f}",
        f"{flops:.4g}",
        f"{figures['gflop_per_second']:.4g}",
        mfu,
    ]


def _details(
    arguments: argparse.Namespace, config: "TokenizerTrainConfig", setting: "Setting", found: dict[str, Any]
) -> dict[str, Any]:
    """What besides counts and versions decides the figures."""
    import torch

    from unitok.eval.speed import device_peak, uses_perceptual_weights

    name = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "cpu"
    details: dict[str, Any] = {
        "tokenizer": arguments.tokenizer,
        "config": arguments.config,
        "overrides": list(arguments.overrides),
        "image_size": config.model.image_size,
        "device": name,
        "threads": torch.get_num_threads(),
        "precision": setting.precision,
        "peak_flops": device_peak(setting.device, setting.precision),
        "flops": "2 per multiply-add, as executed; training: forward and backward passes, nothing computed again",
        "peak_memory": "allocated by tensors" if setting.device.type == "cuda" else "growth of resident memory",
    }
    if "train" in found:
        details["training"] = {
            "engine": config.engine.model_dump(mode="json"),
            "loss": config.loss.model_dump(exclude={"lpips_weights"}),
            "reconstruction_batch_size": config.reconstruction_batch_size,
            "gradient_checkpointing": config.gradient_checkpointing,
            "compile": config.compile,
            "discriminator": config.discriminator.kind if config.discriminator.enabled else None,
            "perceptual_weights": "random" if uses_perceptual_weights(config) else None,
        }
    return details
