"""Losses of stage one against formulas written out, and one whole training step against the naive computation."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import PlainEngine, assert_same_gradients, gradients, make_tokenizer, random_pixels

from unitok.core.errors import ConfigError
from unitok.data.transforms import as_pixels
from unitok.tokenizer.adversarial import Discriminator, PatchDiscriminator, adaptive_weight
from unitok.tokenizer.gan_losses import hinge
from unitok.tokenizer.losses import contrastive_loss, reconstruction_loss


def test_reconstruction_loss_by_hand():
    ours = reconstruction_loss(torch.tensor([0.5, -1.0]), torch.tensor([0.0, 1.0]), l1_weight=0.2, l2_weight=3.0)
    assert ours.item() == pytest.approx(0.2 * (0.5 + 2) / 2 + 3.0 * (0.25 + 4) / 2)


# ---- contrastive


def test_contrastive_loss_equals_open_clips():
    from open_clip.loss import ClipLoss

    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(5, 8), dim=-1).requires_grad_() for _ in range(2))
    scale = torch.tensor([math.log(1 / 0.07)], requires_grad=True)
    ours = contrastive_loss(image, text, scale)
    theirs = ClipLoss()(image, text, scale.exp())
    torch.testing.assert_close(ours, theirs.squeeze(), atol=1e-6, rtol=1e-6)
    leaves = [image, text, scale]
    for one, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_contrastive_loss_of_two_pairs_by_hand():
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[0.6, 0.8], [0.8, -0.6]])
    logits = [[0.6, 0.8], [0.8, -0.6]]  # at scale 1; symmetric, so both directions agree
    rows = [math.log(sum(math.exp(x) for x in row)) - row[i] for i, row in enumerate(logits)]
    assert contrastive_loss(image, text, torch.zeros(1)).item() == pytest.approx(sum(rows) / 2, abs=1e-6)


def test_rows_without_a_caption_are_left_out_of_the_contrastive_loss():
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(5, 8), dim=-1).requires_grad_() for _ in range(2))
    scale, kept = torch.tensor([1.3], requires_grad=True), torch.tensor([True, False, True, True, False])
    ours = contrastive_loss(image, text, scale, kept)
    alone = contrastive_loss(image[kept], text[kept], scale)
    torch.testing.assert_close(ours, alone)
    for one, other in zip(
        torch.autograd.grad(ours, [image, text, scale]), torch.autograd.grad(alone, [image, text, scale]), strict=True
    ):
        torch.testing.assert_close(one, other)
    everything = contrastive_loss(image, text, scale, torch.ones(5, dtype=torch.bool))
    torch.testing.assert_close(everything, contrastive_loss(image, text, scale))
    nothing = contrastive_loss(image, text, scale, torch.zeros(5, dtype=torch.bool))
    assert nothing.item() == 0 and torch.autograd.grad(nothing, image)[0].abs().sum() == 0


# ---- adversarial


def naive_weight(tokenizer, reconstruction, adversarial):
    """VQGAN's formula, at the last convolution's weight through autograd."""
    weight = tokenizer.decoder.up_conv4.conv2.weight
    (first,) = torch.autograd.grad(reconstruction, weight, retain_graph=True)
    (second,) = torch.autograd.grad(adversarial, weight, retain_graph=True)
    return (first.norm() / (second.norm() + 1e-6)).clamp(max=1e4).detach()


@pytest.fixture
def networks():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(channels=8, num_layers=3)
    return make_tokenizer(embed_dim=12), discriminator


def test_adaptive_weight_equals_the_gradient_at_the_last_convolution(networks):
    tokenizer, discriminator = networks
    pixels = random_pixels(2, 3, 32, 48)
    out = tokenizer(pixels)
    reconstruction = reconstruction_loss(out.reconstruction, pixels, 0.2, 1.0)
    adversarial = -discriminator(out.reconstruction).mean() * 50
    expected = naive_weight(tokenizer, reconstruction, adversarial)
    at_output = [
        torch.autograd.grad(loss, out.reconstruction, retain_graph=True)[0] for loss in (reconstruction, adversarial)
    ]
    shape = tokenizer.decoder.up_conv4.conv2.weight.shape
    ours = adaptive_weight(out.last_hidden, *at_output, shape)
    assert expected > 0.01
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    assert adaptive_weight(out.last_hidden, at_output[0] * 1e6, at_output[1] * 0, shape) == 1e4


def test_discriminator_gives_patch_logits_that_do_not_depend_on_the_batch(networks):
    """Batch statistics would depend on how the batch is spread over ranks."""
    discriminator = networks[1].train()
    pixels = random_pixels(3, 3, 32, 64)
    together = discriminator(pixels)
    assert together.shape == (3, 1, 4, 8)
    for index in range(3):
        torch.testing.assert_close(discriminator(pixels[index : index + 1])[0], together[index], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("channels", "num_layers"), [(8, 1), (16, 2), (32, 4)])
def test_discriminator_sizes(channels, num_layers):
    side = 32 // 2**num_layers
    assert PatchDiscriminator(channels, num_layers)(random_pixels(1, 3, 32, 32)).shape == (1, 1, side, side)


def test_discriminator_learns_to_tell_real_from_blurred(networks):
    discriminator = networks[1]
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=2e-3)
    real = random_pixels(2, 3, 32, 32)
    fake = F.avg_pool2d(real, 3, 1, 1)
    losses = []
    for _ in range(40):
        loss = hinge(discriminator(real), discriminator(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(2.0, abs=0.2) and losses[-1] < 0.2


# ---- a whole step


def make_task(**changes):
    from unitok.tokenizer.task import TokenizerTask, TokenizerTrainConfig

    sizes = make_tokenizer(embed_dim=12).config
    names = ("image_size", "stem_width", "stage_widths", "stage_depths", "width", "depth", "num_heads", "mlp_ratio")
    names += ("projection_mlp_ratio", "decoder_stage_depths", "num_codebooks", "codebook_size", "code_dim", "embed_dim")
    model = {name: getattr(sizes, name) for name in names}
    loss = {"contrastive": 0.0, "adversarial": 0.3, "vq": 0.7, "l1": 0.2, "l2": 1.5} | changes.pop("loss", {})
    discriminator = {"start_step": 3, "channels": 8} | changes.pop("discriminator", {})
    data = {"source": "shapes:train?num=6&seed=0"}
    return TokenizerTask(
        TokenizerTrainConfig(
            output_dir="unused", model=model, loss=loss, discriminator=discriminator, data=data, **changes
        )
    )


def test_an_image_alone_has_nothing_to_be_compared_with(monkeypatch):
    task = make_task(engine={"micro_batch_size": 1, "accumulation_steps": 64})
    task.check_batch()
    loss = task.config.loss.model_copy(update={"contrastive": 1.0})
    task.config = task.config.model_copy(update={"loss": loss})
    with pytest.raises(ConfigError, match=r"micro_batch_size=1 on one rank: .*always 0; raise it"):
        task.build()
    monkeypatch.setattr("unitok.tokenizer.task.world_size", lambda: 2)
    task.check_batch()


@pytest.mark.parametrize(("step", "adaptive"), [(2, True), (3, False), (3, True), (4, True)])
def test_one_step_equals_the_naive_losses(networks, step, adaptive):
    """The task puts the adversarial gradient in at the reconstruction; gradients must be those of the plain sum."""
    task = make_task(
        loss={"entropy": 0.5}, discriminator={"adaptive": adaptive, "warmup_steps": 2, "start_step": 3, "channels": 8}
    )
    tokenizer, discriminator = networks
    batch = task.load_batch([0, 4], epoch=0)
    pixels = as_pixels(batch["pixels"])
    engines = {"tokenizer": PlainEngine(tokenizer), "discriminator": PlainEngine(Discriminator(discriminator))}
    task.model = tokenizer
    metrics = task.micro_step(engines, batch, 0, step)
    ours = {name: p.grad for name, p in tokenizer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    theirs_d = {name: p.grad for name, p in discriminator.named_parameters() if p.grad is not None}

    out = tokenizer(pixels, with_entropy=True)
    reconstruction = (
        0.2 * (out.reconstruction - pixels).abs().mean() + 1.5 * (out.reconstruction - pixels).pow(2).mean()
    )
    loss = reconstruction + 0.7 * out.vq_loss + 0.5 * out.entropy_loss
    assert metrics["loss"].item() == pytest.approx(loss.item(), abs=1e-5)
    if step >= 3:
        adversarial = -discriminator(out.reconstruction).mean()
        weight = 0.3 * min(1.0, (step - 2) / 2)
        weight = weight * naive_weight(tokenizer, reconstruction, adversarial) if adaptive else weight
        assert metrics["adversarial_weight"].item() == pytest.approx(float(weight), rel=1e-3)
        loss = loss + weight * adversarial
        judged = hinge(discriminator(pixels), discriminator(out.reconstruction.detach()))
        assert metrics["discriminator"].item() == pytest.approx(judged.item(), abs=1e-5)
        assert_same_gradients(theirs_d, gradients(judged, discriminator), atol=1e-6, rtol=1e-4)
    else:
        assert not theirs_d, "before its start step the discriminator gets no gradient"
    expected = {name: g for name, g in gradients(loss, tokenizer).items() if g.abs().sum() > 0}
    assert_same_gradients(ours, expected, atol=1e-4, rtol=1e-3)


def test_contrastive_without_a_text_tower_is_refused():
    with pytest.raises(ConfigError, match="model.text_tower"):
        make_task(loss={"contrastive": 1.0})


def test_metrics_name_the_health_of_the_codebooks(networks):
    task = make_task()
    engines = {"tokenizer": PlainEngine(networks[0])}
    task.model = networks[0]
    metrics = task.micro_step(engines, task.load_batch([1, 2, 3], 0), 0, 0)
    assert {"loss", "reconstruction", "vq", "mse", "usage", "perplexity", "dead", "usage_0", "dead_2"} <= metrics.keys()
    assert all(not value.requires_grad and value.dim() == 0 for value in metrics.values())
    assert 0 < metrics["usage"] <= 1 and set(task.headline) <= metrics.keys()


def test_discriminator_width_must_fit_its_norm():
    with pytest.raises(ConfigError, match="channels=6"):
        PatchDiscriminator(channels=6)
