"""The task's training step against three recorded steps of the reference trainer: both networks, every loss."""

import pytest
import torch
from reference import fixture, loaded, numbers, relative, tensors
from tiny import PlainEngine

from unitok.core.optim import parameter_groups
from unitok.tokenizer import UniTok
from unitok.tokenizer import task as task_module
from unitok.tokenizer.adversarial import Augmentation, Discriminator
from unitok.tokenizer.dino import DinoConfig, DinoDiscriminator, FrozenDino
from unitok.tokenizer.lpips import LPIPS
from unitok.tokenizer.official import to_official_state
from unitok.tokenizer.settings import TokenizerTrainConfig, UniTokSizes
from unitok.tokenizer.task import TokenizerTask

LPIPS_RECIPE = 400000  # base of the recorded recipe of random weights
CLIP_NORM = 10.0
LOSSES = 1e-5
# Adam divides by the gradient's size, so rounding moves single weights, and what the third step makes of them: in
# float32, over seven choices of instruction sets and threads, the entropy is up to 3.1e-5 off, gradient norms 1.0e-4
# and the adversarial weight (a ratio of such norms) 4.8e-4. In float64 what is left is the recorded run's own rounding,
# the same on every machine: 1.6e-5, 4.4e-5 and 1.7e-5, all other losses 4e-6. The steps before: 5e-6, 1e-5, 2.4e-5.
ENTROPY, NORM, WEIGHT = "entropy", "norm", "weight"
EARLY = {ENTROPY: LOSSES, NORM: 5e-5, WEIGHT: 1e-4}
LIMITS = {
    torch.float32: [EARLY, EARLY, {ENTROPY: 5e-5, NORM: 2e-4, WEIGHT: 1e-3}],
    torch.float64: [EARLY, EARLY, {ENTROPY: 3e-5, NORM: 1e-4, WEIGHT: 3e-5}],
}


def build(run):
    """Task, networks and optimizers of a recorded run, from the recorded initial state."""
    args = run["args"]
    model = UniTok.from_official(fixture("tokenizer_small/model.safetensors")).train()
    model.quantizer._reset_usage()
    meta = numbers("losses/disc.json")
    sizes = {k: v for k, v in meta["dino"].items() if k not in ("img_size", "init_values")}
    dino = loaded(FrozenDino(DinoConfig(**sizes, image_size=meta["dino"]["img_size"])), "losses/dino_tiny.safetensors")
    network = DinoDiscriminator(dino, meta["key_depths"], meta["kernel_size"])
    discriminator = Discriminator(loaded(network, "losses/disc_gn.safetensors"))
    rates = {"schedule": "constant", "eps": 1e-6}
    config = TokenizerTrainConfig(
        output_dir="unused",
        model={name: getattr(model.config, name) for name in UniTokSizes.model_fields},
        data={"source": "shapes:train?num=4"},
        loss={"lpips": args["lp"], "entropy": args["le"]},
        discriminator={
            "kind": "dino",
            "loss": {"hg": "hinge", "sp": "softplus"}[args.get("dcrit", "hg")],
            "adaptive_kind": args.get("gada", 1),
            "optimizer": {"lr": 2e-5, "weight_decay": 0.2, "betas": [0.5, 0.9], **rates},
        },
        optimizer={"lr": 5e-4, "weight_decay": 0.02, "betas": [0.9, 0.95], **rates},
        reconstruction_batch_size=args["vae_local_bs"],
    )
    task = TokenizerTask(config)
    task.model = model
    task.lpips = LPIPS.random(LPIPS_RECIPE) if args["lp"] else None
    parts = ((model, config.optimizer), (discriminator, config.discriminator.optimizer))
    optimizers = [
        torch.optim.AdamW(parameter_groups(module, o), lr=o.lr, betas=o.betas, eps=o.eps) for module, o in parts
    ]
    return task, model, discriminator, optimizers


def step(task, model, discriminator, optimizers, row, monkeypatch):
    """One step on the recorded batch; metrics under the recorded names."""
    default = torch.get_default_dtype()
    io = tensors("losses/train_step_io.safetensors")
    io = {key: value.to(default) if value.is_floating_point() else value for key, value in io.items()}

    class Faded(Augmentation):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.blur = row["fade_blur_schedule"]

    monkeypatch.setattr(task_module, "Augmentation", Faded)
    monkeypatch.setattr(task, "_ramp", lambda _step: row["warmup_disc_schedule"])
    engines = {"tokenizer": PlainEngine(model)}
    if row["warmup_disc_schedule"] > 0:
        engines["discriminator"] = PlainEngine(discriminator)
    batch = {"pixels": io[f"img{row['batch']}"], "text_ids": io[f"text{row['batch']}"], "captions": ["given"] * 4}
    scale = model.logit_scale.detach().exp().clone()
    for optimizer in optimizers:
        optimizer.zero_grad()
    metrics = task.micro_step(engines, batch, 0, 0)
    norms = [torch.zeros(())] * 2
    for index, engine in enumerate(engines.values()):
        norms[index] = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), CLIP_NORM)
        optimizers[index].step()
    task.after_step({"tokenizer": model}, 0)
    return metrics | {"gnm": norms[0], "dnm": norms[1], "Logit_scale": scale}


NAMES = {
    "Lnll": "reconstruction", "Lq": "vq", "Lc": "contrastive", "Le": "entropy", "Lpip": "lpips", "Ld": "discriminator",
    "Wei_g": "adversarial_weight", "Lg": "adversarial", "acc_real": "accuracy_real", "acc_fake": "accuracy_fake",
}  # fmt: skip


def check(metrics, row, limits):
    for recorded, own in NAMES.items():
        if recorded not in row or own not in metrics:
            assert row.get(recorded, 0) == 0
            continue
        limit = {"Wei_g": limits[WEIGHT], "Le": limits[ENTROPY]}.get(recorded, LOSSES)
        # the generator's loss is a mean of logits of both signs: its own size says nothing about rounding
        assert float(metrics[own]) == pytest.approx(row[recorded], rel=limit, abs=1e-6), recorded
    for name in ("gnm", "dnm"):
        assert float(metrics[name]) == pytest.approx(row[name], rel=limits[NORM]), name
    assert float(metrics["usage"]) * 100 == pytest.approx(row["Codebook_usage"])
    assert float(metrics["Logit_scale"]) == pytest.approx(row["Logit_scale"], rel=1e-3)


RUNS = [
    "no_lpips gada1",
    "with_lpips gada1",
    *(f"no_lpips gada{kind} (first step is batch 1 from the initial state)" for kind in range(5)),
    "no_lpips softplus gada1",
]


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request, monkeypatch):
    """The precision of everything: the code asks for float32 by `Tensor.float`, and by the default of torch."""
    if request.param == torch.float64:
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", RUNS)
def test_steps_equal_the_recorded_ones(name, dtype, monkeypatch):
    fixture("tokenizer_small/model.safetensors")  # skips where it is absent
    recorded = numbers("losses/train_step.json")["runs"]
    assert set(recorded) == set(RUNS), "a recorded run is not tested"
    task, model, discriminator, optimizers = build(recorded[name])
    assert {p.dtype for part in (model, discriminator) for p in part.parameters()} == {dtype}
    assert len(recorded[name]["steps"]) <= len(LIMITS[dtype])
    for row, limits in zip(recorded[name]["steps"], LIMITS[dtype], strict=False):
        metrics = step(task, model, discriminator, optimizers, row, monkeypatch)
        assert {value.dtype for value in metrics.values() if value.is_floating_point()} == {dtype}
        check(metrics, row, limits)
    if name == "no_lpips gada1":
        _check_state(to_official_state(model), "losses/train_step_unitok_after.safetensors")
        _check_state(discriminator.network.state_dict(), "losses/train_step_disc_after.safetensors")
    for key, (total, norm) in recorded[name].get("param_after", {}).items():
        value = to_official_state(model)[key].detach()
        assert float(value.norm()) == pytest.approx(norm, rel=1e-4), key
        assert float(value.double().sum()) == pytest.approx(total, abs=1e-3 * norm * value.numel() ** 0.5 + 1e-6), key


def _check_state(state, name):
    recorded = tensors(name)
    assert recorded
    for key, value in recorded.items():
        assert relative(state[key].detach(), value) < 1e-4, key
