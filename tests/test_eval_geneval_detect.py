"""GenEval's detectors: random weights of the real classes in the real chain, and what is made of their output."""

import json
import math

import numpy as np
import pytest
import torch
from geneval_folders import CASES, scene, write_folder
from PIL import Image
from torch import nn

from unitok.cli import main
from unitok.core.errors import CheckpointError, UserError
from unitok.eval.geneval_detect import (
    BACKGROUND,
    COLOR_TEMPLATES,
    ClipColors,
    Found,
    crop_object,
    geneval_name,
    mask2former_detector,
    mask_box,
    owlv2_detector,
)
from unitok.eval.geneval_run import score_run
from unitok.eval.geneval_score import COLORS, GenEvalRule
from unitok.eval.results import read_results

LABELS = ("circle", "square", "triangle", "sofa")
RED = Image.new("RGB", (64, 64), "red")


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory):
    """A folder of Mask2Former for instances, Swin backbone, random weights."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    from transformers.models.mask2former.image_processing_mask2former import Mask2FormerImageProcessor

    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=6,
        id2label=dict(enumerate(LABELS)), label2id={name: index for index, name in enumerate(LABELS)},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("mask2former")
    model = Mask2FormerForUniversalSegmentation(config).eval()
    # random heads are sure of nothing: a steeper one gives scores on both sides of the thresholds
    model.class_predictor.weight.data.mul_(20)
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def owlv2(tmp_path_factory):
    """A folder of OWLv2 with random weights and a text tokenizer of single letters."""
    from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2Processor
    from transformers.models.owlv2.image_processing_owlv2 import Owlv2ImageProcessor

    torch.manual_seed(0)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    names = ["!", *letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={name: index for index, name in enumerate(names)}, merges=[], pad_token="!", model_max_length=32
    )
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Owlv2Config(
        text_config={**size, "vocab_size": len(names), "max_position_embeddings": 32, "eos_token_id": len(names) - 1},
        vision_config={**size, "image_size": 64, "patch_size": 16},
        projection_dim=16,
    )
    folder = tmp_path_factory.mktemp("owlv2")
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    processor = Owlv2ImageProcessor(size={"height": 64, "width": 64})
    Owlv2Processor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


class AverageColor(nn.Module):
    """A CLIP that sees the mean colour of a crop and reads the colour's name."""

    def encode_image(self, pixels):
        return pixels.mean((2, 3)) + 1e-3

    def encode_text(self, ids):
        from PIL import ImageColor

        return torch.tensor([ImageColor.getrgb(COLORS[index]) for index in ids.tolist()]) / 255.0 + 1e-3


def average_colors():
    def tokenize(texts):
        return torch.tensor([next(i for i, color in enumerate(COLORS) if color in text) for text in texts])

    def preprocess(image):
        return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)

    return ClipColors(AverageColor(), preprocess, tokenize)


def test_mask2former_scores_a_folder_in_the_official_layout(mask2former, tmp_path):
    """Random weights of the real class through the whole chain: detections, rows, figures, and every row's reason."""
    write_folder(tmp_path)
    rule = GenEvalRule(threshold=0.05, counting_threshold=0.1)
    detector = mask2former_detector(mask2former, rule=rule, name_color=average_colors())
    rows = score_run(tmp_path, detector, tmp_path / "results.jsonl")
    assert len(rows) == sum(len(samples) for _, samples in CASES)
    found = [box for row in rows for boxes in json.loads(row["details"]).values() for box in boxes]
    assert found, "the thresholds let something through"
    for x0, y0, x1, y1, score in found:
        assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64 and 0.05 < score <= 1
    assert all(row["correct"] == (row["reason"] == "") for row in rows)
    assert detector.protocol()["detector_weights"].startswith("sha256:")
    assert detector.classes == {"circle", "square", "triangle", "couch"}


def test_the_command_runs_mask2former(mask2former, tmp_path, capsys):
    cases = [case for case in CASES if "color" not in case[0]["tag"]]
    write_folder(tmp_path, cases)
    out = tmp_path / "scores.jsonl"
    words = [
        "--detector",
        "mask2former",
        "--detector-weights",
        str(mask2former),
        "--threshold",
        "0.05",
        "--out",
        str(out),
    ]
    assert main(["eval", "geneval-score", str(tmp_path), *words]) == 0
    scoring = read_results(tmp_path / "scores.json")["protocol"]["scoring"]
    assert (scoring["threshold"], scoring["counting_threshold"], scoring["detector"]) == (0.05, 0.9, "mask2former")
    assert len(out.read_text().splitlines()) == sum(len(samples) for _, samples in cases)
    capsys.readouterr()
    write_folder(tmp_path / "colors", CASES[3:4])
    assert main(["eval", "geneval-score", str(tmp_path / "colors"), *words]) == 2
    assert "CLIP ViT-L/14" in capsys.readouterr().err


def test_masks_become_classes_boxes_and_scores(mask2former):
    """With known logits: the class's probability times the mean mask probability, and the mask's box."""
    from transformers import Mask2FormerForUniversalSegmentation
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

    classes = torch.full((1, 6, 5), -20.0)
    classes[..., 4] = 0.0  # all queries say "nothing" ...
    classes[0, 2, 3], classes[0, 2, 4] = 20.0, -20.0  # ... but one, which is sure of a sofa
    masks = torch.full((1, 6, 16, 16), -8.0)
    masks[0, 2, 4:8, 2:12] = 8.0
    known = Mask2FormerForUniversalSegmentationOutput(class_queries_logits=classes, masks_queries_logits=masks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mask2FormerForUniversalSegmentation, "forward", lambda self, **_: known)
        (found,) = mask2former_detector(mask2former).detect(RED)
    assert found.kind == "couch" and found.score == pytest.approx(1.0, abs=0.05)
    assert found.bbox == pytest.approx((8, 16, 48, 32), abs=1) and found.mask.shape == (64, 64)


def test_owlv2_scores_a_folder_in_the_official_layout(owlv2, tmp_path):
    write_folder(tmp_path)
    rule = GenEvalRule(threshold=0.0, counting_threshold=0.0)
    detector = owlv2_detector(owlv2, ["square", "circle"], rule=rule, name_color=average_colors())
    rows = score_run(tmp_path, detector, tmp_path / "results.jsonl")
    kinds = {kind for row in rows for kind in json.loads(row["details"])}
    assert kinds and kinds <= {"circle", "square"} and detector.protocol()["nms_iou"] == 0.5
    assert detector.protocol()["queries"] == ["a photo of a circle", "a photo of a square"]
    boxes = [(found.kind, found.bbox) for found in detector.detect(scene(("circle", "red", (32, 32))))]
    for index, (kind, a) in enumerate(boxes):
        assert all(overlap(a, b) <= 0.5 + 1e-6 for other, b in boxes[:index] if other == kind)


def overlap(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def test_boxes_of_masks():
    mask = np.zeros((20, 30), dtype=bool)
    mask[3:5, 7:11] = mask[9, 20] = True
    assert mask_box(mask) == (7.0, 3.0, 21.0, 10.0)


def test_a_crop_shows_the_object_on_grey():
    image = Image.new("RGB", (64, 64), "blue")
    image.paste("red", (10, 10, 20, 20))
    mask = np.zeros((64, 64), dtype=bool)
    mask[10:20, 10:20] = True
    crop = crop_object(image, Found("apple", (8.0, 8.0, 20.0, 20.0), 1.0, image, mask=mask))
    assert crop.size == (12, 12) and crop.getpixel((5, 5)) == (255, 0, 0)
    assert crop.getpixel((0, 0)) == (153, 153, 153) and BACKGROUND == "#999"
    bare = crop_object(image, Found("apple", (8.0, 8.0, 20.0, 20.0), 1.0, image))
    assert bare.getpixel((0, 0)) == (0, 0, 255), "no mask, so nothing to hide"


@pytest.mark.parametrize("color", ["red", "green", "purple"])
def test_colors_are_named(color):
    image = Image.new("RGB", (64, 64), color)
    assert Found("apple", (0, 0, 64, 64), 1.0, image, average_colors()).color == color
    with pytest.raises(UserError, match="needs CLIP: give --clip"):
        assert Found("apple", (0, 0, 64, 64), 1.0, image).color


def test_colors_by_a_real_clip_are_those_of_open_clips_own_classifier():
    """A small open_clip model with random weights: the same class vectors as open_clip's zero-shot classifier."""
    import open_clip
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=16, image_size=32)
    model = CLIP(16, vision, CLIPTextCfg(layers=1, width=16, heads=2), quick_gelu=True).eval()
    tokenizer = open_clip.get_tokenizer("ViT-L-14-quickgelu")
    colors = ClipColors(model, open_clip.image_transform(32, is_train=False), tokenizer)
    templates = [lambda color, text=text: text.format(color=color, kind="tv remote") for text in COLOR_TEMPLATES]
    with torch.no_grad():
        theirs = open_clip.build_zero_shot_classifier(model, tokenizer, COLORS, templates)
        torch.testing.assert_close(colors._classifier("tv remote"), theirs, rtol=1e-4, atol=1e-5)
        pixels = colors.preprocess(RED).unsqueeze(0)
        wanted = COLORS[int((model.encode_image(pixels) @ theirs).argmax())]
    assert colors(RED, Found("tv remote", (0, 0, 64, 64), 1.0, RED)) == wanted


def test_class_names_are_genevals():
    coco = {
        "motorbike": "motorcycle",
        "remote": "tv remote",
        "tvmonitor": "tv",
        "mouse": "computer mouse",
        "dog": "dog",
    }
    assert {name: geneval_name(name) for name in coco} == coco


def test_weights_that_are_not_there_are_one_line(mask2former, tmp_path):
    with pytest.raises(CheckpointError, match="facebook/mask2former-swin-small-coco-instance"):
        mask2former_detector(tmp_path)
    with pytest.raises(CheckpointError, match="missing keys"):
        owlv2_detector(mask2former, ["circle"])
    with pytest.raises(UserError, match="--clip=/nowhere does not exist; expected CLIP ViT-L/14"):
        ClipColors.from_file("/nowhere")
    assert math.isfinite(mask2former_detector(mask2former).rule.threshold)


def test_the_command_runs_owlv2(owlv2, tmp_path):
    """The queries are those of the whole folder, whatever part of it is scored."""
    cases = [case for case in CASES if "color" not in case[0]["tag"]]
    write_folder(tmp_path, cases)
    words = ["--detector", "owlv2", "--detector-weights", str(owlv2), "--threshold", "0", "--counting-threshold", "0"]
    assert main(["eval", "geneval-score", str(tmp_path), *words, "--limit", "1"]) == 0
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
    assert main(["eval", "geneval-score", str(tmp_path), *words]) == 0
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 10
    scoring = read_results(tmp_path / "results.json")["protocol"]["scoring"]
    assert scoring["queries"] == ["a photo of a circle", "a photo of a square"] and scoring["threshold"] == 0.0
