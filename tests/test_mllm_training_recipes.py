"""What each recipe trains, adapters, starting from the export before, and documents without images."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from stages import COMMON, plain_steps, run_stage, task_of, write_recipes
from tiny import TEXTS, PlainEngine, make_mllm, random_codes

from unitok.core.config import load_config
from unitok.core.errors import CheckpointError, ConfigError
from unitok.mllm import UniTokMLLM, UniTokProcessor
from unitok.mllm.lora import add_adapters, is_adapter, merged_state
from unitok.mllm.recipes import TRAINED, apply_recipe, check_recipe
from unitok.mllm.settings import LoraConfig, MllmTrainConfig

CHAT_ONLY = "data.mixture={text_to_image: 0, caption: 1, chat: 1}"
UNDERSTANDING = ("warmup", "align", "llava_sft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipes(tmp_path_factory.mktemp("recipes"))


# ---- what trains


def counts(model: UniTokMLLM) -> dict[str, int]:
    """Trained parameters below each part."""
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "adapters" if is_adapter(name) else ".".join(name.split(".")[: 1 + name.startswith("embedder.")])
            found[part] = found.get(part, 0) + parameter.numel()
    return found


# Of the tiny model: width 32, 50 words, K = 3, V = 16, 24 visual channels, 12 code channels.
MLP = 2 * 24 + (24 + 1) * 32 + (32 + 1) * 32
LLAMA_LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 40 + 2 * 32
BACKBONE = 50 * 32 + 2 * LLAMA_LAYER + 32
HEAD = 50 * 32
DEPTH = 2 * 16 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 40 + 2 * 32) + 32 + 16 * 32 + 16
PROJECTION = 2 * (2 * 12) + 2 * 24 + 12 * 72 + 2 * 24 + (24 + 1) * 24 + (12 + 1) * 24
PROJECTION += 2 * 36 + 2 * (24 + 1) * 36 + (36 + 1) * 24 - 2 * 36 + 2 * 24
EXPECTED = {
    "warmup": {"embedder.mlp": MLP},
    "pretrain": {"backbone": BACKBONE, "embedder.projection": PROJECTION, "embedder.mlp": MLP, "depth": DEPTH,
                 "lm_head": HEAD},
    "sft": {"backbone": BACKBONE, "embedder.projection": PROJECTION, "embedder.mlp": MLP, "depth": DEPTH,
            "lm_head": HEAD},
    "align": {"embedder.mlp": MLP},
    "llava_sft": {"backbone": BACKBONE, "embedder.mlp": MLP, "lm_head": HEAD},
}  # fmt: skip


@pytest.mark.parametrize("recipe", TRAINED)
def test_each_recipe_trains_so_many_parameters(recipe: Any) -> None:
    model = make_mllm()
    apply_recipe(model, recipe)
    assert counts(model) == EXPECTED[recipe]
    assert not any("codebook" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("recipe", ["sft", "llava_sft"])
def test_adapters_take_the_place_of_backbone_and_text_head(recipe: Any) -> None:
    model = make_mllm()
    add_adapters(model.backbone, LoraConfig(rank=2, targets=["q_proj", "down_proj"]), seed=0)
    apply_recipe(model, recipe)
    expected = {part: n for part, n in EXPECTED[recipe].items() if part not in ("backbone", "lm_head")}
    assert counts(model) == expected | {"adapters": 2 * 2 * (32 + 32 + 40 + 32)}
    whole = make_mllm()
    add_adapters(whole.backbone, LoraConfig(rank=1), seed=0)
    names = {name.split(".")[-4] for name, _ in whole.named_parameters() if is_adapter(name)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("recipe", TRAINED)
@pytest.mark.parametrize("lora", ["null", "{rank: 2, alpha: 4}"], ids=["full", "lora"])
def test_two_steps_move_what_is_trained_and_nothing_else(folder: Path, tmp_path: Path, recipe: str, lora: str) -> None:
    options = [f"recipe={recipe}", f"lora={lora}", "data.pack=true"]
    if recipe in UNDERSTANDING:
        options.append(CHAT_ONLY)
    task = (
        task_of(folder, tmp_path / "moved", *options) if lora == "null" or recipe not in ("warmup", "align") else None
    )
    if task is None:
        with pytest.raises(ConfigError, match=f"recipe={recipe} does not train the backbone, so lora has no place"):
            task_of(folder, tmp_path, *options)
        return
    start = task_of(folder, tmp_path / "moved", *options).build()["mllm"].module.model.state_dict()
    model, log = plain_steps(task_of(folder, tmp_path / "moved", *options))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert moved == trained and len(log) == 2 and ("image" in log[1]) == (recipe in ("pretrain", "sft"))


@pytest.mark.parametrize("recipe", TRAINED)
@pytest.mark.parametrize("family", ["qwen2", "mistral", "phi"])
def test_other_families_train_by_every_recipe(folder: Path, tmp_path: Path, family: str, recipe: str) -> None:
    options = [f"recipe={recipe}", f"backbone.config.model_type={family}", "data.pack=true"]
    options.append(CHAT_ONLY if recipe in UNDERSTANDING else "lora={rank: 2, alpha: 4}")
    model, log = plain_steps(task_of(folder, tmp_path, *options))
    assert model.backbone.config.model_type == family and all(math.isfinite(record["loss"]) for record in log)
    parts = set(counts(model))
    expected = {part for part in EXPECTED[recipe] if recipe in UNDERSTANDING or part not in ("backbone", "lm_head")}
    assert parts == expected | (set() if recipe in UNDERSTANDING else {"adapters"})


@pytest.mark.parametrize(
    ("mixture", "still"),
    [
        (CHAT_ONLY, ("depth.",)),
        ("data.mixture={text_to_image: 0, caption: 0, chat: 0, text: 1}", ("depth.", "embedder.")),
    ],
)
def test_what_no_loss_reaches_is_left_as_it_is(folder: Path, tmp_path: Path, mixture: str, still: tuple) -> None:
    """Weight decay alone would shrink it: what a model has learnt before, and this run does not teach."""
    options = ["recipe=pretrain", mixture, "optimizer.weight_decay=0.5"]
    if "text: 1" in mixture:
        (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        options.append(f"data.texts=[{tmp_path / 'texts.jsonl'}]")
    start = task_of(folder, tmp_path, *options).build()["mllm"].module.model.state_dict()
    model, _ = plain_steps(task_of(folder, tmp_path, *options))
    same = {name for name, value in model.state_dict().items() if torch.equal(value, start[name])}
    assert same == {name for name in start if name.startswith((*still, "embedder.codebooks"))}
    plan = counts(model)
    assert set(plan) == {part for part in EXPECTED["pretrain"] if not part.startswith(tuple(p[:-1] for p in still))}


def test_a_recipe_refuses_what_it_cannot_learn(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recipe=warmup does not train the depth transformer, but data.mixture.text"):
        task_of(folder, tmp_path, "recipe=warmup")
    with pytest.raises(ConfigError, match="lora.targets: 'w_proj' is no linear map of the backbone; it has down_proj"):
        task_of(folder, tmp_path, "lora.targets=[w_proj]").build()


# ---- adapters


def test_merged_adapters_give_the_same_outputs(folder: Path, tmp_path: Path) -> None:
    """An export after training with adapters is a plain model that computes what the trained one did."""
    task = task_of(folder, tmp_path, "lora={rank: 3, alpha: 5, dropout: 0.1}")
    model, _ = plain_steps(task)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    module = torch.nn.Module()
    module.model = model
    task.export({"mllm": module}, tmp_path / "export")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loaded = UniTokMLLM.from_pretrained(tmp_path / "export").eval()
    assert loaded.state_dict().keys() == merged_state(model).keys()
    assert not any(is_adapter(name) or "base_layer" in name for name in loaded.state_dict())
    codes = random_codes(model.config, 1, model.config.num_image_positions)
    ids = torch.tensor([[2, *[model.config.image_token_id] * model.config.num_image_positions, 9, 10]])
    with torch.no_grad():
        outputs = [one(ids, codes=codes).logits for one in (model, loaded)]
        model.load_state_dict({k: v * 0 if "lora_B" in k else v for k, v in before.items()})
        without = model(ids, codes=codes).logits
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert (without - outputs[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (["recipe=warmup"], ["recipe=sft"], "recipe=warmup, now it is sft"),
        (["recipe=sft", "lora={rank: 2}"], ["recipe=sft"], "lora.rank=2, now it is None"),
        (["recipe=sft", "lora={rank: 2}"], ["recipe=sft", "lora={rank: 4}"], "lora.rank=2, now it is 4"),
        (
            ["recipe=sft"],
            ["recipe=sft", "optimizer.lr_multipliers={model.embedder.: 0.5}"],
            "does not fit network 'mllm'",
        ),
        # the depth transformer is trained then
        (
            ["recipe=sft"],
            ["recipe=sft", "data.mixture={text_to_image: 1, caption: 1, chat: 1}"],
            r"was written with data.mixture.text_to_image=0.0, now it is 1.0; .*init_from=EXPORT",
        ),
    ],
)
def test_a_run_is_not_resumed_with_other_parts_trained(
    folder: Path, tmp_path: Path, first: list[str], then: list[str], message: str
) -> None:
    """One line that says what to do, before anything is loaded."""
    shared = [CHAT_ONLY, "ema_decay=null", "save_every=1"]
    run_stage("mllm", folder / "mllm.yaml", tmp_path, 1, [*shared, *first, "steps=1"])
    with pytest.raises(CheckpointError, match=message) as refused:
        run_stage("mllm", folder / "mllm.yaml", tmp_path, 1, [*shared, *then, "steps=2"])
    assert "\n" not in str(refused.value) and "another output_dir" in str(refused.value)


def test_adapters_need_linear_maps() -> None:
    model = make_mllm(text={"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4})
    for targets in ([], ["c_attn"]):
        with pytest.raises(ConfigError, match="lora: .*model_type=gpt2 has no nn.Linear maps"):
            add_adapters(model.backbone, LoraConfig(rank=2, targets=targets), 0)


def test_adapters_start_at_nothing_and_from_the_seed() -> None:
    models = [make_mllm() for _ in range(4)]
    for model, seed in zip(models[1:], (0, 0, 1), strict=True):
        add_adapters(model.backbone, LoraConfig(rank=2), seed)
    ids = torch.tensor([[2, 9, 10, 11]])
    with torch.no_grad():
        assert torch.equal(models[0](ids).logits, models[1](ids).logits)
    states = [{k: v for k, v in model.state_dict().items() if is_adapter(k)} for model in models[1:]]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


# ---- starting from the step before


def test_a_run_starts_from_the_export_of_the_one_before(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights, sizes, text tokenizer and visual tokenizer: nothing else needs to be said."""
    first = task_of(folder, tmp_path / "one", "recipe=warmup", CHAT_ONLY)
    model, _ = plain_steps(first)
    module = torch.nn.Module()
    module.model = model
    first.export({"mllm": module}, tmp_path / "export")
    values = COMMON | {"output_dir": "unset", "data": {"codes": str(folder / "codes"), "mixture": {"caption": 0.5}}}
    (tmp_path / "next.yaml").write_text(yaml.safe_dump(values | {"init_from": str(tmp_path / "export")}))
    second = task_of(tmp_path, tmp_path / "two", file="next.yaml")
    started = second.build()["mllm"].module.model
    expected = load_file(tmp_path / "export" / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in started.state_dict().items())
    ids = [task.text_tokenizer.encode("is there a green triangle?") for task in (first, second)]
    assert ids[0] == ids[1] and second.builder.config.image_token_id == first.builder.config.image_token_id
    sampler = first.config.sampler.model_dump()
    assert started.generation_config.image_sampler == sampler
    file = tmp_path / "export" / "generation_config.json"  # what was tuned there
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_sampler": sampler | {"top_k": 7, "top_p": 0.5}}))
    again = task_of(tmp_path, tmp_path / "two", "sampler.top_p=0.75", file="next.yaml").build()["mllm"].module.model
    assert again.generation_config.image_sampler == sampler | {"top_p": 0.75}
    assert "draws with sampler.top_k=7, sampler.top_p=0.5, what is trained here will not" in caplog.text
    _, log = plain_steps(task_of(tmp_path, tmp_path / "three", file="next.yaml"))
    assert log[1]["loss"] < log[0]["loss"] * 1.5

    # drawn pictures stay as a released model's, those of chats are prepared as the codes were that are read here
    for name, changes in {
        "config.json": {"embedder_cache": "released"},
        "processor_config.json": {"image_preprocess": "padded", "truncate_pixels": True},
    }.items():
        file = tmp_path / "export" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    to_draw = [f"data.mixture.{kind}=0" for kind in ("caption", "plain", "chat")]
    header = json.loads((folder / "codes" / "header.json").read_text())
    cut = shutil.copytree(folder / "codes", tmp_path / "cut")
    (cut / "header.json").write_text(json.dumps(header | {"preprocess": "clip_val"}))
    for options, preprocess in (([], "plain"), (to_draw, "padded"), ([f"data.codes={cut}"], "clip_val")):
        third = task_of(tmp_path, tmp_path / "released", *options, file="next.yaml")
        third.export({"mllm": third.build()["mllm"].module}, tmp_path / "again")
        processor = UniTokProcessor.from_pretrained(tmp_path / "again")
        assert (processor.image_preprocess, processor.truncate_pixels) == (preprocess, True)
        assert processor.config.embedder_cache == "consistent"
    del header["preprocess"]
    (cut / "header.json").write_text(json.dumps(header))
    file = tmp_path / "export" / "visual_tokenizer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"preprocess": "inference"}))
    third.build()
    third = task_of(tmp_path, tmp_path / "released", f"data.codes={cut}", file="next.yaml")
    third.export({"mllm": third.build()["mllm"].module}, tmp_path / "again")
    assert UniTokProcessor.from_pretrained(tmp_path / "again").image_preprocess == "inference"

    for option in ("tokenizer=elsewhere", "backbone.text_vocab_size=99", "model.visual_width=48"):
        with pytest.raises(ConfigError, match=f"init_from=.* and {option.split('=')[0].split('.')[0]} are both set"):
            load_config(MllmTrainConfig, tmp_path / "next.yaml", [option])
    with pytest.raises(CheckpointError, match="no such model folder"):
        task_of(tmp_path, tmp_path / "four", f"init_from={tmp_path / 'nothing'}", file="next.yaml")


# ---- the loss


@pytest.mark.parametrize("pack", ["false", "true"])
@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("normalisation", ["tokens", "modality"])
def test_the_loss_is_the_formula(folder: Path, tmp_path: Path, pack: str, weight: float, normalisation: str) -> None:
    """(n_image (CE + w z) + n_text CE) / (n_image + n_text), or the mean of the two parts."""
    options = [f"image_z_weight={weight}", f"loss_normalisation={normalisation}", f"data.pack={pack}"]
    task = task_of(folder, tmp_path, *options)
    model = task.build()["mllm"].module
    batch = task.load_batch(list(range(8)), 0)
    task.prepare_step([batch], 0)
    metrics = task.micro_step({"mllm": PlainEngine(model)}, batch, 0, 0)
    with torch.no_grad():
        sums = model(**{name: value for name, value in batch.items() if name not in ("kinds", "places", "keys")})
        image = (sums.image + weight * sums.image_z) / sums.num_image
        text, n, m = sums.text / sums.num_text, sums.num_image, sums.num_text
        expected = (n * image + m * text) / (n + m) if normalisation == "tokens" else (image + text) / 2
    torch.testing.assert_close(metrics["loss"], expected.float(), rtol=1e-5, atol=1e-6)
    assert metrics["image_z"].item() == pytest.approx(float(sums.image_z / n), rel=1e-5) and metrics["image_z"] > 0


def test_a_run_does_not_pack_for_a_backbone_that_would_leak(folder: Path, tmp_path: Path) -> None:
    """At the first step, before any weight has changed; without packing the same backbone trains."""
    backbone = "backbone.config={model_type: falcon, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4}"
    with pytest.raises(ConfigError, match="data.pack=true: .*model_type=falcon.*set data.pack=false"):
        plain_steps(task_of(folder, tmp_path / "packed", backbone, "data.pack=true"), 1)
    _, log = plain_steps(task_of(folder, tmp_path / "padded", backbone), 1)
    assert log[0]["loss"] > 0


def test_a_step_without_images_is_all_text(folder: Path, tmp_path: Path) -> None:
    """The mean over what is there: nothing is halved."""
    options = ["recipe=sft", "loss_normalisation=modality", "data.mixture={text_to_image: 0, caption: 0, chat: 1}"]
    _, log = plain_steps(task_of(folder, tmp_path, *options), 1)
    assert "image" not in log[0] and log[0]["loss"] == pytest.approx(log[0]["text"], rel=1e-6)


# ---- the packaged settings

CONFIGS = Path(__file__).parents[1] / "configs" / "mllm"
LADDERS = [(name, ("warmup", "pretrain", "sft")) for name in ("llama2_7b", "llama3_8b", "1b")]
LADDERS.append(("llava_vicuna7b", ("align", "sft")))


@pytest.mark.parametrize(("name", "ladder"), LADDERS, ids=[name for name, _ in LADDERS])
def test_the_packaged_steps_follow_each_other(name: str, ladder: tuple[str, ...]) -> None:
    """Every step has its recipe, begins with the export of the one before, and is one that can be trained."""
    before = None
    for step in ladder:
        config = load_config(MllmTrainConfig, CONFIGS / f"{name}_{step}.yaml")
        check_recipe(config)
        assert config.recipe == ("llava_sft" if name.startswith("llava") and step == "sft" else step)
        assert config.init_from == (f"{before}/export" if before else None)
        assert config.data.pack and config.gradient_checkpointing and config.engine.precision == "autocast"
        assert config.optimizer.lr == {"pretrain": 5e-5, "sft": 2e-5}.get(step, 1e-3)
        before = config.output_dir


@pytest.mark.parametrize("name", [f"{name}_{step}" for name, ladder in LADDERS for step in ladder])
def test_each_opens_with_command_hardware_hours_and_figures(name: str) -> None:
    """The hours are those of the FLOPs beside them at 40 % of the GPUs' peak."""
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    assert lines[1].startswith("# Command:   deepspeed ") and f"--config configs/mllm/{name}.yaml" in lines[1]
    gpus, peak = re.fullmatch(r"# Hardware:  (\d+) GPUs of 80 GB \(peak (\d+e12) bf16.*", lines[3]).groups()
    pattern = r"# Hours:     ([\d.]+) = FLOPs / \((.*)\), FLOPs = (.*) = (.*)"
    hours, used, terms, flops = re.fullmatch(pattern, lines[4]).groups()
    total = sum(math.prod(float(factor) for factor in term.split(" x ")) for term in terms.split(" + "))
    assert used == f"0.4 x {peak} x {gpus} x 3600" and float(flops) == pytest.approx(total, rel=0.05)
    assert float(hours) == pytest.approx(total / math.prod(map(float, used.split(" x "))), abs=0.051)
    assert lines[5].startswith("# Expected:  not yet run")
