"""Zero-shot classification, retrieval and a linear probe on the features of `ClipModel`s.

B images, C classes, D width, I images and T texts of a retrieval pool.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unitok.core.errors import DataError, UserError
from unitok.data.shapes import PALETTE, SHAPES, Scene
from unitok.data.source import FolderSource, ShapesSource
from unitok.eval.clip_models import ClipModel
from unitok.eval.progress import batches, progress, sample_batches
from unitok.eval.results import Metric, share

TEMPLATES = ("openai", "simple", "plain")
PROBE_C = 0.316  # CLIP's own sweep ends near it on ImageNet; named in the result


# ---- Classes


@dataclass(frozen=True)
class Classes:
    """`labels`: what a source calls its classes (folder names, or numbers as text), in the order of `names`."""

    labels: tuple[str, ...]
    names: tuple[str, ...]


def source_classes(source: Any, names: str | None = None) -> Classes:
    """Classes of a source and their names in words.

    names: "imagenet" (open_clip's 1000, in the order of the sorted folders, or by number), a .json file {label: name},
    or a text file with one name a line, in that order; None takes the folders' own names.

    Raises:
        DataError: the source has no classes, or the names are of other ones.
    """
    labels = _labels(source)
    if names is None:
        if labels is None:
            raise DataError(f"{source.name}: samples have numbers for classes, but no names; give --classes FILE")
        return Classes(labels, tuple(label.replace("_", " ") for label in labels))
    if names == "imagenet":
        import open_clip

        known: Sequence[str] | dict[str, str] = open_clip.IMAGENET_CLASSNAMES
    else:
        known = _read_names(Path(names))
    if isinstance(known, dict):
        labels = labels or tuple(known)
        missing = [label for label in labels if label not in known]
        if missing:
            raise DataError(f"{names}: has no name for class {missing[0]!r} of {source.name}")
        return Classes(labels, tuple(known[label] for label in labels))
    labels = labels or tuple(map(str, range(len(known))))
    if len(known) != len(labels):
        raise DataError(
            f"{names}: {len(known)} class names, but {source.name} has {len(labels)} classes; for a part of "
            "them give a .json file {folder: name}"
        )
    return Classes(labels, tuple(known))


def _labels(source: Any) -> tuple[str, ...] | None:
    if isinstance(source, ShapesSource):
        return tuple(f"{color} {shape}" for color in PALETTE for shape in SHAPES)
    if isinstance(source, FolderSource):
        folders = sorted(
            {path.relative_to(source.folder).parts[0] for path in source.files if path.parent != source.folder}
        )
        if len(folders) < 2:
            raise DataError(f"{source.name}: expected one sub-folder of images per class, at least two")
        return tuple(folders)
    return None


def _read_names(path: Path) -> dict[str, str] | list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        names = (
            json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.splitlines() if line.strip()]
        )
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(
            f"{path}: class names cannot be read ({type(error).__name__}); give a .json or text file"
        ) from None
    if not names or not isinstance(names, dict | list):
        raise DataError(f"{path}: expected an object {{label: name}}, or one name a line")
    return names


def label_of(sample: Any, labels: Sequence[str]) -> int | None:
    """Number of a sample's class; None where it has none (a scene of several objects).

    The class is the first folder of its key, "label" or "cls" of its JSON, or the one object of its scene.
    """
    scene = sample.meta.get("scene")
    if isinstance(scene, Scene):
        found = f"{scene.objects[0].color} {scene.objects[0].kind}" if len(scene.objects) == 1 else None
    elif "label" in sample.meta or "cls" in sample.meta:
        found = str(sample.meta.get("label", sample.meta.get("cls")))
    else:
        found = sample.key.split("/")[0] if "/" in sample.key else None
    if found is None:
        return None
    if found not in labels:
        raise DataError(f"{sample.key}: class {found!r} is none of the {len(labels)} known ones")
    return list(labels).index(found)


def templates(name: str) -> list[Any]:
    """open_clip's 80 ("openai") or 7 ("simple") of ImageNet, "plain" (a photo of a {}.), or lines of a file with {}."""
    import open_clip

    if name == "openai":
        return list(open_clip.OPENAI_IMAGENET_TEMPLATES)
    if name == "simple":
        return list(open_clip.SIMPLE_IMAGENET_TEMPLATES)
    if name == "plain":
        return ["a photo of a {}"]
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"--templates {name}: expected {', '.join(TEMPLATES)} or a file with lines such as a photo of a {{}}"
        )
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines or any("{}" not in line for line in lines):
        raise UserError(f"--templates {name}: every line must hold {{}} where the class name goes")
    return lines


# ---- Measures


@torch.no_grad()
def labelled_features(
    model: ClipModel, source: Any, classes: Classes, limit: int | None = None, batch_size: int = 32
) -> tuple[Tensor, Tensor]:
    """Unit features [B, D] and classes [B] of the samples that have one.

    Raises:
        DataError: none has.
    """
    features, labels = [], []
    count = len(source) if limit is None else min(limit, len(source))
    for batch in sample_batches(source, count, batch_size, f"features of {model.name}"):
        known = [(sample, label_of(sample, classes.labels)) for sample in batch]
        known = [(sample, label) for sample, label in known if label is not None]
        if known:
            features.append(model.image_features([sample.image for sample, _ in known]).cpu())
            labels += [label for _, label in known]
    if not labels:
        raise DataError(f"none of the {count} samples of {source.name} has a class")
    return torch.cat(features), torch.tensor(labels)


def classifier(model: ClipModel, names: Sequence[str], forms: Sequence[Any]) -> Tensor:
    """Weights [D, C]: each class the mean of the unit features of its wordings, by open_clip's own code."""
    import open_clip

    weights = open_clip.build_zero_shot_classifier(
        model.network, model.tokenize, list(names), list(forms), 10, model.device
    )
    return weights.float().cpu()


def classify(features_BD: Tensor, labels_B: Tensor, weights_DC: Tensor) -> list[Metric]:
    """Top 1 and top 5 (of fewer classes: as many as there are)."""
    logits_BC = features_BD @ weights_DC
    own_B1 = logits_BC.gather(1, labels_B[:, None])
    # Equal scores count against the model, so that features that say nothing score nothing.
    ranks_B = (logits_BC >= own_B1).sum(1) - 1
    return [share(f"top{k}", [bool(rank < k) for rank in ranks_B]) for k in (1, 5)]


@torch.no_grad()
def retrieve(
    model: ClipModel, source: Any, limit: int | None = None, batch_size: int = 32, captions_per_image: int = 5
) -> list[Metric]:
    """Recall at 1, 5 and 10 from images to captions and back (Flickr30k and COCO: five captions an image).

    An image has found a caption when any of its own is among the first k; equal scores count against the model.
    """
    count = len(source) if limit is None else min(limit, len(source))
    features, texts, owners = [], [], []
    images = 0
    for batch in sample_batches(source, count, batch_size, f"retrieval by {model.name}"):
        told = [sample for sample in batch if sample.captions]
        if told:
            features.append(model.image_features([sample.image for sample in told]).cpu())
        for sample in told:
            own = list(dict.fromkeys(sample.captions))[:captions_per_image]
            texts += own
            owners += [images] * len(own)
            images += 1
    if not texts:
        raise DataError(f"none of the {count} samples of {source.name} has a caption; retrieval needs them")
    words = [
        model.text_features([texts[row] for row in rows]).cpu()
        for rows in progress(batches(len(texts), 256), "captions")
    ]
    return recalls(torch.cat(features) @ torch.cat(words).T, torch.tensor(owners))


def recalls(scores_IT: Tensor, owners_T: Tensor) -> list[Metric]:
    """Recall at 1, 5 and 10 in both directions, from scores and the image that each text belongs to."""
    own_IT = owners_T[None, :] == torch.arange(len(scores_IT))[:, None]
    best_I1 = scores_IT.masked_fill(~own_IT, -torch.inf).amax(1, keepdim=True)
    image_ranks = ((scores_IT >= best_I1) & ~own_IT).sum(1)
    own_scores_T = scores_IT[owners_T, torch.arange(scores_IT.shape[1])]
    text_ranks = (scores_IT >= own_scores_T).sum(0) - 1
    return [
        share(f"{direction}_recall{k}", [bool(rank < k) for rank in ranks])
        for direction, ranks in (("image_to_text", image_ranks), ("text_to_image", text_ranks))
        for k in (1, 5, 10)
    ]


def linear_probe(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], c: float = PROBE_C, seed: int = 0
) -> list[Metric]:
    """Accuracy of a logistic regression (scikit-learn, L-BFGS, inverse strength `c`, 1000 steps) on unit features.

    Raises:
        DataError: the training samples are of one class only.
    """
    from sklearn.linear_model import LogisticRegression

    if len(train[1].unique()) < 2:
        raise DataError("the probe's training samples are of one class; give a --probe-train with more")
    rule = LogisticRegression(C=c, max_iter=1000, random_state=seed)
    rule.fit(train[0].double().numpy(), train[1].numpy())
    found: np.ndarray = rule.predict(test[0].double().numpy())
    return [share("probe_top1", [bool(one) for one in found == test[1].numpy()])]
