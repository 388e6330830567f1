"""`unitok eval t2i`: images for DPG-Bench, GenAI-Bench and MJHQ-30K; also the options and steps that all commands
share which draw a benchmark's images."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unitok.commands.use import load_pipeline
from unitok.core.errors import DataError, UserError

if TYPE_CHECKING:
    from unitok.mllm.pipeline import UniTokPipeline

SAMPLER = ("guidance_scale", "temperature", "depth_temperature", "top_k", "top_p")
_BENCHES = ("dpg", "genai", "mjhq")


def add_t2i_arguments(parser: argparse.ArgumentParser, model: str) -> None:
    """Options of `unitok eval t2i`."""
    parser.description = (
        "Draw a benchmark's images into the folder its official scorer reads; MJHQ-30K's FID is measured here. The "
        "same command goes on where it was stopped. Several GPUs: torchrun --nproc_per_node N -m unitok eval t2i ..."
    )
    parser.add_argument("--bench", required=True, choices=_BENCHES)
    parser.add_argument("--prompts", required=True, metavar="PATH", help="the benchmark's own file (dpg: folder)")
    add_generation_arguments(parser, model)
    parser.add_argument("--reference", metavar="DIR", help="mjhq: the folder of reference images, CATEGORY/ID.jpg")
    parser.add_argument("--inception", metavar="FILE", help="mjhq: torch-fidelity's InceptionV3; without: no FID")
    parser.set_defaults(run=("t2i", "t2i"))


def add_generation_arguments(parser: argparse.ArgumentParser, model: str, prompts: bool = True) -> None:
    """Options of every command that draws a benchmark's images."""
    from unitok.cli import positive_int

    parser.add_argument("--model", default=model, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the images")
    parser.add_argument(
        "--limit", type=positive_int, metavar="N", help=f"only the first N {'prompts' if prompts else 'images'}"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=positive_int, default=32)
    parser.add_argument("--guidance", type=float, metavar="G", dest="guidance_scale", help="default: the export's")
    parser.add_argument("--temperature", type=float, metavar="T", help="default: the export's")
    parser.add_argument("--depth-temperature", type=float, metavar="T", help="default: the export's")
    parser.add_argument("--top-k", type=int, metavar="K", help="default: the export's")
    parser.add_argument("--top-p", type=float, metavar="P", help="default: the export's")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    if prompts:
        parser.add_argument(
            "--rewrite",
            metavar="FILE",
            help="JSON object {prompt: other words}; the result names it",
        )
    add_share_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and what is missing, and stop")


def add_share_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that give a process its share where no launcher does."""
    parser.add_argument("--rank", type=int, metavar="R", help="this process's number (default: RANK of torchrun)")
    parser.add_argument("--world-size", type=int, metavar="W", help="how many processes (default: WORLD_SIZE)")


def use_share(arguments: argparse.Namespace) -> None:
    """--rank and --world-size become what a launcher would have set, before anything asks for it."""
    rank, world = arguments.rank, arguments.world_size
    if rank is None and world is None:
        return
    if rank is None or world is None or not 0 <= rank < world:
        raise UserError(f"--rank {rank} --world-size {world}: expected both, and 0 <= rank < world size")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}


def sampler_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampler settings that were given."""
    return {name: getattr(arguments, name) for name in SAMPLER}


def plan(what: str, needed: Sequence[tuple[str | None, str]]) -> None:
    """What a command would do, and which of (path, what it is and where it comes from) is not there.

    A path of None is an option that was left out.
    """
    print(f"would do: {what}")
    for path, source in needed:
        if path is None:
            print(f"left out: {source}")
        elif path.startswith("hub:"):
            print(f"needed: {path}: fetched from the hub; {source}")
        elif not Path(path).exists():
            print(f"missing: {path}: {source}")


def model_needed(arguments: argparse.Namespace) -> tuple[str, str]:
    """The model's line of `plan`."""
    return arguments.model, "the unified model; train it (unitok demo), convert a release, or give --model"


def prompts_planned(arguments: argparse.Namespace) -> str:
    """Which prompts `plan` speaks of."""
    return f"each of the first {arguments.limit} prompts" if arguments.limit else "each prompt"


def fid_network(arguments: argparse.Namespace) -> Any:
    """InceptionV3 of --inception, None without it: before hours of drawing, not after.

    Raises:
        UserError: --reference or --inception alone, or one that is not there.
    """
    from unitok.core.distributed import inference_device
    from unitok.eval.fidelity import load_inception

    if bool(arguments.reference) != bool(arguments.inception):
        raise UserError("--reference and --inception: FID needs both; give both or none")
    if not arguments.inception:
        return None
    if not Path(arguments.reference).exists():
        raise DataError(f"--reference {arguments.reference}: no such file or folder; --dry-run says where it is from")
    return load_inception(arguments.inception, inference_device())


def begin_generation(
    arguments: argparse.Namespace, out: Path, num_prompts: int, samples: int
) -> tuple["UniTokPipeline", dict[str, Any]]:
    """The pipeline, and the protocol, which is written into the folder `out` (or must equal the one there)."""
    from unitok.eval.geneval_run import file_name_and_hash, generation_protocol, write_generation

    pipeline = load_pipeline(arguments.model, arguments.precision)
    out.mkdir(parents=True, exist_ok=True)
    protocol = generation_protocol(
        pipeline,
        sampler_of(arguments),
        prompts=file_name_and_hash(arguments.prompts),
        num_prompts=num_prompts,
        samples_per_prompt=samples,
        rewrite=file_name_and_hash(arguments.rewrite) if arguments.rewrite else None,
    )
    write_generation(out, protocol, arguments.seed, arguments.model)
    return pipeline, protocol


def t2i(arguments: argparse.Namespace) -> int:
    """Draw the images; FID of MJHQ-30K where its images and Inception are given."""
    from unitok.eval.geneval_run import read_rewrite
    from unitok.eval.t2i_runs import BENCHES, generate_bench

    spec, out = BENCHES[arguments.bench], Path(arguments.out)
    measured = arguments.bench == "mjhq"
    if not measured and (arguments.reference or arguments.inception):
        raise UserError(f"--reference, --inception: only for mjhq; {arguments.bench} is scored by {spec.scored_by}")
    use_share(arguments)
    if arguments.dry_run:
        _plan(arguments, spec)
        return 0
    network = fid_network(arguments)
    if not Path(arguments.prompts).exists():
        raise DataError(f"{arguments.prompts}: no prompts of {spec.title}; get {spec.prompts_from}")
    items = spec.load(Path(arguments.prompts))[: arguments.limit]
    rewrite = read_rewrite(arguments.rewrite, [item.prompt for item in items]) if arguments.rewrite else None
    pipeline, protocol = begin_generation(arguments, out, len(items), spec.samples)
    missing = generate_bench(
        pipeline, arguments.bench, items, out, arguments.seed, rewrite=rewrite, batch_size=arguments.batch_size,
        **sampler_of(arguments),
    )  # fmt: skip
    if missing:
        print(f"{out}: this process's share is done; {missing} of {len(items)} images wait for other processes")
        return 0
    print(f"{out / 'images'}: {len(items)} images of {spec.title}, to be scored by {spec.scored_by}")
    return _fidelity(arguments, items, protocol, network) if arguments.inception else 0


def _plan(arguments: argparse.Namespace, spec: Any) -> None:
    needed = [(arguments.prompts, f"the prompts of {spec.title}; from {spec.prompts_from}"), model_needed(arguments)]
    if arguments.rewrite:
        needed.append((arguments.rewrite, "the rewritten prompts, a JSON object"))
    if arguments.bench == "mjhq":
        from unitok.eval.fidelity import INCEPTION_WEIGHTS

        needed.append((arguments.reference, f"FID's reference images (--reference DIR); from {spec.prompts_from}"))
        needed.append((arguments.inception, f"FID's InceptionV3 (--inception FILE); get {INCEPTION_WEIGHTS.hint}"))
    plan(f"{spec.samples} images for {prompts_planned(arguments)} of {spec.title} into {arguments.out}", needed)


def _fidelity(arguments: argparse.Namespace, items: Sequence[Any], protocol: dict[str, Any], network: Any) -> int:
    from unitok.eval.fidelity import reference_name
    from unitok.eval.results import print_run, run_results, write_run
    from unitok.eval.t2i_runs import fidelity_metrics

    out = Path(arguments.out)
    reference, size = Path(arguments.reference), arguments.batch_size
    metrics = fidelity_metrics(out, items, reference, network, size, arguments.seed)
    protocol = protocol | {
        "fid": "torch-fidelity, 8-bit images as their files hold them",
        "reference": reference_name(reference),
    }
    results = run_results("mjhq30k", metrics, protocol, [arguments.seed], Path(arguments.model))
    print_run(results)
    print(write_run(out / "results.json", results))
    return 0
