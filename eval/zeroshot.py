"""Classification of images in class folders: zero-shot by the names of classes, and by a linear probe on features.

The zero-shot classifier is that of CLIP and open_clip: per class the mean of its normalised prompt embeddings,
normalised again; the class of the largest cosine wins. N images, M classes, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unitok.core.errors import DataError, UserError
from unitok.data.captions import with_article
from unitok.data.samples import Picked, Sample
from unitok.data.shapes import COLORS, SHAPES, Scene
from unitok.eval.image_text import BATCH_OF_TEXTS, ImageText
from unitok.eval.progress import batches, progress, sample_batches

Template = Callable[[str], str]


def imagenet_names() -> list[str]:
    """open_clip's 1000 class names, in the order of the sorted WordNet ids."""
    import open_clip

    return list(open_clip.IMAGENET_CLASSNAMES)


def load_templates(name: str) -> list[Template]:
    """ "imagenet" (CLIP's 80), "simple" (its 7), "photo" ("a photo of a CLASS", as the shapes world's captions say it),
    or a file with one prompt a line, `{}` standing for the class."""
    import open_clip

    if name == "photo":
        return [lambda text: f"a photo of {with_article(text)}"]

    if name == "imagenet":
        return list(open_clip.OPENAI_IMAGENET_TEMPLATES)
    if name == "simple":
        return list(open_clip.SIMPLE_IMAGENET_TEMPLATES)
    lines = _lines(Path(name), "prompt")
    if wrong := [line for line in lines if line.count("{}") != 1]:
        raise UserError(f"{name}: {wrong[0]!r} has no place for the class; expected one {{}} a line")
    return [lambda text, line=line: line.replace("{}", text) for line in lines]


def load_names(folders: Sequence[str], file: str | None) -> list[str]:
    """The name of every class folder (sorted): of `file`, one a line; ImageNet's where there are 1000 WordNet ids;
    else the folders' own with spaces for underscores."""
    if file is not None:
        names = _lines(Path(file), "class name")
        if len(names) != len(folders):
            raise UserError(f"{file} holds {len(names)} names, the data {len(folders)} class folders; expected as many")
        return names
    known = imagenet_names()
    if len(folders) == len(known) and all(folder[:1] == "n" and folder[1:].isdecimal() for folder in folders):
        return known
    return [folder.replace("_", " ") for folder in folders]


def _lines(file: Path, what: str) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({type(error).__name__}); expected one {what} a line") from None
    if not lines:
        raise UserError(f"{file} is empty; expected one {what} a line")
    return lines


class SceneClasses(Picked):
    """The scenes with one object of a source of the shapes world, keys as in class folders: red_circle/NAME.

    All combinations of colour and shape are classes, whether or not a scene of them is there.
    """

    folders = sorted(f"{color}_{shape}" for color in COLORS for shape in SHAPES)

    def __init__(self, source: Any, classes: Mapping[int, str]) -> None:
        super().__init__(source, list(classes))
        self.name, self._classes = source.name, list(classes.values())

    def key(self, index: int) -> str:
        return f"{self._classes[index]}/{self.source.key(self.indices[index])}"

    def __getitem__(self, index: int) -> Sample:
        return replace(super().__getitem__(index), key=self.key(index))


def by_class(source: Any) -> Any:
    """A source whose keys are CLASS/NAME: itself, or, where its samples are scenes, `SceneClasses`.

    Raises:
        DataError: no scene has a single object.
    """
    if not len(source) or not isinstance(source.words(0).meta.get("scene"), Scene):
        return source
    classes = {}
    for index in range(len(source)):
        objects = source.words(index).meta["scene"].objects
        if len(objects) == 1:
            classes[index] = f"{objects[0].color}_{objects[0].kind}"
    if not classes:
        raise DataError(f"{source.name}: none of the {len(source)} scenes has a single object; give more images")
    return SceneClasses(source, classes)


def class_folders(source: Any) -> list[str]:
    """The sorted class folders of a source whose keys are CLASS/NAME; DataError where they are not."""
    if isinstance(source, SceneClasses):
        return source.folders
    folders = {_folder(source.key(index)) for index in range(len(source))}
    if "" in folders or len(folders) < 2:
        raise DataError(f"{source.name}: expected images in at least two folders named by class (CLASS/NAME.jpg)")
    return sorted(folders)


def _folder(key: str) -> str:
    return key.partition("/")[0] if "/" in key else ""


def image_features(
    model: ImageText, source: Any, folders: Sequence[str], limit: int | None, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Features `[N, D]` and classes `[N]` of the first `limit` images, taken in turn from the classes."""
    at = {folder: index for index, folder in enumerate(folders)}
    part = _in_turn(source, limit)
    features, labels = [], []
    for samples in sample_batches(part, len(part), batch_size, "image features"):
        unknown = {_folder(sample.key) for sample in samples} - set(at)
        if unknown:
            raise DataError(f"{source.name}: class folder {min(unknown)!r} is not among those of the other data")
        features.append(model.images([sample.image for sample in samples]))
        labels += [at[_folder(sample.key)] for sample in samples]
    if not labels:
        raise DataError(f"{source.name} has no readable image")
    return torch.cat(features), torch.tensor(labels)


def _in_turn(source: Any, limit: int | None) -> Picked:
    """A source in an order in which every class comes once before any comes again, so that a limit leaves none out."""
    seen: dict[str, int] = {}
    order = []
    for index in range(len(source)):
        folder = _folder(source.key(index))
        order.append((seen.get(folder, 0), index))
        seen[folder] = seen.get(folder, 0) + 1
    return Picked(source, [index for _, index in sorted(order)][:limit])


def classifier(model: ImageText, names: Sequence[str], templates: Sequence[Template]) -> Tensor:
    """Unit vectors `[M, D]`, one for each class."""
    rows = []
    for name in progress(list(names), "classes"):
        prompts = [template(name) for template in templates]
        found = [model.texts([prompts[row] for row in rows_]) for rows_ in batches(len(prompts), BATCH_OF_TEXTS)]
        rows.append(F.normalize(torch.cat(found).mean(0), dim=-1))
    return torch.stack(rows)


def accuracies(scores_NM: Tensor, labels_N: Tensor) -> dict[str, float]:
    """{"top1", "top1_se", "top5", "top5_se"}; of equal scores the own class counts as the last."""
    own_N1 = scores_NM.gather(1, labels_N[:, None])
    ranks_N = (scores_NM >= own_N1).sum(1) - 1
    out: dict[str, float] = {}
    for count in (1, 5):
        share = (ranks_N < count).double().mean().item()
        out |= {f"top{count}": share, f"top{count}_se": (share * (1 - share) / len(labels_N)) ** 0.5}
    return out


def linear_probe(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], strength: float, seed: int
) -> dict[str, float]:
    """{"linear_probe", "linear_probe_se"}: accuracy on `val` of scikit-learn's logistic regression (L-BFGS, at most
    1000 rounds) fitted to `train`.

    strength: its C, the inverse of the penalty. Features are unit vectors.
    """
    from sklearn.linear_model import LogisticRegression

    if len(train[1].unique()) < 2:
        raise DataError("the training images of the linear probe are of one class; expected at least two")
    model = LogisticRegression(C=strength, max_iter=1000, random_state=seed)
    model.fit(train[0].numpy(), train[1].numpy())
    share = float(model.score(val[0].numpy(), val[1].numpy()))
    return {"linear_probe": share, "linear_probe_se": (share * (1 - share) / len(val[1])) ** 0.5}
