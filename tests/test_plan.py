"""`unitok plan`: every packaged configuration, its FLOPs against real training steps, its messages."""

import json
from pathlib import Path

import pytest
import torch
from stages import make_task, write_configs
from tiny import PlainEngine
from torch.utils.flop_counter import FlopCounterMode

from unitok.cli import main
from unitok.commands.plan import HARDWARE_NAMES
from unitok.core.errors import ConfigError
from unitok.eval.flops import FlopCount, _convolution_backward
from unitok.eval.planned import planned_model
from unitok.eval.trace import LiveBytes
from unitok.mllm.settings import MllmDataConfig, MllmTrainConfig
from unitok.plan import (
    BUCKET,
    HARDWARE,
    Lengths,
    composition,
    padded,
    plan_mllm,
    plan_tokenizer,
    stage_of,
)

aten = torch.ops.aten
ROOT = Path(__file__).parents[1]
CONFIGS = [
    f"{stage}/{file.stem}.yaml"
    for stage in ("tokenizer", "mllm")
    for file in sorted((ROOT / "configs" / stage).glob("*.yaml"))
    if file.stem != "bench"
]
H100 = HARDWARE["h100"]


def make_plan(file, *options, gpus=8, **given):
    config = stage_of(file, list(options))
    if isinstance(config, MllmTrainConfig):
        return plan_mllm(config, file, gpus, H100, **given)
    return plan_tokenizer(config, gpus, H100)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_configs(tmp_path_factory.mktemp("plan"))


def real_flops(files, tmp_path, stage, options, started):
    """Of one micro-batch of the real task: our count, torch's own (None where it refuses), and its batch."""
    task, config = make_task(stage, files[stage], tmp_path, 1, options)
    engines = {name: PlainEngine(network.module.train()) for name, network in task.build().items()}
    batch = task.load_batch(list(range(4)), 0)
    step = config.discriminator.start_step if started else 0
    task.prepare_step([batch], step)
    with FlopCount() as own:
        task.micro_step(engines, batch, 0, step)
    theirs = None
    if not started:
        # torch takes the weight gradient of a grouped convolution for that of a dense one: that formula is replaced
        with FlopCounterMode(display=False, custom_mapping={aten.convolution_backward: raw_backward}) as counter:
            task.micro_step(engines, batch, 0, step)
        theirs = counter.get_total_flops()
    return own.total, theirs, batch, task


def raw_backward(*args, **kwargs):
    return _convolution_backward(*args, **kwargs)


raw_backward._get_raw = True  # tensors, not shapes


def test_flops_of_stage_one(files, tmp_path):
    """Before the discriminator by torch's counter, with it by our own: the counter refuses gradients at a leaf."""
    start = ["discriminator.start_step=8"]
    early, theirs, _, _ = real_flops(files, tmp_path / "a", "tokenizer", start, started=False)
    late, _, _, _ = real_flops(files, tmp_path / "b", "tokenizer", start, started=True)
    plan = make_plan(files["tokenizer"], *start, "engine.micro_batch_size=4", gpus=1)
    assert plan.flops_per_step == pytest.approx(late, rel=0.01)
    assert plan.flops_of_run == pytest.approx(8 * early + 12 * late, rel=0.01)
    assert early == pytest.approx(theirs, rel=0.15)


@pytest.mark.parametrize("recipe", ["pretrain", "llava_sft", "warmup"])
def test_flops_of_stage_two(files, tmp_path, recipe):
    """By torch's FlopCounterMode on the real task's step; warm-up and fine-tuning leave parts frozen."""
    mixture = {"pretrain": "text_to_image: 1, caption: 0, chat: 0"}.get(recipe, "text_to_image: 0, caption: 1, chat: 0")
    options = [f"data.mixture={{{mixture}}}", "data.unconditional=0", f"recipe={recipe}", "cross_entropy=plain"]
    own, theirs, batch, task = real_flops(files, tmp_path, "mllm", options, started=False)
    beside = batch["input_ids"].shape[1] - task.source.header["num_positions"]
    pieces = f"backbone.text_vocab_size={len(task.text_tokenizer)}"  # the tiny corpus has fewer than are asked for
    plan = make_plan(
        files["mllm"], *options, pieces, "engine.micro_batch_size=4", gpus=1, lengths=Lengths(beside, beside)
    )
    print(recipe, plan.flops_per_step / theirs)
    assert plan.flops_per_step == pytest.approx(theirs, rel=0.15)
    assert own == pytest.approx(theirs, rel=0.05)


def test_activations_are_what_autograd_saves(files, tmp_path):
    """The traced peak against the bytes that a real step saves for its backward pass, which makes some more itself."""
    options = ["data.mixture={text_to_image: 1, caption: 0, chat: 0}", "data.unconditional=0", "cross_entropy=plain"]
    options += ["backbone.config.hidden_size=96", "backbone.config.intermediate_size=256", "data.pack=true"]
    task, _ = make_task("mllm", files["mllm"], tmp_path, 1, options)
    engine = PlainEngine(task.build()["mllm"].module.train())
    batch = task.load_batch(list(range(4)), 0)
    task.prepare_step([batch], 0)
    weights = {p.untyped_storage().data_ptr() for p in engine.module.parameters()}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        task.micro_step({"mllm": engine}, batch, 0, 0)
    ids = int((batch["input_ids"] != task.pad_id).sum()) // 4 - task.source.header["num_positions"]
    plan = make_plan(files["mllm"], *options, "engine.micro_batch_size=4", gpus=1, lengths=Lengths(ids, ids))
    print(plan.traces[False].activations / sum(saved.values()))
    assert 1.0 < plan.traces[False].activations / sum(saved.values()) < 1.3
    assert plan.traces[True].activations < 0.7 * plan.traces[False].activations


def test_live_bytes():
    """What goes is taken off; views, changes in place and what was there before are nothing new."""
    old = torch.zeros(1000)
    with LiveBytes() as live:
        old.view(10, 100).add_(1)
        assert live.now == 0
        new = torch.zeros(1000)
        half = new[:500]
        assert live.now == 4000
        more = torch.cat([new, old])
        assert (live.now, live.peak) == (12000, 12000)
        del more
        assert live.now == 4000
        del new
        assert live.now == 4000  # `half` holds the storage
        del half
        assert (live.now, live.peak) == (0, 12000)


FAST = [name for name in CONFIGS if name.endswith(("/shapes.yaml", "/digits.yaml"))]


@pytest.mark.parametrize(
    "config", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name not in FAST)]
)
def test_packaged_configurations(config, capsys, tmp_path):
    """Each is planned, on shapes alone."""
    assert main(["plan", "--config", config, "--gpus", "8", "--json", str(tmp_path / "plan.json"), "--explain"]) == 0
    said = capsys.readouterr().out
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["hours"] > 0 and figures["stage"] == config.split("/")[0]
    for memory in figures["memory_bytes"].values():
        totals = [memory[f"zero{stage}"]["total"] for stage in range(4)]
        assert min(totals) > 0
    for word in ("formulas", "memory", "activations checkpointed", "hours", "cost", "zero3", "an assumption"):
        assert word in said


def test_the_7b_recipes():
    """Backbone, embedder and depth transformer of a 7B model; hours follow from FLOPs, MFU and peak."""
    plan = make_plan("mllm/llama2_7b_sft.yaml", gpus=64)
    assert plan.parts["backbone"]["trained"] == 32003 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 8192) + 4096
    assert plan.parts["embedder"]["trained"] > 0 and plan.parts["codebooks"]["frozen"] == 8 * 4096 * 8
    assert plan.hours == pytest.approx(plan.flops_of_run / (0.4 * 989e12 * 64 * 3600))
    assert plan.cost == pytest.approx(plan.hours * 64 * H100.price)
    assert plan.fits(3, True) and not plan.fits(0, True)
    # 6 x parameters x ids, and attention and depth transformer on top
    least = 6 * 6.6e9 * plan.per_step["ids"]
    assert least < plan.flops_per_step < 1.6 * least


@pytest.mark.slow
def test_zero_stages_divide_what_they_promise():
    """The formulas at 8 GPUs, by hand."""
    plan = make_plan("mllm/llama2_7b_sft.yaml", gpus=8)
    count = sum(part["trained"] for name, part in plan.parts.items())
    for stage, (weights, master, gradients, optimizer) in {
        0: (4, 0, 4, 8),
        1: (4, 4 / 8, 4 + 4 / 8, 8 / 8),  # accumulation: whole gradients stay
        2: (4, 4 / 8, 4 / 8, 8 / 8),
        3: (4 / 8, 4 / 8, 4 / 8, 8 / 8),
    }.items():
        parts = plan.memory(stage, True)
        found = [parts[name] / count for name in ("parameters", "master", "gradients", "optimizer")]
        assert found == pytest.approx([weights, master, gradients, optimizer])
        assert (parts["buckets"] >= 4 * BUCKET) == (stage > 0)


@pytest.mark.slow
def test_adapters_are_counted_apart():
    plan = make_plan("mllm/1b_sft.yaml", "lora.rank=64", "lora.alpha=128")
    assert plan.parts["backbone"]["trained"] == 0 and plan.parts["backbone (adapters)"]["trained"] > 1e6
    assert plan.networks["mllm"].trained < plan.networks["mllm"].parameters


def test_composition_and_padding():
    assert composition({"a": 5, "b": 1, "c": 1}, 4) == {"a": 3, "b": 1, "c": 0}
    assert sum(composition({"a": 0.6, "b": 0.1, "c": 0.3}, 7).values()) == 7
    assert padded([10, 30, 20], MllmDataConfig(pack=True)) == [10, 30, 20]
    assert padded([10, 30, 11], MllmDataConfig()) == [11, 30, 11]


def test_hardware_names_and_peaks():
    from unitok.eval.flops import peak_flops

    assert set(HARDWARE_NAMES) == set(HARDWARE)
    for gpu in HARDWARE.values():
        assert peak_flops(gpu.name, "bf16") and peak_flops(gpu.name, "fp32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "mllm/shapes.yaml", "--gpus", "0"], "--gpus 0: expected at least 1"),
        (["--config", "mllm/shapes.yaml", "--gpus", "1", "--mfu", "40"], "--mfu 40.0: expected a share of the peak"),
        (["--config", "mllm/shapes.yaml", "--gpus", "1", "--price", "-1"], "--price -1.0: expected dollars"),
        (["--config", "mllm/shapes.yaml", "--gpus", "1", "--price", "nan"], "--price nan: expected dollars"),
        (["--config", "mllm/shapes.yaml", "--gpus", "1", "--price", "inf"], "a finite number of at least 0"),
        (["--config", "mllm/shapes.yaml", "--gpus", "1", "--chat-ids", "0"], "--chat-ids 0: expected at least 2"),
        (["--config", "mllm/shapes.yaml", "--gpus", "1", "--caption-ids", "99999"], "of at most data.max_length="),
        (["--config", "mllm/bench.yaml", "--gpus", "1"], "configuration of a speed measurement"),
        (["--config", "nowhere.yaml", "--gpus", "1"], "neither a file nor a packaged one"),
        (["--config", "mllm/shapes.yaml", "--gpus", "1", "stepz=3"], "unknown key 'stepz'"),
        (["--config", "mllm/shapes.yaml", "--gpus", "1", "--hardware", "v100"], "invalid choice: 'v100'"),
        (["--config", "mllm/1b_warmup.yaml", "--gpus", "1", "backbone.path=models/other"], "give backbone.path=null"),
        (["--config", "mllm/1b_sft.yaml", "--gpus", "1", "init_from=runs/none/export"], "no such export"),
        (["--config", "mllm/1b_sft.yaml", "--gpus", "1", "data.max_length=200"], "leaves no ids beside the 256"),
    ],
)
def test_errors(options, message, capsys):
    assert main(["plan", *options]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"steps: [1\n", "is not valid YAML"),
        (b"steps: !!int x\n", "is not valid YAML"),
        (b"\xff\xfe\xfd", "is not valid YAML"),
        (b"- steps\n", "holds a list; expected keys and values"),
    ],
)
def test_a_file_that_is_no_configuration(content, message, tmp_path, capsys):
    (tmp_path / "x.yaml").write_bytes(content)
    assert main(["plan", "--config", str(tmp_path / "x.yaml"), "--gpus", "1"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_unknown_backbone_is_an_error():
    with pytest.raises(ConfigError, match="Llama-2-7b-hf"):
        planned_model(stage_of("mllm/1b_warmup.yaml", ["backbone.path=a/b"]), "mllm/1b_warmup.yaml")
