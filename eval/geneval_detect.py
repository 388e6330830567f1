"""GenEval's detectors behind one interface: Mask2Former and OWLv2 of transformers, with CLIP naming colours, and the
shapes world's own. The official program needs mmdet for the first; nothing here does.

H W pixels, N detections, T texts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unitok.core.errors import CheckpointError, UserError
from unitok.eval.geneval_score import COLORS, OFFICIAL_RULE, SHAPES_RULE, Detected, GenEvalRule

DETECTORS = ("mask2former", "owlv2", "shapes")
MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"  # the architecture of the official detector
OWLV2 = "google/owlv2-base-patch16-ensemble"
CLIP_NAME = "ViT-L-14-quickgelu"  # OpenAI's weights need the quick GELU; plain "ViT-L-14" only warns and is wrong
CLIP_HINT = (
    "hub:timm/vit_large_patch14_clip_224.openai/open_clip_model.safetensors (OpenAI's ViT-L/14 as open_clip has it), "
    "or that file's path"
)
BACKGROUND = "#999"
COLOR_TEMPLATES = ("a photo of a {color} {kind}", "a photo of a {color}-colored {kind}", "a photo of a {color} object")
OWLV2_NMS = 0.5  # IoU; OWLv2 gives one object several boxes, which would spoil every count

# OWLv2's scores are sigmoids of single boxes, mostly 0.1 to 0.6: 0.9 for counting would find nothing. Not calibrated
# against people as the official ones are, so figures of the two detectors are of two protocols.
OWLV2_RULE = GenEvalRule(threshold=0.3, counting_threshold=0.3)

# What COCO label files call the classes that GenEval names otherwise (both of COCO's spellings are in use).
_TO_GENEVAL = {
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
}

NameColor = Callable[[Image.Image, "Found"], str]


@dataclass
class Found:
    """One object of a detector that names no colours: `color` is asked of CLIP when a prompt wants to know it.

    `bbox`: x0, y0, x1, y1 in pixels. `mask`: bool [H, W], or None where the detector gives boxes only.
    """

    kind: str
    bbox: tuple[float, float, float, float]
    score: float
    image: Image.Image = field(repr=False)
    name_color: NameColor | None = field(default=None, repr=False)
    mask: np.ndarray | None = field(default=None, repr=False)

    @cached_property
    def color(self) -> str:
        """One of `COLORS`. UserError where no CLIP was given."""
        if self.name_color is None:
            raise UserError(f"a prompt asks for the color of a {self.kind}, which needs CLIP: give --clip {CLIP_HINT}")
        return self.name_color(self.image, self)


@dataclass
class Detector:
    """A detector as the scorer uses it.

    `classes`: what it can find (None: whatever it is asked for). `settings`: all that changes its figures.
    """

    name: str
    detect: Callable[[Image.Image], Sequence[Detected]]
    rule: GenEvalRule
    classes: frozenset[str] | None
    settings: dict[str, Any]

    def protocol(self) -> dict[str, Any]:
        """Name, weights and thresholds, for the results."""
        return {"detector": self.name, **self.settings, **asdict(self.rule)}

    def check(self, metadata: Sequence[Mapping[str, Any]]) -> None:
        """UserError where prompts ask for what the detector cannot find: zeros would look like a measurement."""
        unknown = sorted(wanted_classes(metadata) - self.classes) if self.classes is not None else []
        if unknown:
            some = ", ".join(sorted(self.classes)[:5])
            raise UserError(
                f"prompts ask for {unknown[0]!r}, which {self.name} cannot find (it knows {len(self.classes)} classes: "
                f"{some}, ...); give another --detector"
            )


def wanted_classes(metadata: Sequence[Mapping[str, Any]]) -> set[str]:
    """All classes that prompts speak of."""
    clauses = (clause for entry in metadata for key in ("include", "exclude") for clause in entry.get(key, ()))
    return {clause["class"] for clause in clauses}


def shapes_detector(rule: GenEvalRule = SHAPES_RULE) -> Detector:
    """The shapes world's detector: no weights, colours by the palette."""
    from unitok.data.detector import detect
    from unitok.data.shapes import SHAPES

    return Detector("shapes", detect, rule, frozenset(SHAPES), {})


def geneval_name(label: str) -> str:
    """GenEval's name of a COCO class."""
    return _TO_GENEVAL.get(label, label)


def mask2former_detector(
    path: str | Path,
    device: torch.device | str = "cpu",
    rule: GenEvalRule = OFFICIAL_RULE,
    name_color: NameColor | None = None,
) -> Detector:
    """Mask2Former for instances: a folder of transformers, or a name of the hub. Boxes are those of the masks.

    Raises UserError where there are no such weights.
    """
    from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

    model, processor = _load(Mask2FormerForUniversalSegmentation, AutoImageProcessor, path, MASK2FORMER)
    model.to(device)
    kinds = {index: geneval_name(label) for index, label in model.config.id2label.items()}

    @torch.no_grad()
    def detect(image: Image.Image) -> list[Found]:
        outputs = model(**processor(images=image, return_tensors="pt").to(device))
        # transformers draws the segments on the CPU, and takes no mask from elsewhere for it
        outputs.class_queries_logits = outputs.class_queries_logits.cpu()
        outputs.masks_queries_logits = outputs.masks_queries_logits.cpu()
        (found,) = processor.post_process_instance_segmentation(
            outputs,
            threshold=min(rule.threshold, rule.counting_threshold),
            target_sizes=[(image.height, image.width)],
            return_binary_maps=True,
        )
        segments = found["segments_info"]
        masks = np.asarray(found["segmentation"]).astype(bool) if segments else []
        return [
            Found(kinds[segment["label_id"]], mask_box(mask), float(segment["score"]), image, name_color, mask)
            for segment, mask in zip(segments, masks, strict=True)
        ]

    settings = {"detector_weights": weights_name(path), "box": "of the mask"}
    return Detector("mask2former", detect, rule, frozenset(kinds.values()), settings)


def mask_box(mask_HW: np.ndarray) -> tuple[float, float, float, float]:
    """Smallest box around a mask that is not empty; x1, y1 are one past its last pixel, as mmdet has them."""
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def owlv2_detector(
    path: str | Path,
    classes: Sequence[str],
    device: torch.device | str = "cpu",
    rule: GenEvalRule = OWLV2_RULE,
    name_color: NameColor | None = None,
) -> Detector:
    """OWLv2, asked for all of `classes` in every image (so that they compete for a box), in GenEval's words.

    Raises UserError where there are no such weights.
    """
    from torchvision.ops import batched_nms
    from transformers import AutoProcessor, Owlv2ForObjectDetection

    model, processor = _load(Owlv2ForObjectDetection, AutoProcessor, path, OWLV2)
    model.to(device)
    classes = sorted(set(classes))
    queries = [f"a photo of a {kind}" for kind in classes]

    @torch.no_grad()
    def detect(image: Image.Image) -> list[Found]:
        outputs = model(**processor(text=[queries], images=image, return_tensors="pt").to(device))
        threshold = min(rule.threshold, rule.counting_threshold)
        (found,) = processor.post_process_grounded_object_detection(
            outputs, threshold=threshold, target_sizes=[(image.height, image.width)]
        )
        kept = batched_nms(found["boxes"], found["scores"], found["labels"], OWLV2_NMS).tolist()
        return [
            Found(classes[found["labels"][i]], tuple(found["boxes"][i].tolist()), float(found["scores"][i]), image,
                  name_color)
            for i in kept
        ]  # fmt: skip

    settings = {"detector_weights": weights_name(path), "queries": queries, "nms_iou": OWLV2_NMS}
    return Detector("owlv2", detect, rule, frozenset(classes), settings)


def weights_name(path: str | Path) -> str:
    """What names a detector's weights in results: their hash where they are files here, else the hub's name."""
    from unitok.eval.results import checkpoint_hash

    return f"sha256:{checkpoint_hash(path)[:16]}" if Path(path).exists() else str(path)


def _load(model_class: Any, processor_class: Any, path: str | Path, default: str) -> tuple[Any, Any]:
    """A detector of transformers and its processor, with nothing of another kind taken for it."""
    from transformers.utils import logging

    from unitok.core.pretrained import checked

    logging.disable_progress_bar()
    hint = f"give --detector-weights the folder of {default}, as `hf download {default} --local-dir DIR` makes it"
    if Path(path).is_dir() and not list(Path(path).glob("*.safetensors")):
        raise CheckpointError(f"{path}: no *.safetensors in it; {hint}")
    try:
        model, _ = checked(lambda: model_class.from_pretrained(str(path), output_loading_info=True), path)
        return model.eval(), processor_class.from_pretrained(str(path))
    except OSError as error:  # no such folder, no such name, or no way to the hub
        raise CheckpointError(f"{path}: {model_class.__name__} cannot be read ({_short(error)}); {hint}") from None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]


class ClipColors:
    """Names an object's colour as the official scorer does: zero-shot CLIP on the object's crop, all else grey."""

    def __init__(
        self,
        model: Any,
        preprocess: Callable[[Image.Image], torch.Tensor],
        tokenizer: Callable[[list[str]], torch.Tensor],
        device: torch.device | str = "cpu",
    ) -> None:
        self.model, self.preprocess, self.tokenizer = model.eval().to(device), preprocess, tokenizer
        self.device = device
        self._classifiers: dict[str, torch.Tensor] = {}

    @classmethod
    def from_file(cls, path: str | Path | None, device: torch.device | str = "cpu") -> "ClipColors":
        """OpenAI's ViT-L/14 in open_clip's layout (.safetensors or .pt of tensors), local or `hub:OWNER/REPO/FILE`."""
        import open_clip

        from unitok.tokenizer.weights import find_weights, load_strict, read_weights

        file = find_weights("--clip", path, "CLIP ViT-L/14 of OpenAI", CLIP_HINT)
        model, _, preprocess = open_clip.create_model_and_transforms(CLIP_NAME)
        state = read_weights(file)
        load_strict(model, state, "CLIP ViT-L/14", file)
        return cls(model, preprocess, open_clip.get_tokenizer(CLIP_NAME), device)

    @torch.no_grad()
    def __call__(self, image: Image.Image, found: Found) -> str:
        pixels = self.preprocess(crop_object(image, found)).unsqueeze(0).to(self.device)
        features = torch.nn.functional.normalize(self.model.encode_image(pixels), dim=-1)
        return COLORS[int((features @ self._classifier(found.kind)).argmax())]

    def _classifier(self, kind: str) -> torch.Tensor:
        """Unit vectors `[D, 10]`: per colour the mean of the templates' normalised features."""
        if kind not in self._classifiers:
            columns = []
            for color in COLORS:
                texts = self.tokenizer([template.format(color=color, kind=kind) for template in COLOR_TEMPLATES])
                features_TD = torch.nn.functional.normalize(self.model.encode_text(texts.to(self.device)), dim=-1)
                columns.append(torch.nn.functional.normalize(features_TD.mean(0), dim=0))
            self._classifiers[kind] = torch.stack(columns, dim=1)
        return self._classifiers[kind]


def crop_object(image: Image.Image, found: Found) -> Image.Image:
    """The object's box, with everything outside its mask in `BACKGROUND` (the bare box where there is no mask)."""
    if found.mask is not None:
        blank = Image.new("RGB", image.size, BACKGROUND)
        image = Image.composite(image, blank, Image.fromarray(found.mask))
    return image.crop(found.bbox)
