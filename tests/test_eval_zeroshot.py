"""Zero-shot classification and the linear probe: by hand, against open_clip's own classifier, and as a command."""

import json

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from unitok.cli import main
from unitok.core.errors import DataError, UserError
from unitok.data.source import open_source
from unitok.eval.image_text import open_image_text
from unitok.eval.zeroshot import (
    accuracies,
    class_folders,
    classifier,
    image_features,
    imagenet_names,
    linear_probe,
    load_names,
    load_templates,
)

COLORS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220)}


class ByColour:
    """Images embed as their mean colour, texts as that of the colour they name."""

    settings = {}

    def images(self, images):
        return F.normalize(torch.stack([torch.tensor(image.getpixel((1, 1))).float() for image in images]), dim=-1)

    def texts(self, texts):
        colours = [next(value for name, value in COLORS.items() if name in text) for text in texts]
        return F.normalize(torch.tensor(colours).float(), dim=-1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("classes")
    for split in ("train", "val"):
        for name, colour in COLORS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(3):
                shade = tuple(min(255, value + 7 * number) for value in colour)
                Image.new("RGB", (16, 16), shade).save(root / split / name / f"{number}.JPEG", quality=95)
    return root


def test_classes_are_told_apart_and_swapped_names_are_not(folder):
    source = open_source(folder / "val")
    folders = class_folders(source)
    assert folders == ["blue", "green", "red"]
    features, labels = image_features(ByColour(), source, folders, None, 4)
    weights = classifier(ByColour(), load_names(folders, None), load_templates("simple"))
    assert accuracies(features @ weights.T, labels)["top1"] == 1
    swapped = classifier(ByColour(), ["red", "blue", "green"], load_templates("simple"))
    assert accuracies(features @ swapped.T, labels)["top1"] == 0
    assert linear_probe((features, labels), (features, labels), 100.0, 0) == 1


def test_a_limit_takes_from_every_class(folder):
    source = open_source(folder / "val")
    _, labels = image_features(ByColour(), source, class_folders(source), 3, 2)
    assert sorted(labels.tolist()) == [0, 1, 2]


def test_accuracies_by_hand():
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0, 0.0, -1.0, -2.0], [0.0, 9.0, 1.0, 0.0, 0.0, 0.0, -5.0]])
    found = accuracies(scores, torch.tensor([0, 6]))
    assert found["top1"] == 0.5 and found["top5"] == 0.5 and found["top1_se"] == pytest.approx((0.25 / 2) ** 0.5)
    assert accuracies(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]))["top1"] == 0  # ties are no knowledge


def test_names_and_templates(tmp_path):
    assert len(imagenet_names()) == 1000 and len(load_templates("imagenet")) == 80
    wordnet = [f"n{number:08d}" for number in range(1000)]
    assert load_names(wordnet, None)[0] == "tench" and load_names(["sea_lion", "ape"], None)[0] == "sea lion"
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    assert load_names(["a", "b"], str(tmp_path / "two.txt")) == ["one", "two"]
    with pytest.raises(UserError, match="holds 2 names, the data 3"):
        load_names(["a", "b", "c"], str(tmp_path / "two.txt"))
    with pytest.raises(UserError, match="no place for the class"):
        load_templates(str(tmp_path / "two.txt"))
    (tmp_path / "prompts.txt").write_text("a {} here\n")
    assert load_templates(str(tmp_path / "prompts.txt"))[0]("cat") == "a cat here"
    with pytest.raises(UserError, match="cannot be read"):
        load_templates(str(tmp_path / "none.txt"))


def test_images_without_class_folders_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    with pytest.raises(DataError, match="named by class"):
        class_folders(open_source(tmp_path))


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    """A small model of open_clip with random weights, as a file."""
    import open_clip

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip") / "weights.pt"
    torch.save(open_clip.create_model("ViT-S-32-alt").state_dict(), path)
    return path


def test_the_classifier_is_that_of_open_clip(clip_file):
    import open_clip

    model = open_image_text(f"open_clip:ViT-S-32-alt:{clip_file}")
    names, templates = ["tench", "cat"], load_templates("simple")
    theirs = open_clip.build_zero_shot_classifier(
        model.model, open_clip.get_tokenizer("ViT-S-32-alt"), names, open_clip.SIMPLE_IMAGENET_TEMPLATES
    )
    torch.testing.assert_close(classifier(model, names, templates), theirs.T, rtol=1e-4, atol=1e-5)


def test_the_command_beside_a_model_of_open_clip(folder, clip_file, tmp_path, capsys):
    import tiny

    out, clip = tmp_path / "out.json", f"open_clip:ViT-S-32-alt:{clip_file}"
    command = ["eval", "zeroshot", "--source", str(folder / "val"), "--templates", "simple", "--out", str(out)]
    tokenizer = tmp_path / "tokenizer"
    tiny.make_tokenizer(text_tower=tiny.text_tower(tokenizer="clip", vocab_size=49408)).save_pretrained(tokenizer)
    assert main([*command, "--model", str(tokenizer), "--model", clip, "--train", str(folder / "train")]) == 0
    written = json.loads(out.read_text())
    for figures in written["systems"].values():
        assert figures["num_images"] == 9 and 0 <= figures["top1"] <= 1 and figures["top5"] == 1
        assert 0 <= figures["linear_probe"] <= 1
    assert written["protocol"]["templates"] == "simple" and len(written["systems"]) == 2
    assert "linear_probe" in capsys.readouterr().out


def test_wrong_models_are_named(folder, capsys):
    command = ["eval", "zeroshot", "--source", str(folder / "val")]
    assert main([*command, "--model", "open_clip:ViT-L-99:openai"]) == 2
    assert "no model 'ViT-L-99'" in capsys.readouterr().err
    assert main([*command, "--model", "open_clip:ViT-L-14"]) == 2
    assert "expected open_clip:MODEL:WEIGHTS" in capsys.readouterr().err
    assert main([*command, "--model", "nowhere", "--dry-run"]) == 0
    assert "missing: nowhere" in capsys.readouterr().out
