"""Export folders: what they hold, who can read them, and what can be wrong with one."""

import json
import shutil

import pytest
import torch
from PIL import Image
from pipelines import make_pipeline, picture
from tiny import make_tokenizer
from transformers import AutoModel, AutoModelForMultimodalLM, AutoProcessor

from unitok.core.errors import CheckpointError, UserError
from unitok.mllm.pipeline import UniTokPipeline
from unitok.mllm.processor import UniTokProcessor


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def export(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(export):
    return UniTokPipeline.from_pretrained(export, device="cpu")


@pytest.fixture
def copy(export, tmp_path):
    """An export folder of one's own, to be damaged."""
    return shutil.copytree(export, tmp_path / "copy")


def test_ids_of_a_padded_vocabulary_are_no_text(pipe):
    tokenizer = pipe.processor.tokenizer
    known = tokenizer.encode("a red circle", add_special_tokens=False)
    assert tokenizer.decode([*known, len(tokenizer) + 7], skip_special_tokens=True) == "a red circle"


def test_an_export_without_its_text_model_or_processor(copy):
    (copy / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer.model"):
        UniTokPipeline.from_pretrained(copy)
    (copy / "processor_config.json").unlink()
    with pytest.raises(UserError, match="converted with its tokenizer.model"):
        UniTokPipeline.from_pretrained(copy)


def test_the_auto_classes_of_transformers_know_an_export(export, pipe):
    processor, model = AutoProcessor.from_pretrained(export), AutoModelForMultimodalLM.from_pretrained(export)
    assert type(processor) is UniTokProcessor and type(model) is type(pipe.model)
    ours, theirs = model.state_dict(), pipe.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    image = Image.new("RGB", (40, 40), "red")
    batches = [one("<image>\nwhat is this?", [image]) for one in (processor, pipe.processor)]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in ("input_ids", "attention_mask", "pixels"))
    assert type(AutoModel.from_pretrained(export)) is type(model)


def test_the_processor_alone_goes_round(export, tmp_path):
    AutoProcessor.from_pretrained(export).save_pretrained(tmp_path / "processor")
    again, first = (AutoProcessor.from_pretrained(folder) for folder in (tmp_path / "processor", export))
    assert type(again) is UniTokProcessor and again.config.to_dict() == first.config.to_dict()
    batches = [one("<image>\nwhat is this?", [picture()]) for one in (again, first)]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[1])


def test_fewer_bits_are_not_saved(export, tmp_path):
    pipe = UniTokPipeline.from_pretrained(export, device="cpu", weights="int8")
    with pytest.raises(UserError, match="int8 weights, which cannot be saved"):
        pipe.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_an_export_holds_everything_and_no_more(export):
    names = {path.name for path in export.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "processor_config.json"} <= names
    assert {"tokenizer.model", "tokenizer_config.json", "visual_tokenizer"} <= names
    assert (export / "visual_tokenizer" / "model.safetensors").is_file()
    from safetensors import safe_open

    with safe_open(export / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if name.startswith(("encoder", "decoder", "visual"))]  # noqa: SIM118


def test_the_visual_tokenizer_is_loaded_when_needed_and_frozen(export):
    pipe = UniTokPipeline.from_pretrained(str(export), device="cpu")
    assert pipe._tokenizer is None
    pipe.chat([{"role": "user", "content": "red"}], max_new_tokens=1)
    assert pipe._tokenizer is None, "no image, no tokenizer"
    pipe.generate_images("red")
    assert not any(parameter.requires_grad for parameter in pipe.tokenizer.parameters())
    assert not pipe.tokenizer.training and not pipe.model.training


def test_folders_that_are_no_export(tmp_path, export, copy):
    refused = [
        (tmp_path / "nowhere", "no such"),
        (tmp_path, "config.json"),
        (export / "visual_tokenizer", "unitok_mllm"),
    ]
    for folder, message in refused:
        with pytest.raises(UserError, match=message) as error:
            UniTokPipeline.from_pretrained(folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
    shutil.rmtree(copy / "visual_tokenizer")
    with pytest.raises(UserError, match="visual_tokenizer"):
        UniTokPipeline.from_pretrained(copy)


@pytest.mark.parametrize("part", [".", "visual_tokenizer"])
def test_a_truncated_weights_file_is_refused(copy, part):
    weights = copy / part / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=part if part != "." else "copy") as error:
        UniTokPipeline.from_pretrained(copy, device="cpu").tokenizer  # noqa: B018
    assert "\n" not in str(error.value)


def test_shards_that_are_not_what_their_index_says_are_refused(export, tmp_path):
    from safetensors.torch import load_file, save_file

    model = UniTokPipeline.from_pretrained(export, device="cpu").model
    for number, message in enumerate(("holds", "missing", "weight_map")):
        folder = shutil.copytree(export, tmp_path / str(number))
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="40KB")
        if number == 0:
            assert UniTokPipeline.from_pretrained(folder, device="cpu").model is not None
        shards, index = sorted(folder.glob("model-*.safetensors")), folder / "model.safetensors.index.json"
        if message == "holds":  # a key that the index gives to another shard
            own, key = load_file(shards[1]), next(iter(load_file(shards[0])))
            save_file(own | {key: torch.zeros_like(load_file(shards[0])[key])}, shards[1], metadata={"format": "pt"})
        elif message == "missing":
            shards[1].unlink()
        else:
            index.write_text(json.dumps({"weight_map": {}}))
        with pytest.raises(CheckpointError) as error:
            UniTokPipeline.from_pretrained(folder, device="cpu")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (5, "image_sampler is 5; expected an object of"),
        ({"top_q": 5}, "image_sampler is .*expected an object of"),
        ({"temperature": "0.9"}, "image_sampler: temperature='0.9': expected one number"),
        ({"top_p": [0.9]}, r"image_sampler: top_p=\[0.9\]: expected one number"),
        ({"temperature": 0}, "image_sampler: temperature=0: must be positive"),
        ({"depth_temperature": -1.0}, "image_sampler: depth_temperature=-1.0"),
        ({"guidance_scale": -3}, "image_sampler: guidance_scale=-3"),
        ({"top_k": 1.5}, "image_sampler: top_k=1.5"),
    ],
)
def test_a_damaged_sampler_is_refused(copy, settings, message):
    file = copy / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_sampler": settings}))
    with pytest.raises(CheckpointError, match=message) as error:
        UniTokPipeline.from_pretrained(copy, device="cpu")
    assert "generation_config.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, True, "32", None, 48])
def test_another_size_of_pictures_is_refused(copy, size):
    file = copy / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_size": size}))
    with pytest.raises(UserError, match="image_size") as error:
        _ = UniTokPipeline.from_pretrained(copy, device="cpu").tokenizer
    assert "processor_config.json" in str(error.value)


def test_settings_of_the_sampler_that_are_null_are_the_neutral_ones(copy):
    names = ("guidance_scale", "do_sample", "temperature", "depth_temperature", "top_k", "top_p")
    file = copy / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_sampler": dict.fromkeys(names)}))
    pipe = UniTokPipeline.from_pretrained(copy, device="cpu")
    neutral = {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "depth_temperature": None}
    assert pipe.image_sampler == neutral
    assert pipe.generate_images("a red circle")


def test_generate_goes_on_from_vectors(pipe):
    ids = torch.tensor([[1, 20, 21, 22]])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        vectors = pipe.model.embed(ids, None)
        by_vectors = pipe.model.generate(inputs_embeds=vectors, attention_mask=torch.ones_like(ids), **options)
        by_ids = pipe.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(by_vectors, by_ids[:, 4:])


def test_missing_weights_are_refused_by_name(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    weights.pop("depth.norm.weight")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"depth\.norm\.weight"):
        UniTokPipeline.from_pretrained(copy, device="cpu")


def test_weights_of_another_size_are_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"visual_mlp_ratio": 3.0}))
    with pytest.raises(CheckpointError) as error:
        UniTokPipeline.from_pretrained(copy, device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"num_codebooks": 2}, "num_codebooks"),
        ({"codebook_size": 20}, "codebook_size"),
        ({"image_size": 64}, "positions"),
    ],
)
def test_a_tokenizer_whose_codes_mean_something_else_is_refused(copy, changes, name):
    make_tokenizer(**changes).save_pretrained(copy / "visual_tokenizer")
    pipe = UniTokPipeline.from_pretrained(copy, device="cpu")
    with pytest.raises(UserError, match=name):
        pipe.generate_images("red")


def test_a_tokenizer_with_other_codebooks_is_refused(copy):
    """Same sizes, other entries: every picture and every answer would be nonsense without a word."""
    make_tokenizer(seed=5).save_pretrained(copy / "visual_tokenizer")
    with pytest.raises(UserError, match="codebooks"):
        UniTokPipeline.from_pretrained(copy, device="cpu").generate_images("red")
