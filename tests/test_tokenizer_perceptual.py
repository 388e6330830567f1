"""Losses through networks of others, against tensors recorded from UniTok's training code, and against libraries."""

import math

import pytest
import reference
import torch
from reference import assert_near, fixture, numbers
from tiny import random_pixels

from unitok.core.errors import CheckpointError, ConfigError, UserError
from unitok.core.rng import torch_rng
from unitok.tokenizer.dino import DinoConfig, DinoDiscriminator, FrozenDino
from unitok.tokenizer.dino_heads import LocalBatchNorm, SpectralConv1d
from unitok.tokenizer.gan_losses import (
    accuracy_percent,
    adaptive_weight_from_norms,
    discriminator_loss,
    generator_loss,
)
from unitok.tokenizer.lpips import LPIPS, SLICES
from unitok.tokenizer.weights import load_strict


def tensors(name):
    return reference.tensors(f"losses/{name}.safetensors")


def table(name):
    return numbers(f"losses/{name}.json")


# ---- losses on logits


@pytest.mark.parametrize("kind", ["hinge", "softplus", "linear"])
def test_discriminator_losses_and_gradients_equal_the_recorded_ones(kind):
    io = tensors("gan_clip")
    real, fake = (io[f"logits_{side}"].requires_grad_() for side in ("real", "fake"))
    loss = discriminator_loss(real, fake, kind)
    assert loss.item() == pytest.approx(table("gan_clip")[kind], rel=1e-6)
    assert loss.item() == pytest.approx(io[f"{kind}.disc_loss"].item(), rel=1e-6)
    for ours, side in zip(torch.autograd.grad(loss, [real, fake]), ("real", "fake"), strict=True):
        assert_near(ours, io[f"{kind}.grad_{side}"], 1e-6)


def test_generator_loss_and_accuracy_equal_the_recorded_ones():
    io, numbers = tensors("gan_clip"), table("gan_clip")
    loss = generator_loss(io["logits_fake"])
    assert loss.item() == pytest.approx(numbers["generator_loss = -mean(logits_fake)"], rel=1e-6)
    real, fake = accuracy_percent(io["logits_real"], io["logits_fake"])
    assert (real.item(), fake.item()) == pytest.approx((numbers["acc_real_percent"], numbers["acc_fake_percent"]))


@pytest.mark.parametrize("kind", range(5))
def test_adaptive_weights_equal_the_recorded_table(kind):
    for row in table("adaptive_weight_table"):
        norms = torch.tensor(row["norm_grad_nll"]), torch.tensor(row["norm_grad_g"])
        assert adaptive_weight_from_norms(*norms, kind).item() == pytest.approx(row[f"type{kind}"], rel=1e-5)


def test_unknown_kinds_are_refused():
    with pytest.raises(ConfigError, match="'wasserstein' is unknown; expected one of hinge, softplus, linear"):
        discriminator_loss(torch.zeros(1), torch.zeros(1), "wasserstein")
    with pytest.raises(ConfigError, match="kind 5 is unknown; expected one of 0, 1, 2, 3, 4"):
        adaptive_weight_from_norms(torch.ones(()), torch.ones(()), 5)


# ---- LPIPS


@pytest.fixture(scope="module")
def lpips():
    """The recorded weights follow the recipe of `LPIPS.random`."""
    return LPIPS.random(table("lpips")["base"])


def test_lpips_has_the_recorded_weights(lpips):
    recorded = table("lpips")["keys"]
    state = lpips.state_dict()
    assert sorted(state) == sorted(recorded)
    for key, value in state.items():
        assert list(value.shape) == recorded[key]["shape"]
        assert value.double().sum().item() == pytest.approx(recorded[key]["sum"], abs=1e-3, rel=1e-5), key
        assert value.flatten()[:3].tolist() == pytest.approx(recorded[key]["first"], rel=1e-6)
    buffers = table("lpips")["buffers_not_in_official_file"]
    for name, value in lpips.named_buffers():
        assert value.flatten().tolist() == pytest.approx(buffers[name], rel=1e-6)


def test_lpips_and_its_gradient_equal_the_recorded_ones(lpips):
    recorded = tensors("lpips_io")
    reconstruction = recorded["rec"].requires_grad_()
    loss = lpips(reconstruction, recorded["inp"])
    assert loss.item() == pytest.approx(recorded["loss"].item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, reconstruction)
    assert_near(gradient, recorded["grad_rec"])
    slices = lpips.net(lpips._whitened(torch.cat([recorded["inp"], recorded["rec"].detach()])))
    for number, features in enumerate(slices, start=1):
        moments = torch.stack([features.mean(), features.std()])
        assert_near(moments, recorded[f"relu{number}_mean_std"], 1e-5)


def test_lpips_is_frozen_and_gives_no_gradient_to_the_target(lpips):
    assert not any(p.requires_grad for p in lpips.parameters()) and not lpips.training
    target = random_pixels(1, 3, 16, 24).requires_grad_()
    assert not lpips(random_pixels(1, 3, 16, 24, seed=1), target).requires_grad
    with pytest.raises(UserError, match="at least 16 pixels"):
        lpips(random_pixels(1, 3, 8, 32), random_pixels(1, 3, 8, 32))


def test_lpips_of_equal_and_of_dead_features_has_finite_gradient():
    model = LPIPS.random(0)
    pixels = random_pixels(1, 3, 16, 16).requires_grad_()
    loss = model(pixels, pixels.detach())
    assert loss.item() == 0 and torch.autograd.grad(loss, pixels)[0].abs().sum() == 0
    with torch.no_grad():
        model.net.slice2[1].bias.fill_(-1e3)  # all features of the second slice become 0
    loss = model(pixels, -pixels.detach())
    assert loss > 0 and torch.autograd.grad(loss, pixels)[0].isfinite().all()


def test_lpips_from_torchvision_equals_torchmetrics(lpips, tmp_path):
    """The same VGG16 in torchvision's layout, with the heads that torchmetrics ships."""
    from torchmetrics.functional.image.lpips import _LPIPS

    theirs = _LPIPS(pretrained=True, net="vgg", pnet_rand=True)
    state, places = {}, iter(range(31))
    for index, widths in enumerate(SLICES, start=1):
        for offset in range((index > 1) + 2 * len(widths)):
            place = next(places)
            for kind in ("weight", "bias"):
                key = f"net.slice{index}.{offset}.{kind}"
                if key in lpips.state_dict():
                    state[f"features.{place}.{kind}"] = lpips.state_dict()[key].clone()
    assert state.keys() == {f"features.{key}" for key in _features(theirs)}
    with torch.no_grad():
        for key, value in _features(theirs).items():
            value.copy_(state[f"features.{key}"])
    torch.save(state | {"classifier.0.weight": torch.zeros(2)}, tmp_path / "vgg16.pth")
    ours = LPIPS.from_file(tmp_path / "vgg16.pth")
    one, other = random_pixels(2, 3, 48, 32), random_pixels(2, 3, 48, 32, seed=1)
    torch.testing.assert_close(ours(one, other), theirs(one, other).mean(), rtol=1e-4, atol=1e-7)


def _features(theirs):
    """torchmetrics numbers the layers of all slices through, as torchvision does."""
    return {key.split(".", 1)[1]: value for key, value in theirs.net.named_parameters()}


def test_lpips_file_in_the_released_layout(lpips, tmp_path):
    torch.save(lpips.state_dict(), tmp_path / "lpips_with_vgg.pth")
    loaded = LPIPS.from_file(tmp_path / "lpips_with_vgg.pth")
    assert all(torch.equal(value, lpips.state_dict()[key]) for key, value in loaded.state_dict().items())
    state = lpips.state_dict()
    del state["lins.2.model.1.weight"]
    torch.save(state | {"net.slice6.0.weight": torch.zeros(1)}, tmp_path / "broken.pth")
    expected = r"missing: lins\.2\.model\.1\.weight; unexpected: net\.slice6\.0\.weight"
    with pytest.raises(CheckpointError, match=expected):
        LPIPS.from_file(tmp_path / "broken.pth")


# ---- DINO and its discriminator


@pytest.fixture(scope="module")
def dino():
    sizes = {name: value for name, value in table("disc")["dino"].items() if name != "init_values"}
    sizes["image_size"] = sizes.pop("img_size")
    return FrozenDino.from_file(fixture("losses/dino_tiny.safetensors"), DinoConfig(**sizes))


def make_discriminator(dino, norm="gn", heads="disc_gn", **changes):
    settings = table("disc")
    changes = {"key_depths": settings["key_depths"]} | changes
    model = DinoDiscriminator(dino, kernel_size=settings["kernel_size"], norm=norm, **changes)
    load_strict(model, tensors(heads), "discriminator", heads)
    return model.eval()


@pytest.fixture(scope="module")
def discriminator(dino):
    return make_discriminator(dino)


@pytest.fixture(scope="module")
def disc_io():
    return tensors("disc_io")


def test_dino_features_equal_the_recorded_ones(discriminator, disc_io):
    row, column = disc_io["crop_64.offset_top_left"].tolist()
    whitened = disc_io["area_64.x"] * discriminator.x_scale + discriminator.x_shift
    features = discriminator.dino(whitened[:, :, row : row + 56, column : column + 56], discriminator.key_depths)
    for number, tokens in enumerate(features):
        assert_near(tokens[:, 0], disc_io[f"crop_64.feat{number}.cls"])
        assert_near(tokens[:, 1:], disc_io[f"crop_64.feat{number}.patch"])


@pytest.mark.parametrize("case", ["exact56", "exact112", "area_64", "bicubic_56x64"])
def test_logits_equal_the_recorded_ones(discriminator, disc_io, case):
    assert_near(discriminator(disc_io[f"{case}.x"]), disc_io[f"{case}.logits"])


def test_logits_of_a_crop_equal_the_recorded_ones(discriminator, disc_io):
    offset = tuple(disc_io["crop_64.offset_top_left"].tolist())
    assert_near(discriminator(disc_io["area_64.x"], crop=offset), disc_io["crop_64.logits"])


def test_gradient_of_the_pixels_equals_the_recorded_one(discriminator, disc_io):
    pixels = disc_io["exact56.x"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(pixels).mean(), pixels)
    assert_near(gradient, disc_io["exact56.grad_x_of_mean_logit"])


def test_logits_with_batch_norm_equal_the_recorded_ones(dino, disc_io):
    logits = make_discriminator(dino, norm="bn")(disc_io["exact56.x"])
    assert_near(logits, disc_io["bn.logits(on exact56.x)"])


def test_logits_with_spectral_norm_equal_the_recorded_ones(dino, disc_io):
    """The first head only: its logits stand first."""
    model = make_discriminator(dino, heads="disc_gn_spec", spectral_norm=True, key_depths=[0])
    logits = model(disc_io["exact56.x"])
    assert_near(logits, disc_io["gn_spec.logits(on exact56.x)"][:, : logits.shape[1]])


def test_spectral_norm_trains_as_torchs_does():
    torch.manual_seed(0)
    ours = SpectralConv1d(6, 4, 3, padding=1, padding_mode="circular")
    plain = torch.nn.Conv1d(6, 4, 3, padding=1, padding_mode="circular")
    theirs = torch.nn.utils.spectral_norm(plain, eps=1e-12)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 8)
    for _ in range(2):  # both passes before the backward, as for real and reconstructed images
        one, other = ours(x).square().mean(), theirs(x).square().mean()
        torch.testing.assert_close(one, other)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name])
    one.backward()
    other.backward()
    torch.testing.assert_close(ours.weight_orig.grad, theirs.weight_orig.grad)


def test_local_batch_norm_is_batch_norm_of_eight_images():
    torch.manual_seed(0)
    x, norm = torch.randn(16, 4, 5), LocalBatchNorm(4)
    theirs = torch.nn.BatchNorm1d(4, eps=1e-6)
    torch.testing.assert_close(norm(x), torch.cat([theirs(x[:8]), theirs(x[8:])]))
    assert norm(x[:11]).shape == (11, 4, 5)


def test_discriminator_starts_like_the_recorded_one(dino):
    torch.manual_seed(0)
    model = DinoDiscriminator(dino, table("disc")["key_depths"])
    state, recorded = model.state_dict(), table("init_stats_disc")
    assert state.keys() == recorded.keys() | {"x_scale", "x_shift"}
    for name, row in recorded.items():
        assert list(state[name].shape) == row["shape"]
        if state[name].numel() > 1000:
            assert state[name].std().item() == pytest.approx(row["std"], rel=0.05), name
        elif state[name].dim() > 1:
            assert state[name].std().item() == pytest.approx(0.5 * math.sqrt(2 / 65), rel=0.3)
        else:
            assert (state[name] == row["mean"]).all() and row["std"] == 0


def test_official_names_and_shapes():
    def shapes(module):
        return {name: list(value.shape) for name, value in module.state_dict().items()}

    def recorded(name):
        keys = numbers(f"official_keys/{name}.json")
        return keys, {key: shape for key, (shape, _) in keys.get("keys", keys).items()}

    dino = FrozenDino()
    assert shapes(dino) == recorded("dinov2_vit_small")[1]
    model = DinoDiscriminator(dino)
    keys, expected = recorded("discriminator")
    assert shapes(model) == expected and model.key_depths == tuple(keys["key_depths"])
    assert sum(p.numel() for p in model.parameters()) == keys["params"]


def test_dino_is_neither_trained_nor_saved_but_moves_along(dino):
    model = make_discriminator(dino)
    assert not any(p.requires_grad for p in model.dino.parameters())
    assert not any("dino" in name for name, _ in model.named_modules())
    model.bfloat16()
    assert model.heads[0][2].weight.dtype == torch.bfloat16
    assert model.dino.pos_embed.dtype == model.x_scale.dtype == torch.float32
    assert torch.equal(model.x_scale, tensors("disc_gn")["x_scale"])
    pixels = random_pixels(2, 3, 56, 56)
    exact = make_discriminator(dino)(pixels)
    assert_near(model(pixels.bfloat16()).float(), exact, 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert_near(make_discriminator(dino)(pixels).float(), exact, 0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_dino_moves_to_the_gpu():
    model = DinoDiscriminator(FrozenDino.random(DinoConfig(64, 2, 2, image_size=56)), [0, 1]).cuda()
    assert model.dino.pos_embed.is_cuda and model(random_pixels(1, 3, 64, 64).cuda()).is_cuda


def test_positions_of_the_grid_they_were_made_for_are_used_as_they_are(dino):
    assert dino._positions(37, 37) is dino.pos_embed
    assert dino._positions(4, 6).shape == (1, 25, 64)


@pytest.mark.parametrize(
    ("size", "image_side", "expected"),
    [((256, 256), None, 252), ((256, 300), 224, 224), ((64, 80), None, 56), ((10, 10), None, 28), ((28, 56), None, 28)],
)
def test_side_of_what_dino_sees(size, image_side, expected):
    model = DinoDiscriminator(
        FrozenDino.random(DinoConfig(32, 1, 2, image_size=56)), [0], norm="bn", image_side=image_side
    )
    assert model.side(*size) == expected
    assert model(random_pixels(1, 3, *size)).shape == (1, (expected // 14) ** 2)


def test_crops_come_from_the_generator_and_lie_inside(discriminator):
    drawn = [discriminator.draw_crop(64, 60, torch_rng("crop", step)) for step in range(300)]
    assert drawn == [discriminator.draw_crop(64, 60, torch_rng("crop", step)) for step in range(300)]
    crops = [crop for crop in drawn if crop is not None]
    assert 110 < len(crops) < 190
    assert {row for row, _ in crops} == set(range(9)) and {column for _, column in crops} == set(range(5))
    assert all(discriminator.draw_crop(56, 64, torch_rng("crop", step)) is None for step in range(20))
    with pytest.raises(UserError, match="does not lie in an image"):
        discriminator(random_pixels(1, 3, 64, 64), crop=(0, 9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_depths": [0, 4]}, "ascending numbers of the 4 DINO blocks"),
        ({"key_depths": [1, 0]}, "ascending"),
        ({"key_depths": []}, "ascending"),
        ({"norm": "ln"}, "expected gn or bn"),
        ({"kernel_size": 4}, "expected an odd number"),
        ({"kernel_size": -3}, "expected an odd number"),
        ({"image_side": 225}, "expected a multiple of 14, at least 28"),
        ({"image_side": 14}, "at least 28"),
    ],
)
def test_contradicting_sizes_of_the_discriminator(dino, changes, message):
    with pytest.raises(ConfigError, match=message):
        DinoDiscriminator(dino, **({"key_depths": [0]} | changes))


def test_group_norm_needs_a_fitting_width():
    with pytest.raises(ConfigError, match="multiple of 32"):
        DinoDiscriminator(FrozenDino.random(DinoConfig(24, 1, 2, image_size=56)), [0])


def test_random_dino_is_the_same_for_the_same_seed_and_sees_the_image():
    config = DinoConfig(32, 2, 2, image_size=56)
    one, other, third = (FrozenDino.random(config, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert not torch.equal(one.pos_embed, third.pos_embed)
    first, second = (one(random_pixels(1, 3, 56, 56, seed=s), [1])[0] for s in (0, 1))
    assert (first - second).norm() > 0.1 * first.norm()
