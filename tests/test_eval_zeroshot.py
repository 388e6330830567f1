"""Zero-shot classification, retrieval and the linear probe: by hand, as open_clip's own code, and as a command."""

import json

import pytest
import torch
from PIL import Image
from tiny import TEXTS, make_tokenizer, text_tower
from torch.nn import functional as F

from unitok.cli import main
from unitok.core.errors import CheckpointError, DataError, UserError
from unitok.data.sentencepieces import load_sentencepiece, train_sentencepiece
from unitok.data.source import open_source
from unitok.data.transforms import eval_transform
from unitok.eval.clip_models import ClipModel, open_open_clip, open_tokenizer
from unitok.eval.zeroshot import (
    classifier,
    classify,
    label_of,
    labelled_features,
    linear_probe,
    recalls,
    retrieve,
    source_classes,
    templates,
)

COLORS = {"blue_thing": (40, 80, 220), "green_thing": (40, 160, 60), "red_thing": (220, 40, 40)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Folder of a tokenizer with a text tower."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = train_sentencepiece(TEXTS, folder / "words.model", 60)
    tower = text_tower(vocab_size=load_sentencepiece(words).get_piece_size() + 2)
    model = make_tokenizer(text_tower=tower)
    model.set_text_model(words)
    model.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    """A tiny CLIP of random weights in open_clip's own layout."""
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    cut = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": cut}))
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Class folders in ImageNet's layout, three images each, with captions."""
    root = tmp_path_factory.mktemp("val")
    for label, color in COLORS.items():
        (root / label).mkdir()
        for number in range(3):
            shade = tuple(min(255, value + 12 * number) for value in color)
            Image.new("RGB", (40, 36), shade).save(root / label / f"{number}.png")
            (root / label / f"{number}.txt").write_text(f"a {label} number {number}")
    return root


class Mean(torch.nn.Module):
    """Features that can be counted by hand: the mean colour of an image; of a text the colour that it names."""

    def encode_image(self, pixels, normalize):
        return F.normalize(pixels.mean((2, 3)), dim=-1)

    def encode_text(self, ids, normalize):
        return F.normalize(ids.float(), dim=-1)


def by_color(texts):
    names = {label.split("_")[0]: color for label, color in COLORS.items()}
    return torch.tensor([next(c for name, c in names.items() if name in text) for text in texts]) / 127.5 - 1


@pytest.fixture
def mean_model():
    return ClipModel("mean", Mean(), lambda image: eval_transform(image, 8), by_color, "cpu", {})


def values(metrics):
    return {metric.name: metric.value for metric in metrics}


def test_classification_by_hand(mean_model, images):
    source = open_source(images)
    classes = source_classes(source)
    assert classes.names == ("blue thing", "green thing", "red thing")
    features, labels = labelled_features(mean_model, source, classes, batch_size=2)
    assert labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    weights = classifier(mean_model, classes.names, ["a {}", "the {}"])
    assert values(classify(features, labels, weights)) == {"top1": 1.0, "top5": 1.0}
    turned = classify(features, labels, weights[:, [1, 2, 0]])
    assert values(turned) == {"top1": 0.0, "top5": 1.0}


def test_a_classifier_that_says_nothing_scores_nothing():
    found = classify(torch.ones(4, 3), torch.tensor([0, 1, 2, 3]), torch.ones(3, 7))
    assert values(found) == {"top1": 0.0, "top5": 0.0}
    assert found[0].n == 4 and found[0].standard_error == 0


def test_recalls_by_hand():
    """Two images with two texts each. Image 0 finds its second text first; image 1 is beaten by a text of image 0."""
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.8, 0.0, 0.5, 0.7]])
    found = values(recalls(scores, torch.tensor([0, 0, 1, 1])))
    assert found["image_to_text_recall1"] == 0.5 and found["image_to_text_recall5"] == 1.0
    # text 0 prefers image 1; texts 1, 2 and 3 find their own
    assert found["text_to_image_recall1"] == 0.75


def test_the_probe_learns_what_features_tell(images, mean_model):
    source = open_source(images)
    features = labelled_features(mean_model, source, source_classes(source))
    assert values(linear_probe(features, features, c=1000.0)) == {"probe_top1": 1.0}
    silent = (torch.ones(9, 3), features[1])
    assert values(linear_probe(silent, silent)) == {"probe_top1": pytest.approx(1 / 3)}
    with pytest.raises(DataError, match="one class"):
        linear_probe((features[0], torch.zeros(9, dtype=torch.long)), features)


def test_open_clip_scores_as_its_own_code_does(open_clip_folder, images):
    import open_clip

    spec = f"local-dir:{open_clip_folder}"
    model, source = open_open_clip(spec, "cpu"), open_source(images)
    classes, forms = source_classes(source), templates("simple")
    features, labels = labelled_features(model, source, classes)
    found = classify(features, labels, classifier(model, classes.names, forms))
    network, _, preprocess = open_clip.create_model_and_transforms(spec)
    network.eval()
    tokenize = open_clip.get_tokenizer(spec)
    weights = open_clip.build_zero_shot_classifier(network, tokenize, classes.names, forms)
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(path)) for path in source.files])
        theirs = network.encode_image(pixels, normalize=True)
    torch.testing.assert_close(features, theirs)
    torch.testing.assert_close(classifier(model, classes.names, forms), weights.detach())
    best = (theirs @ weights).argmax(1)
    right = [classes.labels[int(one)] == path.parent.name for one, path in zip(best, source.files, strict=True)]
    assert values(found)["top1"] == pytest.approx(sum(right) / 9)


def test_unitok_is_asked_with_its_own_features(tokenizer, images):
    model, source = open_tokenizer(str(tokenizer), "cpu"), open_source(images)
    features, _ = labelled_features(model, source, source_classes(source), limit=2)
    pixels = torch.stack([eval_transform(source[index].image, 32, "clip_val") for index in range(2)])
    with torch.no_grad():
        torch.testing.assert_close(features, model.network.encode_image(pixels))
    names = [metric.name for metric in retrieve(model, source)]
    assert names[0] == "image_to_text_recall1" and len(names) == 6


def test_one_command_measures_several_models(tokenizer, open_clip_folder, images, tmp_path, capsys):
    systems = ["--tokenizer", str(tokenizer), "--open-clip", f"local-dir:{open_clip_folder}"]
    more = ["--source", str(images), "--probe-train", str(images), "--retrieval", "--templates", "simple"]
    assert main(["eval", "zeroshot", *systems, *more, "--out", str(tmp_path / "out.json"), "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    assert "probe_top1" in shown and "text_to_image_recall10" in shown
    runs = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("out-*.json"))]
    assert len(runs) == 2 and all(run["benchmark"] == "zeroshot" and run["seeds"] == [3] for run in runs)
    assert {run["protocol"]["num_templates"] for run in runs} == {7}
    assert [run["checkpoint"] is None for run in runs].count(True) == 1  # open_clip's weights are named by its spec


def test_the_shapes_world_has_classes():
    source = open_source("shapes:val?num=40&size=32")
    classes = source_classes(source)
    assert len(classes.names) == 27
    labels = [label_of(source[index], classes.labels) for index in range(40)]
    assert None in labels
    for index, label in enumerate(labels):
        objects = source.scene(index).objects
        assert (label is None) == (len(objects) > 1)
        if label is not None:
            assert classes.names[label] == f"{objects[0].color} {objects[0].kind}"


def test_class_names_from_files(images, tmp_path):
    source = open_source(images)
    (tmp_path / "names.txt").write_text("sky\ngrass\nrose\n")
    assert source_classes(source, str(tmp_path / "names.txt")).names == ("sky", "grass", "rose")
    (tmp_path / "names.json").write_text(json.dumps({"red_thing": "rose", "blue_thing": "sky", "green_thing": "grass"}))
    assert source_classes(source, str(tmp_path / "names.json")).names == ("sky", "grass", "rose")
    (tmp_path / "few.txt").write_text("sky\n")
    (tmp_path / "few.json").write_text('{"sky": "sky"}')
    for name, words in (
        ("few.txt", "1 class names"),
        ("few.json", "no name for class 'blue_thing'"),
        ("none.txt", "cannot be read"),
    ):
        with pytest.raises(DataError, match=words):
            source_classes(source, str(tmp_path / name))
    with pytest.raises(DataError, match="1000 class names, but .* has 3 classes"):
        source_classes(source, "imagenet")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("ViT-B-33=x.pt", "no model 'ViT-B-33'"),
        ("ViT-B-32", "without weights"),
        ("ViT-L-14=openai", "ViT-L-14-quickgelu=openai"),
        ("local-dir:nowhere", "no such folder"),
        ("RN50=nowhere.pt", "cannot be loaded"),
    ],
)
def test_open_clip_models_that_cannot_be_used(spec, words):
    with pytest.raises((UserError, CheckpointError), match=words):
        open_open_clip(spec, "cpu")


def test_what_the_command_refuses(tokenizer, images, tmp_path, capsys):
    (tmp_path / "bad.txt").write_text("a photo\n")
    make_tokenizer().save_pretrained(tmp_path / "mute")
    here = ["--source", str(images)]
    for arguments, words in (
        (["--tokenizer", str(tmp_path / "mute"), *here], "no text tower"),
        (["--tokenizer", str(tokenizer), *here, "--templates", "nine"], "--templates nine"),
        (["--tokenizer", str(tokenizer), *here, "--templates", str(tmp_path / "bad.txt")], "must hold {}"),
        (["--tokenizer", str(tokenizer), *here, "--probe-c", "-1"], "--probe-c -1.0"),
    ):
        assert main(["eval", "zeroshot", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_dry_run_lists_what_is_missing(capsys):
    arguments = ["--tokenizer", "nowhere", "--source", "imagenet/val", "--open-clip", "ViT-B-32=none.pt", "--dry-run"]
    assert main(["eval", "zeroshot", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "missing: nowhere" in shown and "missing: imagenet/val" in shown and "none.pt" in shown
