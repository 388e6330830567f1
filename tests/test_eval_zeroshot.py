"""Zero-shot classification and the linear probe: by hand, against open_clip's own classifier, and as a command."""

import json

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from unitok.cli import main
from unitok.core.errors import DataError, UserError
from unitok.data.shapes import PALETTE
from unitok.data.source import Sample, open_source
from unitok.eval.image_text import open_image_text
from unitok.eval.retrieval import _both_ranks, recalls
from unitok.eval.zeroshot import (
    accuracies,
    by_class,
    class_folders,
    classifier,
    image_features,
    imagenet_names,
    linear_probe,
    load_names,
    load_templates,
)

CAPTIONS = "shapes:val?num=5&size=32"
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
    assert linear_probe((features, labels), (features, labels), 100.0, 0)["linear_probe"] == 1


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
    assert (
        main(
            [
                *command,
                "--model",
                str(tokenizer),
                "--model",
                clip,
                "--train",
                str(folder / "train"),
                "--captions",
                CAPTIONS,
            ]
        )
        == 0
    )
    written = json.loads(out.read_text())
    for figures in written["systems"].values():
        assert figures["num_images"] == 9 and 0 <= figures["top1"] <= 1 and figures["top5"] == 1
        assert 0 <= figures["linear_probe"] <= 1
        assert 0 <= figures["text_to_image_recall1"] <= figures["text_to_image_recall10"] <= 1
    counts = {row["metric"]: row["n"] for row in written["runs"]["tokenizer"]["metrics"]}
    assert counts["top1"] == 9 and counts["image_to_text_recall5"] == 5 < counts["text_to_image_recall1"]
    assert written["protocol"]["templates"] == "simple" and len(written["systems"]) == 2
    assert main(["report", str(out)]) == 0  # both in one column: how a model cuts its images is its own affair
    assert "linear_probe" in capsys.readouterr().out


class ByColourOfScene(ByColour):
    """Scenes are told apart by the colour of their one object: the pixel farthest from the ground."""

    def images(self, images):
        return super().images([Image.new("RGB", (2, 2), self._colour(image)) for image in images])

    def _colour(self, image):
        ground = image.getpixel((0, 0))[0]
        return max(image.getcolors(image.width**2), key=lambda found: sum(abs(one - ground) for one in found[1]))[1]

    def texts(self, texts):
        colours = [next(value for name, value in PALETTE.items() if f" {name} " in text) for text in texts]
        return F.normalize(torch.tensor(colours).float(), dim=-1)


@pytest.mark.parametrize("as_shards", [False, True])
def test_scenes_of_one_object_are_classes(as_shards, tmp_path):
    """Whoever knows the colour alone is right within the first five, of nine colours with three shapes each."""
    spec = "shapes:val?num=120&size=32"
    if as_shards:
        assert main(["data", "shapes", "--out", str(tmp_path), "--num", "120", "--split", "val", "--size", "32"]) == 0
        spec = str(tmp_path)
    source = by_class(open_source(spec))
    scenes = [open_source("shapes:val?num=120&size=32").scene(index) for index in range(120)]
    wanted = [f"{s.objects[0].color}_{s.objects[0].kind}" for s in scenes if len(s.objects) == 1]
    assert [source.key(index).split("/")[0] for index in range(len(source))] == wanted and 10 < len(wanted) < 120
    folders = class_folders(source)
    assert len(folders) == 27 and load_names(folders, None)[0] == "black circle"
    features, labels = image_features(ByColourOfScene(), source, folders, 20, 8)
    assert len(labels) == 20 and len(labels.unique()) > 10
    weights = classifier(ByColourOfScene(), load_names(folders, None), load_templates("photo"))
    found = accuracies(features @ weights.T, labels)
    assert found["top5"] > 0.8 and found["top1"] == 0  # the three shapes of a colour tie, and ties are no knowledge
    assert load_templates("photo")[0]("orange circle") == "a photo of an orange circle"
    with pytest.raises(DataError, match="has a single object"):
        by_class(open_source("shapes:val?num=1&seed=3&size=32"))


def test_the_command_on_the_shapes_world(tmp_path, capsys):
    import tiny

    tokenizer, out = tmp_path / "tokenizer", tmp_path / "out.json"
    tiny.make_tokenizer(text_tower=tiny.text_tower(tokenizer="clip", vocab_size=49408)).save_pretrained(tokenizer)
    command = ["eval", "zeroshot", "--model", str(tokenizer), "--out", str(out), "--limit", "9"]
    more = ["--source", "shapes:val?num=60&size=32", "--train", "shapes:train?num=150&size=32"]
    assert main([*command, *more]) == 0
    written = json.loads(out.read_text())
    assert written["protocol"]["templates"] == "photo" and written["protocol"]["counts"]["num_classes"] == 27
    (run,) = written["runs"].values()
    assert run["protocol"]["world"] == "shapes", "also of shards: not to stand beside ImageNet's figures"
    metrics = {row["metric"]: row for row in run["metrics"]}
    assert metrics["linear_probe"]["standard_error"] is not None and metrics["top1"]["n"] == 9
    assert metrics["chance"]["value"] == pytest.approx(1 / 27)
    assert "linear_probe" in capsys.readouterr().out


def test_wrong_models_are_named(folder, capsys):
    command = ["eval", "zeroshot", "--source", str(folder / "val")]
    assert main([*command, "--model", "open_clip:ViT-L-99:openai"]) == 2
    assert "no model 'ViT-L-99'" in capsys.readouterr().err
    assert main([*command, "--model", "open_clip:ViT-L-14"]) == 2
    assert "expected open_clip:MODEL:WEIGHTS" in capsys.readouterr().err
    assert main([*command, "--model", "nowhere", "--dry-run"]) == 0
    assert "missing: nowhere" in capsys.readouterr().out


def test_recalls_by_hand():
    """Two images with two captions each. Image 0 finds its second caption first; image 1 is beaten by one of image 0.
    Caption 0 prefers image 1; the others find their own."""
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.8, 0.0, 0.5, 0.7]])
    ranks = _both_ranks(scores, torch.tensor([0, 0, 1, 1]))
    assert ranks["image_to_text"].tolist() == [0, 1] and ranks["text_to_image"].tolist() == [1, 0, 0, 0]
    silent = _both_ranks(torch.zeros(2, 4), torch.tensor([0, 0, 1, 1]))
    assert silent["image_to_text"].tolist() == [2, 2] and silent["text_to_image"].tolist() == [1] * 4


def test_recalls_of_a_model_that_reads_both():
    """Images and captions are told apart by a number that both carry."""

    class Reader:
        settings: dict = {}

        def images(self, images):
            return torch.eye(6)[[image.getpixel((0, 0))[0] for image in images]]

        def texts(self, texts):
            return torch.eye(6)[[int(text[-1]) for text in texts]]

    class Pairs(list):
        name, bad = "pairs", ()

    def pair(number, captions):
        return Sample(key=str(number), image=Image.new("RGB", (2, 2), (number, 0, 0)), captions=captions)

    pairs = Pairs([pair(0, ["a 0", "b 0"]), pair(1, []), pair(2, ["a 2", "a 2", "b 3"]), pair(3, ["a 3"])])
    found = recalls(Reader(), pairs, batch_size=2)
    assert found["num_caption_images"] == 3 and found["num_captions"] == 5
    assert found["image_to_text_recall1"] == pytest.approx(2 / 3)  # "b 3" of image 2 is image 3's as well
    assert found["text_to_image_recall1"] == pytest.approx(4 / 5)
    with pytest.raises(DataError, match="has a caption"):
        recalls(Reader(), Pairs([pair(1, [])]))


def test_weights_of_another_activation_are_refused():
    with pytest.raises(UserError, match="ViT-L-14-quickgelu:openai"):
        open_image_text("open_clip:ViT-L-14:openai")
