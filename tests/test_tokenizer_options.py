"""Options beyond the plain recipe: residual codes, drop path, locks, distillation, revival, augmentation, settings."""

import pytest
import torch
import torch.nn.functional as F
from tiny import PlainEngine, gradients, make_mllm, make_tokenizer, random_codes, random_pixels, text_tower

from unitok.core.errors import ConfigError, DataError, UserError
from unitok.core.optim import OptimizerConfig, lr_at, parameter_groups
from unitok.mllm.pipeline import check_same_codes
from unitok.tokenizer.adversarial import Augmentation, Discriminator, PatchDiscriminator, discriminator_losses
from unitok.tokenizer.codebook_care import revive_dead_codes_
from unitok.tokenizer.distill import Teacher, distillation_loss
from unitok.tokenizer.initial import freeze
from unitok.tokenizer.quantizer import MultiCodebookQuantizer, ResidualQuantizer
from unitok.tokenizer.settings import DiscriminatorConfig, DistillConfig, TokenizerTrainConfig, check_settings

K, V, D = 4, 16, 6


# ---- residual quantization


@pytest.fixture
def residual():
    torch.manual_seed(0)
    return ResidualQuantizer(K, V, D, commitment_weight=0.4)


def test_residual_codes_equal_a_plain_search(residual):
    """Step by step by squared distances; losses against every partial sum, in value and gradient."""
    features = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1), requires_grad=True)
    out = residual(features)
    z = (features / features.norm(dim=-1, keepdim=True)).view(-1, D)
    left, partial, codes, losses = z.detach(), torch.zeros(10, D), [], []
    for k in range(K):
        entries = residual.codebooks[k]
        code = ((left.unsqueeze(1) - entries.detach()) ** 2).sum(-1).argmin(-1)
        partial = partial + entries[code]
        left = left - entries[code].detach()
        losses.append(0.4 * ((z - partial.detach()) ** 2).mean() + ((partial - z.detach()) ** 2).mean())
        codes.append(code)
    loss = torch.stack(losses).mean()
    assert torch.equal(out.codes, torch.stack(codes).view(K, 2, 5).transpose(0, 1))
    torch.testing.assert_close(out.vq_loss, loss)
    torch.testing.assert_close(out.quantized.view(-1, D), partial, atol=1e-6, rtol=1e-5)
    mix = torch.randn(10, D, generator=torch.Generator().manual_seed(2))
    leaves = [features, residual.codebooks]
    ours = torch.autograd.grad((out.quantized.view(-1, D) * mix).sum() + out.vq_loss, leaves)
    theirs = torch.autograd.grad(((z + (partial - z).detach()) * mix).sum() + loss, leaves)
    for one, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert torch.equal(residual.encode(features), out.codes)
    torch.testing.assert_close(residual.lookup(out.codes), out.quantized, atol=1e-6, rtol=0)


def test_each_residual_code_brings_the_sum_closer(residual):
    """On average over vectors, as long as entries suit the residuals they code."""
    features = F.normalize(torch.randn(1, 200, D), dim=-1)
    optimizer = torch.optim.Adam(residual.parameters(), lr=0.02)
    for _ in range(60):
        loss = residual(features).vq_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    codes, errors = residual.encode(features), []
    for count in range(1, K + 1):
        entries = torch.stack([residual.codebooks[k][codes[0, k]] for k in range(count)]).sum(0)
        errors.append(float((entries - features[0]).square().sum(-1).mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.3 * errors[0]


def test_residual_refusals(residual):
    with pytest.raises(ConfigError, match="no entropy loss"):
        residual(torch.randn(1, 2, D), with_entropy=True)
    with pytest.raises(DataError, match="13 channels: expected code_dim = 6"):
        residual(torch.zeros(1, 2, 13))
    with pytest.raises(DataError, match="expected 0 to 15"):
        residual.lookup(torch.full((1, K, 2), V))


RESIDUAL = {"quantizer": "residual", "code_dim": 12}


def test_a_residual_tokenizer_and_its_language_model_share_codes():
    """Same look-up in both; a model of multi-codebook codes does not take residual ones."""
    tokenizer = make_tokenizer(**RESIDUAL)
    pixels = random_pixels(2, 3, 32, 32)
    codes = tokenizer.encode(pixels)
    assert tokenizer.code_vectors(codes).shape == (2, 4, 12) and tokenizer.config.code_width == 12
    assert tokenizer.decode(codes).shape == pixels.shape
    model = make_mllm(**RESIDUAL, num_image_positions=4)
    model.attach_tokenizer(tokenizer)
    torch.testing.assert_close(model.embedder.code_vectors(codes), tokenizer.code_vectors(codes))
    check_same_codes(model, tokenizer)
    with pytest.raises(DataError, match="quantizer is residual"):
        make_mllm(num_image_positions=4).attach_tokenizer(tokenizer)
    with pytest.raises(UserError, match="quantizer: the model was trained on codes with multi_codebook"):
        check_same_codes(make_mllm(num_image_positions=4), tokenizer)


def test_one_codebook_is_plain_vector_quantization():
    quantizer = MultiCodebookQuantizer(1, V, D)
    features = torch.randn(1, 9, D)
    similarities = F.normalize(features[0], dim=-1) @ F.normalize(quantizer.codebooks[0], dim=-1).T
    assert torch.equal(quantizer.encode(features)[0, 0], similarities.argmax(-1))


# ---- running usage and revival


def test_running_usage_is_a_copy_first_and_an_average_afterwards():
    quantizer = MultiCodebookQuantizer(K, V, D)
    batches = [torch.randn(2, 30, K * D) for _ in range(102)]
    shares = [quantizer(batch).usage / 60 for batch in batches]
    expected = shares[0]
    for index, share in enumerate(shares[1:], 1):
        decay = 0.9 if index < 100 else 0.99
        expected = decay * expected + (1 - decay) * share
    torch.testing.assert_close(quantizer.usage_average, expected)
    assert int(quantizer.usage_updates) == 102


def test_averages_take_replaced_elements_over_at_once():
    from unitok.core.ema import Ema

    quantizer = MultiCodebookQuantizer(K, V, D)
    ema = Ema(quantizer, 0.9)
    before = ema.shadow[0].clone()
    mask, values = torch.zeros(K, V, D, dtype=torch.bool), torch.full((K, V, D), 3.0)
    mask[1, 2] = True
    ema.replace({"codebooks": (mask, values)})
    assert torch.equal(ema.shadow[0], torch.where(mask, values, before))


def test_dead_codes_become_vectors_of_the_batch():
    torch.manual_seed(0)
    quantizer = MultiCodebookQuantizer(K, V, D)
    features = torch.randn(1, 5, K * D)  # five vectors cannot use sixteen entries
    before = quantizer(features)
    kept = quantizer.codebooks.detach().clone()
    dead = quantizer.usage_average < 0.5 / V
    length = quantizer.codebooks.norm(dim=-1).mean(dim=1)
    mask, values = revive_dead_codes_(quantizer, 0.5, 7)
    assert torch.equal(mask, dead.unsqueeze(-1).expand(-1, -1, D)) and (dead.sum(1) >= V - 5).all()
    assert torch.equal(values, quantizer.codebooks)
    chunks = F.normalize(features.view(5, K, D), dim=-1)
    for k in range(K):
        for v in range(V):
            entry = quantizer.codebooks[k, v]
            if dead[k, v]:
                assert ((chunks[:, k] * length[k] - entry).abs().amax(-1) < 1e-6).any()
            else:
                assert torch.equal(entry, kept[k, v])
    assert not (quantizer.usage_average < 0.5 / V).any()
    again = MultiCodebookQuantizer(K, V, D)
    again.load_state_dict({**quantizer.state_dict(), "codebooks": kept, "usage_average": before.usage / 5})
    again(features), again.usage_average.copy_(before.usage / 5)
    revive_dead_codes_(again, 0.5, 7)
    assert torch.equal(again.codebooks, quantizer.codebooks), "same key, same draw"
    assert revive_dead_codes_(quantizer, 0.5, 8) is None, "all entries have the average share now"


# ---- stochastic depth


def test_drop_path_skips_branches_by_the_given_draws():
    tokenizer = make_tokenizer(depth=3, drop_path=0.5).train()
    pixels, draws = random_pixels(2, 3, 32, 32), torch.full((2, tokenizer_draws(3)), 0.9)
    kept = tokenizer(pixels, drop_draws=draws).reconstruction
    plain = tokenizer(pixels).reconstruction
    assert not torch.allclose(kept, plain), "kept branches are scaled by 1 / (1 - rate)"
    draws[1, -1] = 0.0  # the second image skips the last block's MLP in the decoder
    changed = tokenizer(pixels, drop_draws=draws).reconstruction
    assert torch.equal(changed[0], kept[0]) and not torch.allclose(changed[1], kept[1])
    tokenizer.eval()
    assert torch.equal(tokenizer(pixels, drop_draws=draws).codes, tokenizer.encode(pixels))
    torch.testing.assert_close(tokenizer(pixels, drop_draws=draws).reconstruction, tokenizer(pixels).reconstruction)
    tokenizer.train()
    tokenizer(pixels, drop_draws=draws)
    assert torch.equal(tokenizer.encode(pixels), tokenizer.eval().encode(pixels)), "old draws must not linger"


def tokenizer_draws(depth):
    return 4 * depth


def test_drop_path_rates_grow_with_depth():
    rates = [block.drop_path1.rate for block in make_tokenizer(depth=3, drop_path=0.4).encoder.blocks]
    assert rates == pytest.approx([0.0, 0.2, 0.4])


def test_only_the_first_images_are_decoded():
    tokenizer = make_tokenizer()
    pixels = random_pixels(3, 3, 32, 32)
    some, every = tokenizer(pixels, num_reconstructed=2), tokenizer(pixels)
    assert some.reconstruction.shape[0] == 2 and some.codes.shape[0] == 3
    torch.testing.assert_close(some.reconstruction, every.reconstruction[:2], atol=1e-6, rtol=1e-5)


def test_frozen_codes_are_those_of_evaluation():
    """Decoder-only fine-tuning: stochastic depth stays out of the encoder, and usage is not counted."""
    tokenizer = make_tokenizer(depth=3, drop_path=0.6).train()
    freeze(tokenizer, train_config(trainable="decoder", init_from="x", loss={"contrastive": 0.0}))
    pixels, draws = random_pixels(4, 3, 32, 32), torch.rand(4, 12, generator=torch.Generator().manual_seed(0))
    before = tokenizer.quantizer.usage_average.clone()
    out = tokenizer(pixels, drop_draws=draws)
    assert torch.equal(out.codes, tokenizer.encode(pixels)) and out.usage.sum() > 0
    assert torch.equal(tokenizer.quantizer.usage_average, before) and int(tokenizer.quantizer.usage_updates) == 0
    assert not torch.allclose(out.reconstruction, tokenizer.eval()(pixels).reconstruction), "the decoder does drop"
    grads = gradients(out.reconstruction.square().mean(), tokenizer.train())
    assert grads and all(name.startswith("decoder.") for name in grads)


# ---- what is trained


def train_config(**changes):
    return TokenizerTrainConfig(output_dir="unused", **changes)


TOWER = text_tower(vocab_size=40, layers=3)
GROUPS = [
    ("token_embedding", "positional_embedding"), ("resblocks.0.",), ("resblocks.1.",), ("resblocks.2.", "ln_final"),
    ("text_projection",),
]  # fmt: skip


@pytest.mark.parametrize("unlocked", [0, 1, 2, 5])
@pytest.mark.parametrize("norms", [False, True])
def test_text_lock_leaves_the_last_groups_open(unlocked, norms):
    tokenizer = make_tokenizer(text_tower=TOWER)
    freeze(tokenizer, train_config(text_lock={"enabled": True, "unlocked_layers": unlocked, "train_layer_norm": norms}))
    open_parts = tuple(part for group in GROUPS[len(GROUPS) - unlocked :] for part in group)
    for name, parameter in tokenizer.named_parameters():
        is_open = not name.startswith("text_encoder.") or any(part in name for part in open_parts)
        is_norm = name.startswith("text_encoder.") and ("ln_" in name)
        assert parameter.requires_grad == (is_open or (norms and is_norm)), name
    with pytest.raises(ConfigError, match="unlocked_layers=6: the text tower has 5 groups"):
        freeze(tokenizer, train_config(text_lock={"enabled": True, "unlocked_layers": 6}))


def test_without_its_loss_the_contrastive_side_is_not_trained():
    tokenizer = make_tokenizer(text_tower=TOWER)
    freeze(tokenizer, train_config(loss={"contrastive": 0.0}))
    frozen = {name.split(".")[0] for name, parameter in tokenizer.named_parameters() if not parameter.requires_grad}
    assert frozen == {"text_encoder", "fc_norm", "projection", "logit_scale"}


def test_rates_by_prefix():
    tokenizer = make_tokenizer()
    config = OptimizerConfig(lr=1.0, lr_multipliers={"encoder.": 0.1, "encoder.blocks.": 0.5})
    names = {id(p): n for n, p in tokenizer.named_parameters()}
    for group in parameter_groups(tokenizer, config):
        for name in (names[id(p)] for p in group["params"]):
            expected = 0.5 if name.startswith("encoder.blocks.") else 0.1 if name.startswith("encoder.") else 1.0
            assert group["lr_scale"] == expected, name
    with pytest.raises(ConfigError, match="no trainable parameter begins with 'encodr.'"):
        parameter_groups(tokenizer, OptimizerConfig(lr_multipliers={"encodr.": 0.1}))


@pytest.mark.parametrize(("changes", "message"), [
    ({"schedule": "exponential"}, "never reaches 0"),
    ({"schedule": "two_slopes", "final_lr_ratio": 0.1}, "hold above 0"),
    ({"start_lr_ratio": 0.1}, "endpoints=inclusive"),
])  # fmt: skip
def test_schedules_that_contradict_themselves_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**changes)


def test_exclusive_endpoints_waste_no_step():
    config = OptimizerConfig(lr=1.0, warmup_steps=4)
    rates = [lr_at(config, step, 20) for step in range(20)]
    assert rates[0] == 0.25 and rates[3] == 1.0 and min(rates) > 0
    inclusive = OptimizerConfig(lr=1.0, warmup_steps=4, endpoints="inclusive", start_lr_ratio=0.5)
    assert lr_at(inclusive, 0, 20) == 0.5 and lr_at(inclusive, 4, 20) == 1.0 and lr_at(inclusive, 19, 20) == 0.0


CONTRADICTIONS = [
    ({"text_lock": {"unlocked_layers": 2}}, "enabled=true only"),
    ({"distill": {"weights": "x"}}, "set distill.model too"),
    ({"reconstruction_batch_size": 9}, "more than engine.micro_batch_size=8"),
    ({"trainable": "decoder"}, "needs init_from"),
    ({"trainable": "decoder", "init_from": "x"}, "set loss.contrastive=0"),
    ({"init_from": "x", "init_clip": "y"}, "set one of them"),
    ({"compile": True, "engine": {"zero_stage": 3}}, "use 1 or 2"),
    ({"loss": {"entropy": 0.1}, "model": {"quantizer": "residual", "code_dim": 64}}, "no entropy loss"),
    ({"model": {"distill_dim": 4}}, "set distill.model"),
    ({"text_lock": {"enabled": True}, "loss": {"contrastive": 0}}, "loss.contrastive=0 does not train"),
    ({"loss": {"adversarial": 0}}, "set discriminator.enabled=false too"),
    ({"discriminator": {"start_step": 5, "optimizer": {"start_step": 3}}}, "set the latter only"),
]


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    tower = {} if "null" in message else {"text_tower": TOWER}
    changes = changes | {"model": tower | changes.get("model", {})}
    with pytest.raises(ConfigError, match=message) as refused:
        check_settings(train_config(**changes))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("part", ["lpips", "dino", "distill"])
def test_missing_weights_of_others_say_where_to_get_them(part, tmp_path):
    from unitok.tokenizer.adversarial import build_discriminator
    from unitok.tokenizer.lpips import LPIPS

    with pytest.raises(UserError) as refused:
        if part == "lpips":
            LPIPS.from_file(None)
        elif part == "dino":
            build_discriminator(DiscriminatorConfig(kind="dino", dino_weights=str(tmp_path / "nowhere.pth")))
        else:
            Teacher(DistillConfig(model="test_vit"), 32)
    text = str(refused.value)
    switch = {"lpips": "loss.lpips=0", "dino": "discriminator.kind=patch", "distill": "distill.model=null"}[part]
    assert switch in text and "get" in text and "\n" not in text


# ---- distillation


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_any_timm_model_teaches(name):
    teacher = Teacher(DistillConfig(model=name, weights="random"), 64)
    features = teacher(random_pixels(2, 3, 64, 64))
    assert features.shape[:2] == (2, teacher.dim) and not features.requires_grad
    tokenizer = make_tokenizer(distill_dim=teacher.dim, num_query_tokens=1)
    out = tokenizer(random_pixels(2, 3, 32, 48))
    loss = distillation_loss(out.distilled, features, (2, 3), 1)
    assert 0 < float(loss) < 2
    reached = {name.split(".")[0] for name, g in gradients(loss, tokenizer).items() if g.abs().sum() > 0}
    assert {"encoder", "quant_proj", "post_quant_proj", "distill_head"} <= reached and "decoder" not in reached


def test_distillation_loss_by_hand():
    predicted = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 2.0]]])  # the first position is a query token
    teacher = torch.tensor([[[[3.0, 1.0]], [[0.0, 1.0]]]])  # two patches: (3, 0) and (1, 1)
    expected = 1 - (1.0 + 1 / 2**0.5) / 2
    assert distillation_loss(predicted, teacher, (1, 2), 1).item() == pytest.approx(expected)


def test_teacher_refusals():
    with pytest.raises(ConfigError, match="timm knows no such model"):
        Teacher(DistillConfig(model="vit_of_nowhere", weights="random"), 64)
    with pytest.raises(ConfigError, match="needs a multiple of its patch, 16"):
        Teacher(DistillConfig(model="test_vit", weights="random", size=70), 64)
    assert Teacher(DistillConfig(model="test_vit", weights="random", size=64), 32)(random_pixels(1, 3, 32, 32)).shape[
        2:
    ] == (4, 4)


# ---- what the discriminator sees


def test_balanced_consistency_by_hand():
    torch.manual_seed(0)
    engine = PlainEngine(Discriminator(PatchDiscriminator(8, 2)))
    real, fake = random_pixels(2, 3, 32, 32), random_pixels(2, 3, 32, 32, seed=1)
    config = DiscriminatorConfig(consistency=4.0, augment_probability=0.0)
    augmentation = Augmentation(config, seed=3, step=5, micro_index=0)
    loss, metrics = discriminator_losses(engine, real, fake, augmentation, config)
    plain = engine.module.network(torch.cat([real, fake]))
    strong = torch.cat([augmentation.strong_view(real, "strong real"), augmentation.strong_view(fake, "strong fake")])
    assert not torch.equal(strong[:2], real)
    consistency = (engine.module.network(strong) - plain).square().mean()
    torch.testing.assert_close(metrics["consistency"], consistency)
    torch.testing.assert_close(loss, metrics["discriminator"] + 4 * consistency)
    without, _ = discriminator_losses(engine, real, fake, augmentation, DiscriminatorConfig())
    torch.testing.assert_close(without, metrics["discriminator"])


def test_draws_belong_to_seed_step_and_purpose():
    config = DiscriminatorConfig(augment_probability=1.0)
    pixels = random_pixels(2, 3, 32, 32)
    base = Augmentation(config, 3, 5, 0).view(pixels, "real")
    assert torch.equal(base, Augmentation(config, 3, 5, 0).view(pixels, "real"))
    for other in (Augmentation(config, 4, 5, 0), Augmentation(config, 3, 6, 0), Augmentation(config, 3, 5, 1)):
        assert not torch.equal(base, other.view(pixels, "real"))
    assert not torch.equal(base, Augmentation(config, 3, 5, 0).view(pixels, "fake"))


def test_blur_fades_from_the_start_on():
    config = DiscriminatorConfig(start_step=10, blur_steps=4)
    assert [Augmentation(config, 0, step, 0).blur for step in (10, 11, 13, 14, 20)] == [1.0, 0.75, 0.25, 0.0, 0.0]
    pixels = random_pixels(1, 3, 32, 32)
    assert Augmentation(config, 0, 20, 0).view(pixels, "real") is pixels
    assert Augmentation(config, 0, 10, 0).view(pixels, "real").std() < 0.3 * pixels.std()


def test_codes_of_random_residuals_look_up_as_sums():
    quantizer = ResidualQuantizer(K, V, D)
    codes = random_codes(quantizer, 2, 3)
    expected = sum(quantizer.codebooks[k][codes[:, k]] for k in range(K))
    torch.testing.assert_close(quantizer.lookup(codes), expected)
