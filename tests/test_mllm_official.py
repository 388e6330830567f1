"""The unified model against numbers recorded from the released code; sizes come from the recordings themselves."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from reference import fixture, numbers, relative, same_codes, tensors
from torch import nn

from unitok.mllm import UniTokMLLM, UniTokMLLMConfig
from unitok.mllm.configuration import IGNORE
from unitok.mllm.official import RELEASED_LAYOUT, official_config, official_places
from unitok.mllm.sampler import filter_logits
from unitok.tokenizer import UniTok

MODELS = ("tiny", "official_codebooks")
FEATURES, SCALARS = 1e-4, 1e-5
Z_WEIGHT = 5e-5
PLACEHOLDER = RELEASED_LAYOUT["image_token_id"]


@pytest.fixture(scope="module", params=MODELS)
def recorded(request):
    name = f"mllm/{request.param}"
    return UniTokMLLM.from_official(fixture(name)), tensors(f"{name}/io.safetensors"), name


def expanded(ids, length):
    """Every placeholder of a row repeated for all positions of its image."""
    return [x for index in ids for x in ([index] * length if index == PLACEHOLDER else [index])]


# ---- modules


@torch.no_grad()
def test_embedder(recorded):
    model, io, _ = recorded
    codes = io["embed.indices"]
    vectors = model.embedder.code_vectors(codes)
    assert relative(vectors, io["embed.code_features"]) < FEATURES
    assert relative(model.embedder.projection(vectors), io["embed.attn_projection"]) < FEATURES
    assert relative(model.embed_codes(codes), io["embed.output"]) < FEATURES
    alone = model.embed_codes(codes[:, :, -1:])
    assert relative(alone, io["embed.output_last_token_alone(as in cached generation)"]) < FEATURES
    assert relative(alone, io["embed.output"][:, -1:]) > 0.1, "the two ways to embed the newest position differ"


@torch.no_grad()
def test_embedder_of_the_released_size():
    """Weights by the recorded recipe, checked by their recorded sums."""
    recipe, io = numbers("mllm/embedder_official_size.json"), tensors("mllm/embedder_official_size_io.safetensors")
    shapes = {name: entry["shape"] for name, entry in recipe["params"].items()}
    books = [shape for name, shape in shapes.items() if name.startswith("quantizer.")]
    width = shapes["attn_projection.proj.weight"]
    config = UniTokMLLMConfig(
        text_config={"hidden_size": recipe["hidden_size"], "num_hidden_layers": 1, "vocab_size": 8},
        num_codebooks=len(books),
        codebook_size=books[0][0],
        code_dim=books[0][1],
        visual_width=width[0],
        visual_num_heads=width[0] // width[1],
        depth_num_layers=1,
        code_usage=True,
    )
    with torch.device("meta"):
        places = official_places(UniTokMLLM(config))
    embedder = UniTokMLLM(config).embedder
    own = {f"embedder.{name}": tensor for name, tensor in embedder.state_dict().items()}
    for index, (name, entry) in enumerate(sorted(recipe["params"].items())):
        tensor = torch.randn(entry["shape"], generator=torch.Generator().manual_seed(recipe["base"] + 10 + index))
        is_norm = "norm" in name or name == "mm_projector.0.weight"
        if name.startswith("quantizer."):
            pass
        elif tensor.dim() == 2:
            tensor /= math.sqrt(tensor.shape[1])
        else:
            tensor = 0.1 * tensor + (1 if is_norm and name.endswith("weight") else 0)
        assert float(tensor.double().sum()) == pytest.approx(entry["sum"], rel=1e-5, abs=1e-3), name
        (place,) = places[f"model.multi_embedder.{name}"]
        place.of(own[place.name]).copy_(tensor)
    vectors = embedder.code_vectors(io["indices"])
    assert relative(vectors, io["code_features"]) < FEATURES
    assert relative(embedder.projection(vectors), io["attn_projection"]) < FEATURES
    assert relative(embedder(io["indices"]), io["output"]) < FEATURES
    assert relative(embedder(io["indices"][:, :, -1:]), io["output_last_only"]) < FEATURES


@torch.no_grad()
def test_embedder_made_from_a_tokenizer():
    """Codebooks and the projection out of the code space are the tokenizer's, but causal."""
    io = tensors("mllm/embedder_from_tokenizer.safetensors")
    source = fixture("tokenizer_small")
    tokenizer = UniTok.from_official(source / "model.safetensors")
    sizes, hidden = tokenizer.config, io["output"].shape[2]
    config = UniTokMLLMConfig(
        text_config={"hidden_size": hidden, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 8},
        num_codebooks=sizes.num_codebooks,
        codebook_size=sizes.codebook_size,
        code_dim=sizes.code_dim,
        visual_width=sizes.width,
        visual_num_heads=sizes.width // sizes.code_width,
        depth_num_layers=1,
    )
    model = UniTokMLLM(config)
    model.attach_tokenizer(tokenizer)
    model.embedder.mlp.load_state_dict(
        {name.removeprefix("mm_projector."): tensor for name, tensor in io.items() if name.startswith("mm_projector.")}
    )
    vectors = model.embedder.code_vectors(io["indices"])
    assert relative(vectors, io["code_features"]) < FEATURES
    assert relative(model.embedder.projection(vectors), io["attn_projection_causal"]) < FEATURES
    assert relative(model.embed_codes(io["indices"]), io["output"]) < FEATURES
    assert relative(model.embed_codes(io["indices"][:, :, -1:]), io["output_last_only"]) < FEATURES


@torch.no_grad()
def test_backbone_and_text_head(recorded):
    model, io, _ = recorded
    out = model(input_ids=io["lm.input_ids"])
    assert relative(out.logits, io["lm.logits"]) < FEATURES
    hidden = model.backbone(input_ids=io["lm.input_ids"]).last_hidden_state
    assert relative(hidden, io["lm.hidden"]) < FEATURES


@torch.no_grad()
def test_depth_transformer(recorded):
    """From the recorded input vectors of all sub-codes, put into tables of their own; the first is a hidden state."""
    model, io, _ = recorded
    inputs, depth = io["arhead.inputs"], copy.deepcopy(model.depth)
    for k in range(len(depth.code_embeddings)):
        depth.code_embeddings[k] = nn.Embedding.from_pretrained(inputs[:, k + 1])
    rows = torch.arange(len(inputs))[:, None].expand(-1, inputs.shape[1])
    assert relative(depth.features(inputs[:, 0], rows), io["arhead.hidden"]) < FEATURES
    assert relative(depth(inputs[:, 0], rows), io["arhead.logits"]) < FEATURES


def test_initial_weights_are_drawn_as_recorded():
    """Mean and spread of every parameter but the codebooks."""
    stats = numbers("mllm/init_stats.json")
    model = UniTokMLLM(_untrained_config())
    own, places = model.state_dict(), official_places(model)
    for name, entry in stats["params"].items():
        if "quantizer" in name:
            continue  # always the tokenizer's
        (place,) = places[name]
        tensor = place.of(own[place.name])
        assert list(tensor.shape) == entry["shape"], name
        spread = 5 * stats["initializer_range"] / math.sqrt(tensor.numel())
        assert float(tensor.mean()) == pytest.approx(entry["mean"], abs=spread), name
        assert float(tensor.std()) == pytest.approx(entry["std"], rel=0.1, abs=1e-6), name


def _untrained_config():
    """Of the sizes that the recorded parameters have."""
    shapes = {name: entry["shape"] for name, entry in numbers("mllm/init_stats.json")["params"].items()}
    vocab, hidden = shapes["model.embed_tokens.weight"]
    count = {part: len({name.split(".")[2] for name in shapes if name.startswith(part)}) for part in
             ("model.layers.", "ar_head.layers.", "ar_head.codebooks.")}  # fmt: skip
    return UniTokMLLMConfig(
        text_config={
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": shapes["model.layers.0.mlp.gate_proj.weight"][0],
            "num_hidden_layers": count["model.layers."],
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
        num_codebooks=count["ar_head.codebooks."] + 1,
        codebook_size=shapes["ar_head.codebooks.0.weight"][0],
        code_dim=4,
        visual_width=96,
        visual_num_heads=3,
        depth_num_layers=count["ar_head.layers."],
    )


def test_released_names_and_shapes_of_the_full_size(tmp_path):
    """Llama-2-7B on the meta device: every recorded key has its place, with its shape, and there is none beside."""
    recorded = numbers("official_keys/mllm_llama2_7b.json")
    vocab, hidden = recorded["model.embed_tokens.weight"][0]
    settings = {
        "model_type": "mini_gemini",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": recorded["model.layers.0.mlp.gate_proj.weight"][0][0],
        "num_hidden_layers": 1 + max(int(n.split(".")[2]) for n in recorded if n.startswith("model.layers.")),
        "num_attention_heads": 32,
        "mm_vision_tower": "something that only its training code reads",
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = official_config(tmp_path)
    with torch.device("meta"):
        model = UniTokMLLM(config)
    own = model.state_dict()
    shapes = {name: list(place.of(own[place.name]).shape) for name, (place,) in official_places(model).items()}
    zeros = "model.multi_embedder.attn_projection.attn.zero_k_bias"
    assert shapes | {zeros: [config.visual_width]} == {name: shape for name, (shape, _) in recorded.items()}
    assert (config.num_image_positions, config.visual_num_heads, config.embedder_cache) == (256, 16, "released")


# ---- losses


def batch_of(io, name):
    """The recorded ids and labels with images expanded, and the codes of the rows that have an image."""
    images = io[f"batch.{name}.images(-1 = no image)"]
    length, rows = images.shape[2], zip(io[f"batch.{name}.input_ids"], io[f"batch.{name}.labels"], strict=True)
    ids, labels = [], []
    for row, row_labels in rows:
        ids.append(expanded(row.tolist(), length))
        flat = [
            [IGNORE] * length if i == PLACEHOLDER else [x]
            for i, x in zip(row.tolist(), row_labels.tolist(), strict=True)
        ]
        labels.append([x for part in flat for x in part])
    longest = max(map(len, ids))
    mask = torch.tensor([[int(i != 0) for i in row] + [0] * (longest - len(row)) for row in ids])
    has_image = (images >= 0).flatten(1).all(1)
    return {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in ids]),
        "attention_mask": mask,
        "labels": torch.tensor([row + [IGNORE] * (longest - len(row)) for row in labels]),
        "codes": images[has_image],
        "learn_image": (io[f"batch.{name}.data_types"] == 1)[has_image],
    }


def recorded_loss(model, batch):
    """The combined loss and its parts by their formulas: mean cross-entropies and the penalty on large logits."""
    hidden = model.backbone(
        inputs_embeds=model.embed(batch["input_ids"], batch["codes"]), attention_mask=batch["attention_mask"]
    ).last_hidden_state
    logits, targets = model.lm_head(hidden[:, :-1]), batch["labels"][:, 1:]
    parts = {"text_ce": F.cross_entropy(logits[targets != IGNORE], targets[targets != IGNORE])}
    num_text = int((targets != IGNORE).sum())
    is_image = batch["input_ids"] == PLACEHOLDER
    owner = torch.cumsum(is_image.any(1).long(), 0) - 1
    drawn = is_image & batch["learn_image"][owner.clamp(min=0)][:, None]
    num_image = int(drawn.sum()) * model.config.num_codebooks
    if num_image:
        codes = batch["codes"][batch["learn_image"]].transpose(1, 2).flatten(0, 1)
        image_logits = model.depth(hidden[:, :-1][drawn[:, 1:]], codes)
        parts["image_ce"] = F.cross_entropy(image_logits.flatten(0, 1), codes.flatten())
        parts["image_z_loss"] = Z_WEIGHT * image_logits.amax(-1).square().mean()
        parts["image_loss"] = parts["image_ce"] + parts["image_z_loss"]
        parts["loss"] = (num_image * parts["image_loss"] + num_text * parts["text_ce"]) / (num_image + num_text)
    else:
        parts["loss"] = parts["text_ce"]
    return parts, {"num_text_tokens": num_text, "num_image_tokens": num_image}, hidden


@pytest.mark.parametrize("name", ["t2i", "i2t", "mixed", "sft"])
def test_losses_and_gradients(recorded, name):
    """The recorded ids through the formulas and through `losses`, whose gradients have the recorded norms."""
    model, io, folder = recorded
    result, batch = numbers(f"{folder}/train_batches.json")["results"][name], batch_of(io, name)
    books = model.embedder.codebooks.requires_grad_()  # trained by the released code, a fixed buffer here
    parts, counts, hidden = recorded_loss(model, batch)
    real = batch["attention_mask"].bool()
    assert (
        relative(hidden[real], io[f"batch.{name}.hidden"][io[f"batch.{name}.expanded_attention_mask"].bool()])
        < FEATURES
    )
    for part, value in parts.items():
        assert value.item() == pytest.approx(result[part], rel=SCALARS), part
    for count, value in counts.items():
        assert value == result.get(count, 0), count
    sums = model.losses(**batch)
    assert (sums.text / sums.num_text).item() == pytest.approx(result["text_ce"], rel=SCALARS)
    if counts["num_image_tokens"]:
        assert (sums.image / sums.num_image).item() == pytest.approx(result["image_ce"], rel=SCALARS)
        assert int(sums.num_image) == result["num_image_tokens"]
        assert (Z_WEIGHT * sums.image_z / sums.num_image).item() == pytest.approx(result["image_z_loss"], rel=SCALARS)
    loss = (sums.text + sums.image + Z_WEIGHT * sums.image_z) / (sums.num_text + sums.num_image)
    assert loss.item() == pytest.approx(result["loss"], rel=SCALARS)
    own = dict(model.named_parameters()) | {"embedder.codebooks": books}
    found = dict(zip(own, torch.autograd.grad(loss, list(own.values()), allow_unused=True), strict=True))
    books.requires_grad_(False)
    for key, (place,) in official_places(model).items():
        if place.name in found:
            gradient = found[place.name]
            norm = 0.0 if gradient is None else float(place.of(gradient).norm())
            # a sum over thousands of terms, in another order: its smallest results carry the largest error
            assert norm == pytest.approx(result["grad_norms"][key] or 0.0, rel=FEATURES, abs=1e-7), key


# ---- generation


@pytest.mark.parametrize("scale", [1, 5])
@pytest.mark.parametrize("cache", ["released", "consistent"])
@torch.no_grad()
def test_greedy_codes(recorded, scale, cache, monkeypatch):
    model, io, _ = recorded
    name = f"t2i.cfg{scale}"
    variant = name if cache == "released" else f"{name}.nocache_whole_prefix_embedding"
    codes, margin = io[f"{variant}.indices"], io[f"{variant}.margin"]
    ids, mask = io[f"{name}.input_ids"], io[f"{name}.attention_mask"]
    settings = {"do_sample": False, "num_positions": codes.shape[2], "embedder_cache": cache}
    ours = model.generate_codes(ids, mask, guidance_scale=float(scale), **settings)
    assert same_codes(ours, codes, margin)
    if scale == 1:  # a prompt's image does not depend on its neighbours: without padding the same codes
        start = int(mask[1].argmax())
        alone = model.generate_codes(ids[1:, start:], mask[1:, start:], **settings)
        assert same_codes(alone, codes[1:], margin[1:])


@pytest.mark.parametrize("scale", [1, 5])
@torch.no_grad()
def test_logits_along_the_way(recorded, scale):
    """Of every code, with guidance applied, from the recorded codes before it (the released cache)."""
    model, io, _ = recorded
    name = f"t2i.cfg{scale}"
    codes, ids, mask = io[f"{name}.indices"], io[f"{name}.input_ids"], io[f"{name}.attention_mask"]
    length, copies = codes.shape[2], ids.shape[0] // codes.shape[0]
    rows = codes.repeat(copies, 1, 1)
    vectors = torch.cat([model.embed_codes(rows[:, :, i : i + 1]) for i in range(length)], dim=1)
    inputs = torch.cat([model.embed(ids, None), vectors], dim=1)
    full = torch.cat([mask, mask.new_ones(len(mask), length)], dim=1)
    positions = (full.cumsum(1) - 1).clamp(min=0)
    hidden = model.backbone(inputs_embeds=inputs, attention_mask=full, position_ids=positions).last_hidden_state
    before = hidden[:, -length - 1 : -1]
    assert relative(before[:, :1], io[f"{name}.first_hidden"]) < FEATURES
    logits = model.depth(before.flatten(0, 1), rows.transpose(1, 2).flatten(0, 1))
    logits = logits.view(len(ids), length, *logits.shape[1:]).transpose(1, 2)
    if scale > 1:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + scale * (conditional - unconditional)
    assert same_codes(logits.argmax(-1), codes, io[f"{name}.margin"])
    kept = {"": length, "(first 2 positions)": 2}
    found = {io[f"{name}.logits{note}"]: count for note, count in kept.items() if f"{name}.logits{note}" in io}
    assert found
    for part, count in found.items():
        assert relative(logits[:, :, :count], part) < FEATURES


@torch.no_grad()
def test_greedy_answer(recorded):
    """Through transformers' `generate`: byte tokens, two of which the release borrows as image marks, may be said."""
    model, io, _ = recorded
    codes, recorded_ids = io["vqa.image_codes"][0], io["vqa.answer_ids"]
    ids = torch.tensor([expanded(row, codes.shape[2]) for row in io["vqa.input_ids"].tolist()])
    assert relative(model.embed(ids, codes), io["vqa.inputs_embeds"]) < FEATURES
    settings = {"attention_mask": torch.ones_like(ids), "codes": codes, "do_sample": False}
    first = model(input_ids=ids, codes=codes, logits_to_keep=1).logits[:, -1]
    assert relative(first, io["vqa.first_logits"]) < FEATURES
    answer = model.generate(input_ids=ids, max_new_tokens=recorded_ids.shape[1], **settings)
    assert torch.equal(answer[:, ids.shape[1] :], recorded_ids)
    head, model.lm_head = model.lm_head, copy.deepcopy(model.lm_head)
    best, mark = recorded_ids[0, 0], model.config.begin_image_id
    assert first[0, best] > 0
    model.lm_head.weight[mark] = 2 * head.weight[best]
    said = model.generate(input_ids=ids, max_new_tokens=1, **settings)[0, -1]
    model.lm_head = head
    assert said == mark


@pytest.mark.parametrize(
    ("name", "temperature", "top_k", "top_p"),
    # the last one's settings are not written down; these are among those that keep its entries
    [("default", 0.9, 2048, 0.96), ("script", 1.0, 0, 1.0), ("tight", 0.7, 50, 0.5)],
)
def test_sampling_filter(name, temperature, top_k, top_p):
    io = tensors("mllm/tiny/io.safetensors")
    logits = io["sampling.logits(last position is used)"][:, -1]
    probabilities = filter_logits(logits, temperature, top_k, top_p).softmax(-1)
    assert torch.equal(probabilities > 0, io[f"sampling.{name}.probs"] > 0)
    assert relative(probabilities, io[f"sampling.{name}.probs"]) < FEATURES
