"""The tokenizer against numbers recorded from the reference: model, quantizer, schedules, groups, initial weights."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from reference import PLACES, fixture, numbers, relative, same_codes, tensors
from safetensors.torch import load_file

from unitok.core.errors import UserError
from unitok.core.optim import OptimizerConfig, lr_at, parameter_groups, warmup_ramp
from unitok.data.transforms import eval_transform, pad_to_square, padded_transform, released_train_transform, to_pil
from unitok.tokenizer import TextTowerConfig, UniTok, UniTokConfig
from unitok.tokenizer.adversarial import build_discriminator
from unitok.tokenizer.configuration import VITAMIN_SIZES
from unitok.tokenizer.losses import contrastive_loss, reconstruction_loss
from unitok.tokenizer.official import to_official_state
from unitok.tokenizer.quantizer import MultiCodebookQuantizer, usage_statistics
from unitok.tokenizer.settings import DiscriminatorConfig
from unitok.tokenizer.text import TextTokenizer

MODELS = ("tokenizer_small", "tokenizer_base", "tokenizer_linear_query")
FEATURES, SCALARS = 1e-4, 1e-5


@pytest.fixture(scope="module", params=MODELS)
def recorded(request):
    folder = fixture(request.param)
    source = folder / "checkpoint.pth"
    model = UniTok.from_official(source if source.exists() else folder / "model.safetensors")
    return model, tensors(f"{request.param}/io.safetensors"), request.param


def own_name(name):
    return name.replace("patch_embed.", "").replace("reg_token", "query_tokens")


# ---- whole models


@torch.no_grad()
def test_inference_equals_the_recorded_one(recorded):
    """Every stage from the recorded input of that stage, then from pixels to codes and from codes to pixels."""
    model, io, _ = recorded
    pixels = io["img"]
    assert relative(model.encoder(pixels), io["encoder_features"]) < FEATURES
    assert relative(model.quant_proj(io["encoder_features"]), io["quant_proj"]) < FEATURES
    assert same_codes(model.encode(pixels), io["indices"], io["index_margin"])
    assert relative(model.code_vectors(io["indices"]), io["quantized"]) < FEATURES
    assert relative(model.post_quant_proj(io["quantized"]), io["post_quant_proj"]) < FEATURES
    assert relative(model.decoder(io["post_quant_proj"])[0], io["decoder_raw"]) < FEATURES
    if "idx_to_img" in io:
        assert relative(model.decode(io["indices"]), io["idx_to_img"]) < FEATURES
        assert relative(model.reconstruct(pixels), io["img_to_reconstructed_img"]) < FEATURES
    for normalize, suffix in ((False, ""), (True, "_normalized")):
        assert relative(model.encode_image(pixels, normalize), io[f"encode_image{suffix}"]) < FEATURES
        assert relative(model.encode_text(io["text"], normalize), io[f"encode_text{suffix}"]) < FEATURES
    assert float(model.logit_scale.exp()) == pytest.approx(float(io["logit_scale_exp"]), rel=SCALARS)


@torch.no_grad()
def test_every_probed_module_equals_the_recorded_one(recorded):
    model, io, _ = recorded
    seen, hooks = {}, []
    probes = [name for name in io if name.startswith("probe.")]
    for name in probes:
        path = own_name(name.removeprefix("probe."))
        path = "encoder.backbone" if path == "encoder.patch_embed" else path
        hook = lambda _m, _i, out, name=name: seen.update({name: out})  # noqa: E731
        hooks.append(model.get_submodule(path).register_forward_hook(hook))
    model.decoder(model.post_quant_proj(model.code_vectors(model.encode(io["img"][:1]))))
    for hook in hooks:
        hook.remove()
    assert probes
    for name in probes:
        ours = seen[name].flatten(2).transpose(1, 2) if name == "probe.encoder.patch_embed" else seen[name]
        assert relative(ours, io[name]) < FEATURES, name


def test_training_pass_and_gradients_equal_the_recorded_ones(recorded):
    model, io, name = recorded
    quantizer = model.train().quantizer
    quantizer._reset_usage()
    entropy_weight = numbers(f"{name}/args.json")["le"]
    shown = io["train.img_rec"].shape[0]
    out = model(io["img"], io["text"], with_entropy=entropy_weight > 0, num_reconstructed=shown)
    contrastive = contrastive_loss(out.image_embedding, out.text_embedding, out.logit_scale)
    total = reconstruction_loss(out.reconstruction, io["img"][:shown], 0.2, 1.0) + out.vq_loss + contrastive
    if out.entropy_loss is not None:
        assert float(out.entropy_loss) == pytest.approx(float(io["train.entropy_loss"]), rel=SCALARS)
        total = total + entropy_weight * out.entropy_loss
    assert relative(out.reconstruction, io["train.img_rec"]) < FEATURES
    assert float(out.vq_loss) == pytest.approx(float(io["train.vq_loss"]), rel=SCALARS)
    assert float(contrastive) == pytest.approx(float(io["train.clip_loss"]), rel=SCALARS)
    recorded_total = io["train.total(0.2*l1+l2+vq+le*entropy+clip)"]
    assert float(total) == pytest.approx(float(recorded_total), rel=SCALARS)
    usage = usage_statistics(out.usage)["usage"].mean() * 100
    assert float(usage) == pytest.approx(float(io["train.codebook_usages"]), rel=SCALARS)
    assert relative(quantizer.usage_average, io["train.vocab_usage_after_1"]) < FEATURES
    model.zero_grad()
    total.backward()
    _check_gradients(model, io, numbers(f"{name}/grad_norms.json"))
    with torch.no_grad():
        model(io["img"].flip(0))
    assert relative(quantizer.usage_average, io["train.vocab_usage_after_2(img flipped along batch)"]) < FEATURES
    model.eval()


def _check_gradients(model, io, norms):
    found = {n: p.grad for n, p in model.named_parameters()}

    def gradient(name):
        if name.startswith("quantizer.codebooks."):
            return found["quantizer.codebooks"][int(name.split(".")[2])]
        return found.get(own_name(name))

    for name in (name.removeprefix("grad.") for name in io if name.startswith("grad.")):
        assert relative(gradient(name).view(io[f"grad.{name}"].shape), io[f"grad.{name}"]) < FEATURES, name
    for name, norm in norms.items():
        if norm is None:
            assert gradient(name) is None, name
        else:
            assert float(gradient(name).norm()) == pytest.approx(norm, rel=FEATURES, abs=1e-8), name


@pytest.mark.parametrize("size", ["large", "base"])
def test_full_size_keys_and_shapes_are_the_released_ones(size):
    with torch.device("meta"):
        model = UniTok(UniTokConfig(**VITAMIN_SIZES[f"vitamin_{size}"], text_tower=TextTowerConfig()))
    ours = {name: list(value.shape) for name, value in to_official_state(model).items()}
    released = numbers(f"official_keys/tokenizer_vitamin_{size}.json")
    assert ours == {name: shape for name, (shape, _) in released.items()}
    config = OptimizerConfig(lr=5e-4, weight_decay=0.02)
    _check_groups(model, numbers(f"official_keys/param_groups_vitamin_{size}.json"), config)


# ---- quantizer alone


@pytest.mark.parametrize("name", ["official_32768x64x8", "small_512x32x8", "temp_240x30x5"])
def test_quantizer_equals_the_recorded_one(name):
    io, meta = tensors(f"quantizer/{name}.safetensors"), numbers("quantizer/meta.json")[name]
    count = meta["K"]
    quantizer = MultiCodebookQuantizer(count, meta["V"] // count, meta["W"] // count, meta["beta"], meta["e_temp"])
    with torch.no_grad():
        quantizer.codebooks.copy_(torch.stack([io[f"codebooks.{k}.codebook.weight"] for k in range(count)]))
    features = io["features"].clone().requires_grad_()
    out = quantizer(features, with_entropy=True)
    assert same_codes(out.codes, io["indices"], io["index_margin"])
    assert torch.equal(quantizer.encode(features), out.codes)
    assert relative(quantizer.lookup(io["indices"]), io["idx_to_f"]) < FEATURES
    assert relative(out.quantized, io["quantized_forward"]) < FEATURES
    assert float(out.vq_loss) == pytest.approx(meta["vq_loss"], rel=SCALARS)
    assert float(out.entropy_loss) == pytest.approx(meta["entropy_loss"], rel=SCALARS)
    assert float(usage_statistics(out.usage)["usage"].mean()) * 100 == pytest.approx(meta["usage"], rel=SCALARS)
    loss = (out.quantized * io["loss_weights"]).mean() + out.vq_loss + 0.1 * out.entropy_loss
    assert float(loss) == pytest.approx(float(io["loss"]), rel=SCALARS)
    loss.backward()
    assert relative(features.grad, io["grad_features"]) < FEATURES
    for k in range(count):
        assert relative(quantizer.codebooks.grad[k], io[f"grad.codebooks.{k}.codebook.weight"]) < FEATURES
    assert relative(quantizer.usage_average, io["vocab_usage_after_1"]) < FEATURES
    quantizer.eval()(features.detach().flip(0) * 0.5)
    assert relative(quantizer.usage_average, io["vocab_usage_after_2(eval forward of features.flip(0)*0.5)"]) < FEATURES


# ---- schedules, groups, initial weights

SCHEDULES = {
    "cos": {"schedule": "cosine"},
    "lin": {"schedule": "linear", "hold": 0.15},
    "lin0": {"schedule": "linear", "hold": 0.05},
    "lin00": {"schedule": "linear"},
    "lin0.3": {"schedule": "two_slopes", "hold": 0.3},
    "exp": {"schedule": "exponential", "hold": 0.15},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_equal_the_recorded_ones(name):
    """Rates of both networks, the growing adversarial weight and the fading blur at 33 steps of 1000."""
    from unitok.tokenizer.adversarial import Augmentation

    plan = numbers("losses/schedules.json")
    total = plan["num_iters_per_epoch"] * plan["epoch"]
    start, warmup = round(plan["disc_start_ep"] * total), round(plan["disc_warmup_ep"] * total)
    common = {**SCHEDULES[name], "endpoints": "inclusive", "start_lr_ratio": plan["start_ratio"]}
    first = {"lr": plan["lr"], "warmup_steps": round(plan["warmup_ep"] * total), "final_lr_ratio": plan["end_ratio"]}
    second = {"lr": plan["disc_lr"], "warmup_steps": warmup, "final_lr_ratio": plan["disc_end_ratio"]}
    generator, discriminator = OptimizerConfig(**common, **first), OptimizerConfig(
        **common, **second, start_step=start
    )  # fmt: skip
    fading = DiscriminatorConfig(start_step=start, blur_steps=2 * warmup)
    for row in plan["values"][name]:
        step = row["iter"]
        assert lr_at(generator, step, total) == pytest.approx(row["lr"], rel=SCALARS, abs=1e-12)
        assert lr_at(discriminator, step, total) == pytest.approx(row["disc_lr"], rel=SCALARS, abs=1e-12)
        assert warmup_ramp(discriminator, step) == pytest.approx(row["disc_warmup"], rel=SCALARS, abs=1e-12)
        blur = min(1.0, Augmentation(fading, 0, step, 0).blur)
        assert blur == pytest.approx(row["fade_blur"], rel=SCALARS, abs=1e-9)


def _check_groups(model, recorded, config):
    """Our groups hold the parameters that the recorded ones do, with their decay and their share of the rate."""
    ours = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in parameter_groups(model, config):
        for parameter in group["params"]:
            ours[names[id(parameter)]] = (group["weight_decay"], config.lr * group["lr_scale"])
    theirs = {}
    for group in recorded:
        for name in group["names"]:
            known = "quantizer.codebooks" if name.startswith("quantizer.codebooks.") else own_name(name)
            theirs[known] = (group["weight_decay"], pytest.approx(group["lr"]))
    assert ours == theirs


@pytest.mark.parametrize("multiplier", [None, 0.1])
def test_parameter_groups_equal_the_recorded_ones(multiplier):
    recorded = numbers("losses/param_groups.json")
    multipliers = {} if multiplier is None else {"encoder.": multiplier, "text_encoder.": multiplier}
    config = OptimizerConfig(lr=5e-4, weight_decay=0.02, lr_multipliers=multipliers)
    _check_groups(small_model(), recorded[f"unitok custom_lr_multiplier={multiplier}"], config)


def small_model():
    """The sizes of the recorded small tokenizer, with fresh weights."""
    tower = TextTowerConfig(vocab_size=512, context_length=20, width=64, heads=4, layers=2)
    sizes = {"stem_width": 16, "stage_widths": (16, 24), "width": 128, "depth": 2, "num_heads": 2, "image_size": 64}
    torch.manual_seed(0)
    return UniTok(UniTokConfig(**sizes, codebook_size=64, embed_dim=96, text_tower=tower))


def test_initial_weights_are_distributed_as_recorded():
    """Means and deviations of every parameter, within what their number of entries allows."""
    state = {name: value.float() for name, value in to_official_state(small_model()).items()}
    params = numbers("losses/init_stats.json")["params"]
    assert set(params) <= set(state)
    for name, recorded in params.items():
        value, count = state[name], max(1, state[name].numel())
        assert list(value.shape) == recorded["shape"], name
        deviation = float(value.std()) if count > 1 else 0.0
        # two samples of `count` entries each: six deviations of their difference
        tolerance = 6 * recorded["std"] / math.sqrt(count)
        assert deviation == pytest.approx(recorded["std"], abs=tolerance + 1e-7), name
        assert float(value.mean()) == pytest.approx(recorded["mean"], abs=1.5 * tolerance + 1e-6), name
        assert float(value.abs().max()) == pytest.approx(
            max(abs(recorded["min"]), abs(recorded["max"])), rel=0.6, abs=1e-6
        ), name


PREPROCESS = {
    "inference": "inference_py(img_size64,ratio1.125,bilinear)",
    "vae_val": "vae_val(lanczos)",
    "clip_val": "clip_val(bicubic)",
}


@pytest.mark.parametrize("image", ["small", "square", "tall", "wide"])
def test_pixels_equal_the_recorded_ones(image):
    """Every way of the released code from an image to 64 pixels a side."""
    io = tensors("preprocess/preprocess.safetensors")
    if f"{image}.image_uint8_hwc" not in io:
        whole = PLACES[1] / "preprocess" / "preprocess.safetensors"
        if not whole.exists():
            pytest.skip(f"the recorded {image} image is left out of the repository; set UNITOK_REFERENCE")
        io = load_file(whole)
    given = Image.fromarray(io[f"{image}.image_uint8_hwc"].numpy())
    for name, recorded in PREPROCESS.items():
        assert torch.equal(eval_transform(given, 64, name), io[f"{image}.{recorded}"]), name
    assert np.array_equal(np.asarray(pad_to_square(given)), io[f"{image}.pad_square_uint8"].numpy())
    assert torch.equal(padded_transform(given, 64), io[f"{image}.mllm_vqa(pad,resize64x64 bilinear)"])
    with pytest.raises(UserError, match="expected one of plain, inference, vae_val, clip_val, padded"):
        eval_transform(given, 64, "val")


def test_saved_pixels_equal_the_recorded_ones():
    io = tensors("preprocess/preprocess.safetensors")
    rounded, truncated = (np.asarray(to_pil(io["out.x"][0], truncate)) for truncate in (False, True))
    assert np.array_equal(rounded.transpose(2, 0, 1), io["out.inference_save_uint8"][0].numpy())
    assert np.array_equal(truncated, io["out.t2i_save_uint8_hwc"].numpy())


def test_the_released_training_crop_lies_in_the_resized_image():
    """A window of what "vae_val" takes the centre of, anywhere in it, by the generator alone."""
    io = tensors("preprocess/preprocess.safetensors")
    given = Image.fromarray(io["wide.image_uint8_hwc"].numpy())
    crops = [released_train_transform(given, 64, np.random.default_rng(seed)) for seed in range(4)]
    assert torch.equal(crops[0], released_train_transform(given, 64, np.random.default_rng(0)))
    resized = eval_transform(given, 72, "clip_val")  # 72 pixels high, for the shape only
    assert all(crop.shape == (3, 64, 64) for crop in crops) and resized.shape == (3, 72, 72)
    assert not torch.equal(crops[0], crops[1])


def test_decoders_can_begin_as_wide_as_encoders():
    def deviation(**changes):
        config = UniTokConfig(
            **{"width": 64, "depth": 1, "num_heads": 1, "stage_widths": (16, 16), "stem_width": 16} | changes
        )
        return float(UniTok(config).decoder.up_conv1.conv.weight.std())

    assert deviation() == pytest.approx(0.5 * (2 / (9 * (64 + 16))) ** 0.5, rel=0.1)
    assert deviation(decoder_init_gain=None) == pytest.approx((2 / (9 * 16)) ** 0.5, rel=0.1)
    with pytest.raises(ValueError, match="decoder_init_gain=0"):
        UniTokConfig(decoder_init_gain=0)


def test_text_ids_equal_the_recorded_ones():
    recorded = numbers("preprocess/clip_tokens.json")
    tokenizer = TextTokenizer(TextTowerConfig(), None)
    assert (tokenizer.start, tokenizer.end) == (recorded["sot"], recorded["eot"])
    ids = tokenizer([row["text"] for row in recorded["texts"]])
    assert ids.tolist() == [row["ids"] for row in recorded["texts"]]


def test_discriminator_keys_are_the_released_ones():
    discriminator = build_discriminator(DiscriminatorConfig(kind="dino", dino_weights="random")).network
    released = numbers("official_keys/discriminator.json")
    assert {name: list(value.shape) for name, value in discriminator.state_dict().items()} == {
        name: shape for name, (shape, _) in released["keys"].items()
    }
    assert list(discriminator.key_depths) == released["key_depths"]
    assert sum(p.numel() for p in discriminator.parameters()) == released["params"]
    config = OptimizerConfig(lr=2e-5, weight_decay=0.2)
    decayed = {
        id(p) for group in parameter_groups(discriminator, config) if group["weight_decay"] for p in group["params"]
    }
    for name, parameter in discriminator.named_parameters():
        assert (id(parameter) in decayed) == (parameter.dim() > 1), name
