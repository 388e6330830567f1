"""Class-conditional generation: class folders to class tokens, training, sampling, and gFID."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from test_eval_fidelity import TinyNetwork
from tiny import make_tokenizer
from tiny_runs import TINY_MODEL

from unitok.cli import main
from unitok.core.errors import DataError, UserError
from unitok.data.classes import ClassSource, class_token, read_classes
from unitok.data.source import open_source
from unitok.eval.class_generation import class_jobs, count_classes, gfid_metrics
from unitok.eval.results import read_results
from unitok.mllm.build import BackboneConfig
from unitok.mllm.pipeline import UniTokPipeline

CLASSES = ["n02", "n01", "n03"]  # the file's order counts, not the alphabet's


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model trained for two steps on three classes of images, through the commands."""
    folder = tmp_path_factory.mktemp("classes")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    source = open_source("shapes:train?num=6&size=32")
    for index in range(6):
        path = folder / "images" / CLASSES[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        source[index].image.save(path)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    codes = [
        "--tokenizer",
        str(folder / "tokenizer"),
        "--shards",
        str(folder / "images"),
        "--out",
        str(folder / "codes"),
    ]
    assert main(["data", "codes", *codes]) == 0
    settings = {
        "output_dir": folder / "run", "tokenizer": folder / "tokenizer", "data.codes": folder / "codes",
        "data.classes": folder / "classes.txt", "backbone.class_tokens": 4, "model.unconditional_text": "<class_3>",
    }  # fmt: skip
    small = [*TINY_MODEL, "engine.zero_stage=0", "engine.precision=fp32", "model.depth_num_layers=1", "num_workers=0"]
    given = [f"{name}={value}" for name, value in settings.items()]
    assert main(["train", "mllm", "--config", "configs/mllm/imagenet_class.yaml", *small, *given]) == 0
    return folder


def test_every_image_has_its_class_and_nothing_else(run):
    source = ClassSource(run / "codes", run / "classes.txt")
    for index in range(len(source)):
        sample = source[index]
        assert sample.captions == [class_token(CLASSES.index(sample.key.split("/")[0]))]
        assert sample.captions == source.text(index).captions and not sample.questions


def test_a_class_is_one_id(run):
    pipe = UniTokPipeline.from_pretrained(run / "run" / "export")
    assert count_classes(pipe) == 3, "the fourth stands for no class"
    prompts = [pipe.processor.builder.text_to_image_prompt(class_token(number)) for number in range(3)]
    assert len({len(ids) for ids in prompts}) == 1 and len({tuple(ids) for ids in prompts}) == 3
    assert sum(a != b for a, b in zip(*prompts[:2], strict=True)) == 1
    none = pipe.processor.builder.text_to_image_prompt("", unconditional=True)
    assert sum(a != b for a, b in zip(prompts[0], none, strict=True)) == 1


def command(run, out, *more):
    return main(["eval", "gfid", "--model", str(run / "run" / "export"), "--num", "7", "--out", str(out), *more])


def test_gfid_against_a_folder_and_a_batch(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("unitok.eval.fidelity.load_inception", lambda path, device: TinyNetwork())
    reference, batch = run / "images", tmp_path / "reference.npz"
    files = sorted(reference.rglob("*.png"))
    np.savez(batch, arr_0=np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]))
    out, own = tmp_path / "out", tmp_path / "own.npz"
    figures, references = [], []
    for place in (reference, batch):
        assert command(run, out, "--reference", str(place), "--inception", "tiny", "--npz", str(own)) == 0
        results = read_results(out / "results.json")
        figures.append({row["metric"]: row["value"] for row in results["metrics"]})
        assert results["protocol"]["sampler"]["guidance_scale"] == 1.0 and results["protocol"]["classes"] == 3
        references.append(results["protocol"]["reference"])
    assert references[0] == {"folder": "images", "files": len(files), "sha256": references[0]["sha256"]}
    assert references[1] == {"file": batch.name, "sha256": hashlib.sha256(batch.read_bytes()).hexdigest()}
    assert figures[0] == pytest.approx(figures[1]) and figures[0]["fid"] > 0
    assert results["protocol"]["reference_kind"] == "images" and results["benchmark"] == "class_conditional"
    drawn = sorted((out / "images").glob("*.png"))
    assert [path.name for path in drawn] == [f"{index:06d}.png" for index in range(7)]
    with np.load(own) as file:
        assert all(np.array_equal(a, np.asarray(Image.open(b))) for a, b in zip(file["arr_0"], drawn, strict=True))
    record = json.loads(Image.open(drawn[4]).info["unitok"])
    assert record["prompt"] == "<class_1>"
    assert main(["report", str(out / "results.json")]) == 0
    assert "LlamaGen-XXL on UniTok (published)" in capsys.readouterr().out
    own_figures = gfid_metrics(drawn, out / "images", TinyNetwork())[0]
    assert own_figures[0].value == pytest.approx(0, abs=1e-6), "no distance to itself"


def test_gfid_against_statistics(run, tmp_path):
    """mu and sigma of the same images: the distance is that to the images themselves."""
    from unitok.eval.fidelity import LAYER, Features
    from unitok.eval.t2i_runs import add_files

    files = sorted((run / "images").rglob("*.png"))
    features = Features(TinyNetwork())
    add_files(features, files, 4, "features")
    rows = features.gathered()[LAYER].double().numpy()
    np.savez(
        tmp_path / "s.npz", mu=rows.mean(0), sigma=np.cov(rows, rowvar=False), arr_0=np.zeros((1, 2, 2, 3), "uint8")
    )
    metrics, kind = gfid_metrics(files, tmp_path / "s.npz", TinyNetwork())
    assert kind == "statistics" and [metric.name for metric in metrics] == ["fid", "isc"]
    assert metrics[0].value == pytest.approx(0, abs=1e-6)
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), other=np.zeros(3))
    with pytest.raises(DataError, match="expected mu and sigma, or arr_0"):
        gfid_metrics(files, tmp_path / "other.npz", TinyNetwork())
    (tmp_path / "text.npz").write_text("no npz")
    with pytest.raises(DataError, match="give a folder of images or an .npz"):
        gfid_metrics(files, tmp_path / "text.npz", TinyNetwork())


def test_classes_come_in_turn():
    jobs = class_jobs(2001, 1000, 0)
    tokens = [token for _, token, _ in jobs]
    assert tokens.count("<class_0>") == 3 and tokens.count("<class_999>") == 2 and jobs[-1][0] == "002000.png"
    assert len({seed for *_, seed in jobs}) == 2001


def test_mistakes_are_named(run, tmp_path, capsys):
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    with pytest.raises(DataError, match="holds 3 names, 2 of them different"):
        read_classes(tmp_path / "twice.txt")
    (tmp_path / "other.txt").write_text("n01\nn02\n")
    with pytest.raises(DataError, match="in none of the 2 folders of data.classes"):
        [one for index in range(6) for one in ClassSource(run / "codes", tmp_path / "other.txt")[index].captions]
    from pipelines import make_pipeline

    with pytest.raises(UserError, match="has no class tokens"):
        count_classes(make_pipeline(tmp_path))
    with pytest.raises(ValueError, match="class_tokens=3: only for a new backbone"):
        BackboneConfig(path="somewhere", class_tokens=3)
    assert command(run, tmp_path, "--inception", "x") == 2
    assert "FID needs both" in capsys.readouterr().err
    assert command(run, tmp_path, "--dry-run") == 0
    assert "guided-diffusion" in capsys.readouterr().out
