"""Evaluators with fake tokenizers, answer functions, generators and detectors whose right figures are known."""

import json
import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from unitok.core.errors import DataError
from unitok.core.rng import numpy_rng
from unitok.data.captions import caption
from unitok.data.detector import detect
from unitok.data.shapes import render, sample_scene
from unitok.eval.codes import CodeCounter, random_code_images
from unitok.eval.geneval import (
    evaluate_geneval,
    random_codes_score,
    reconstruction_ceiling,
    score_images,
)
from unitok.eval.geneval_detect import Detector
from unitok.eval.geneval_run import score_run
from unitok.eval.geneval_score import OFFICIAL_RULE, SHAPES_RULE
from unitok.eval.reconstruction import evaluate_reconstruction
from unitok.eval.retrieval import evaluate_retrieval
from unitok.eval.vqa import choose_questions, evaluate_vqa, summarise_records

SIZE = 64


@dataclass
class FakeSample:
    key: str
    image: Image.Image
    captions: list[str] = field(default_factory=list)
    questions: list[tuple[str, str, str]] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)


class FakeTokenizer(nn.Module):
    """Codes are the brightness (0..3) of the four quarters; `decode` gives the last image back, spoilt by `spoil`."""

    def __init__(self, spoil=lambda pixels: pixels):
        super().__init__()
        self.config = SimpleNamespace(image_size=SIZE, num_codebooks=2, codebook_size=4)
        self.spoil, self.last, self.modes = spoil, None, []

    def encode(self, pixels):
        self.modes.append((self.training, torch.is_grad_enabled()))
        self.last = pixels
        quarters = nn.functional.adaptive_avg_pool2d(pixels.mean(1, keepdim=True), 2).flatten(2)
        codes = ((quarters + 1) * 1.999).long().clamp(0, 3)
        return codes.expand(-1, 2, -1)

    def decode(self, codes):
        return self.spoil(self.last[: len(codes)])


def grey(level: int) -> Image.Image:
    return Image.new("RGB", (SIZE, SIZE), (level, level, level))


def shapes(count: int) -> list[FakeSample]:
    scenes = [sample_scene(0, "val", index) for index in range(count)]
    return [FakeSample(f"s{index}", render(scene), meta={"scene": scene}) for index, scene in enumerate(scenes)]


def test_a_perfect_tokenizer_keeps_everything():
    tokenizer = FakeTokenizer().train()
    scores = evaluate_reconstruction(tokenizer, shapes(10), batch_size=4, num_pairs=3)
    assert scores["psnr_db"] == 100.0 and scores["ssim"] == pytest.approx(1.0)
    assert scores["detector_agreement"] == scores["detector_agreement_originals"] >= 0.9
    assert scores["num_images"] == 10 and len(scores["pairs"]) == 3
    assert set(tokenizer.modes) == {(False, False)}, "evaluated in eval mode, without gradients"
    assert tokenizer.training, "the mode before the evaluation comes back"


def test_psnr_of_a_known_error():
    source = [FakeSample("a", grey(100)), FakeSample("b", grey(150)), FakeSample("c", grey(200))]
    tokenizer = FakeTokenizer(lambda pixels: pixels + 2 * 8 / 255)
    scores = evaluate_reconstruction(tokenizer, source, limit=2)
    assert scores["psnr_db"] == pytest.approx(20 * math.log10(255 / 8), abs=1e-6)
    assert scores["num_images"] == 2
    assert scores["detector_agreement"] is None, "no scenes, so nothing to agree with"


def test_blank_reconstructions_do_not_agree():
    scores = evaluate_reconstruction(FakeTokenizer(lambda pixels: torch.full_like(pixels, 0.9)), shapes(6))
    assert scores["detector_agreement"] == 0.0 < scores["detector_agreement_originals"]


def test_figures_do_not_depend_on_the_batch_size():
    def noisy(pixels):
        return (pixels + 0.1 * pixels.roll(1, -1)).clamp(-1, 1)

    one, four = (evaluate_reconstruction(FakeTokenizer(noisy), shapes(7), batch_size=size) for size in (1, 4))
    for key in ("psnr_db", "ssim", "detector_agreement", "perplexity"):
        assert one[key] == pytest.approx(four[key], rel=1e-6)


def test_code_statistics_by_hand():
    counter = CodeCounter(2, 4)
    counter.add(torch.tensor([[[0, 0, 1, 1], [2, 2, 2, 2]]]))
    counter.add(torch.tensor([[[0, 1], [2, 2]]]))
    summary = counter.summary()
    once = CodeCounter(1, 4)
    once.add(torch.tensor([[[3]]]))
    assert once.summary()["dead_codes"] == 3, "used once is used"
    assert summary["usage_by_codebook"] == [0.5, 0.25] and summary["dead_codes_by_codebook"] == [2, 3]
    assert summary["perplexity_by_codebook"] == pytest.approx([2.0, 1.0])
    assert (summary["usage"], summary["dead_codes"]) == (0.375, 5)


def test_empty_source_is_refused():
    with pytest.raises(DataError, match="no image"):
        evaluate_reconstruction(FakeTokenizer(), [])


class FakeClip(FakeTokenizer):
    """Image and text features are the same one-hot of the grey level, except for levels in `confused`."""

    def __init__(self, confused=(), constant=False):
        super().__init__()
        self.confused, self.constant = confused, constant

    def encode_image(self, pixels, normalize=True):
        assert normalize
        levels = ((pixels.mean((1, 2, 3)) + 1) * 127.5).round().long() // 10
        levels = torch.tensor([(level + 1) % 10 if level in self.confused else level for level in levels.tolist()])
        return torch.ones(len(levels), 10) if self.constant else nn.functional.one_hot(levels, 10).float()

    def tokenize_text(self, texts):
        return torch.tensor([[int(text.split()[-1])] for text in texts])

    def encode_text(self, ids, normalize=True):
        return torch.ones(len(ids), 10) if self.constant else nn.functional.one_hot(ids[:, 0], 10).float()


def captioned(levels):
    return [FakeSample(str(index), grey(level * 10), [f"grey {level}"]) for index, level in enumerate(levels)]


def test_retrieval_among_distinct_captions():
    source = captioned([1, 2, 3, 3, 3, 4, 5, 6])
    scores = evaluate_retrieval(FakeClip(), source, batch_size=3)
    assert scores["top1"] == 1.0, "three images of one caption are no rivals of each other"
    assert (scores["num_captions"], scores["num_images"], scores["chance"]) == (6, 8, 1 / 6)
    assert evaluate_retrieval(FakeClip(confused={3}), source)["top1"] == 5 / 8
    assert evaluate_retrieval(FakeClip(), source, limit=2)["num_captions"] == 2


def test_equal_features_retrieve_nothing():
    """A collapsed tokenizer (all features equal) must not score by winning ties."""
    assert evaluate_retrieval(FakeClip(constant=True), captioned([1, 2, 3, 4]))["top1"] == 0.0


def test_retrieval_without_captions_is_refused():
    with pytest.raises(DataError, match="has a caption"):
        evaluate_retrieval(FakeClip(), [FakeSample("a", grey(1))])


def asked_source(count=12):
    def questions(index):
        color = ("red", "red", "blue")[index % 3]
        return [("color", "what color is it?", color), ("color", "which colour?", color), ("count", "how many?", "two")]

    return [FakeSample(f"k{index}", grey(index), questions=questions(index)) for index in range(count)]


def answers_by_level(images, questions):
    levels = [image.getpixel((0, 0))[0] for image in images]
    colors = [("red", "red", "blue")[level % 3] for level in levels]
    return ["Two." if q == "how many?" else color for q, color in zip(questions, colors, strict=True)]


def test_vqa_accuracy_and_majority():
    scores = evaluate_vqa(answers_by_level, asked_source(), per_image=2)
    assert scores["accuracy"] == 1.0 and scores["num_questions"] == 24
    color = scores["by_type"]["color"]
    assert color == {"accuracy": 1.0, "majority": pytest.approx(2 / 3), "majority_answer": "red", "count": 12}
    assert scores["majority"] == pytest.approx((2 / 3 + 1) / 2)
    always_blue = evaluate_vqa(lambda images, questions: ["blue"] * len(questions), asked_source(), per_image=2)
    assert always_blue["by_type"]["color"]["accuracy"] == pytest.approx(1 / 3)
    assert always_blue["by_type"]["count"]["accuracy"] == 0.0
    rescored = summarise_records(always_blue["records"])
    assert rescored == always_blue, "stored answers can be scored again"


def test_majority_comes_from_training_answers_when_given():
    scores = evaluate_vqa(
        answers_by_level, asked_source(), per_image=2, train_answers={"color": ["blue", "blue", "red"]}
    )
    assert scores["by_type"]["color"]["majority"] == pytest.approx(1 / 3)


def test_chosen_questions_follow_from_seed_and_key_and_take_types_in_turn():
    source = asked_source()
    chosen = choose_questions(source, seed=1, per_image=2)
    assert chosen == choose_questions(source, seed=1, per_image=2)
    assert chosen != choose_questions(source, seed=2, per_image=2)
    assert all({a.type, b.type} == {"color", "count"} for a, b in zip(chosen[::2], chosen[1::2], strict=True))
    assert choose_questions(source, limit=5, seed=1, per_image=2) == chosen[:5]
    assert choose_questions(source[3:], seed=1, per_image=2)[0].text == chosen[6].text


def test_vqa_refuses_a_wrong_number_of_answers_and_no_questions():
    with pytest.raises(DataError, match="1 answers to 24 questions"):
        evaluate_vqa(lambda images, questions: ["red"], asked_source(), per_image=2)
    with pytest.raises(DataError, match="has questions"):
        evaluate_vqa(answers_by_level, [FakeSample("a", grey(1))])


@dataclass
class Thing:
    kind: str
    color: str = "red"
    bbox: tuple[float, float, float, float] = (0, 0, 9, 9)
    score: float = 1.0


def detect_level(image):
    """The grey level counts the dots."""
    return [Thing("dot")] * image.getpixel((0, 0))[0]


def dots(count, tag="counting"):
    return {"tag": tag, "prompt": f"a photo of {count} dots", "include": [{"class": "dot", "count": count}]}


PROMPTS = [dots(1), dots(2), dots(3, "single_object")]


def draw_dots(prompts, seeds):
    """As many dots as asked, but never more than two."""
    assert len(set(seeds)) == len(seeds)
    return [grey(min(2, int(prompt.split()[3]))) for prompt in prompts]


def test_geneval_draws_writes_and_scores(tmp_path):
    scores = evaluate_geneval(draw_dots, PROMPTS, 2, tmp_path, detect=detect_level, batch_size=4)
    assert scores["by_tag"] == {"single_object": 0.0, "counting": 1.0} and scores["overall"] == 0.5
    assert scores["num_images"] == 6 and [image.getpixel((0, 0))[0] for image in scores["images"]] == [1, 1, 2, 2, 2, 2]
    assert json.loads((tmp_path / "00001" / "metadata.jsonl").read_text()) == PROMPTS[1]
    assert Image.open(tmp_path / "00002" / "grid.png").size == (2 * SIZE, SIZE)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert set(rows[0]) == {"filename", "tag", "prompt", "correct", "reason", "metadata", "details"}
    assert rows[5]["reason"] == "expected dot>=3, found 2" and rows[5]["filename"] == "00002/samples/00001.png"
    assert json.loads(rows[0]["details"]) == {"dot": [[0, 0, 9, 9, 1.0]]}
    detector = Detector("level", detect_level, OFFICIAL_RULE, None, {})
    assert score_run(tmp_path, detector, tmp_path / "again.jsonl") == scores["rows"]


def test_seeds_do_not_depend_on_batch_size_or_on_the_number_of_prompts():
    def seeds_of(prompts, batch_size):
        seen = []

        def generate(texts, seeds):
            seen.extend(seeds)
            return draw_dots(texts, seeds)

        evaluate_geneval(generate, prompts, 2, seed=7, detect=detect_level, batch_size=batch_size)
        return seen

    assert seeds_of(PROMPTS, 1) == seeds_of(PROMPTS, 5)
    assert seeds_of(PROMPTS, 1)[:4] == seeds_of(PROMPTS[:2], 5)


def test_geneval_refuses_what_it_cannot_score(tmp_path):
    with pytest.raises(DataError, match="0 images for 3 prompts"):
        evaluate_geneval(lambda prompts, seeds: [], PROMPTS, 1, detect=detect_level)
    with pytest.raises(DataError, match="0 prompts"):
        evaluate_geneval(draw_dots, [], 1, detect=detect_level)


def test_ceiling_scores_reconstructions_and_random_codes_are_reproducible():
    source = [FakeSample(str(count), grey(count), meta={"geneval": dots(count)}) for count in (1, 2)]
    perfect = reconstruction_ceiling(FakeTokenizer(), source, detect=detect_level)
    assert perfect["overall"] == 1.0 and "rows" not in perfect
    black = FakeTokenizer(lambda pixels: torch.full_like(pixels, -1.0))
    assert reconstruction_ceiling(black, source, detect=detect_level)["overall"] == 0.0
    with pytest.raises(DataError, match="GenEval metadata"):
        reconstruction_ceiling(FakeTokenizer(), [FakeSample("a", grey(1))], detect=detect_level)

    class Painter(FakeTokenizer):
        def decode(self, codes):
            assert codes.shape[1:] == (2, 4) and codes.max() < 4
            return codes.float().mean((1, 2))[:, None, None, None].expand(-1, 3, SIZE, SIZE) / 2 - 1

    first, again = (random_code_images(Painter(), 6, seed=3, batch_size=size) for size in (2, 6))
    assert [np.asarray(image).tobytes() for image in first] == [np.asarray(image).tobytes() for image in again]
    other = random_code_images(Painter(), 6, seed=4)
    assert [np.asarray(image).tobytes() for image in first] != [np.asarray(image).tobytes() for image in other]
    assert random_codes_score(Painter(), PROMPTS, detect=lambda image: [])["overall"] == 0.0


def test_scenes_of_the_shapes_world_meet_their_own_captions():
    """Rendered scenes, found by the real detector, are right for their own prompt and wrong for one more object."""
    scenes = [sample_scene(1, "val", index) for index in range(40)]
    prompts = [caption(scene, numpy_rng("test", index))[2] for index, scene in enumerate(scenes)]
    images = [render(scene) for scene in scenes]
    for rule in (SHAPES_RULE, OFFICIAL_RULE):
        assert score_images(images, prompts, detect, rule)["overall"] >= 0.95
    more = [prompt | {"include": [entry | {"count": 9} for entry in prompt["include"]]} for prompt in prompts]
    assert score_images(images, more, detect, SHAPES_RULE)["overall"] == 0.0


def test_images_and_prompts_must_be_as_many():
    with pytest.raises(ValueError):
        score_images([grey(1)], PROMPTS, detect_level)
