"""Many prompts into a folder: the same images whatever batches, ranks and interruptions; nothing overwritten."""

import copy
import json
import threading
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import make_pipeline

from unitok.core.errors import UserError
from unitok.mllm import many
from unitok.mllm.many import RECORD, generate_many, image_records, own_share, write_image
from unitok.mllm.pipeline import UniTokPipeline
from unitok.mllm.quantize import quantize_weights

PROMPTS = ["a photo of a red circle", "a photo of two blue squares", "red", "a photo of a circle", "blue"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("many"))


@pytest.fixture(scope="module")
def expected(pipe):
    return [image.tobytes() for image in pipe.generate_images(PROMPTS, seed=3)]


def contents(paths):
    return [Image.open(path).tobytes() for path in paths]


@pytest.mark.parametrize("overlap", [False, True])
def test_images_are_those_of_the_pipeline(pipe, expected, overlap, tmp_path):
    seen, threads = [], set()

    def on_image(index, path):
        assert path.is_file()
        seen.append(index)
        threads.add(threading.current_thread())

    paths = generate_many(pipe, PROMPTS, tmp_path, seed=3, batch_size=2, overlap=overlap, on_image=on_image)
    assert [path.name for path in paths] == [f"{index:05}.png" for index in range(5)]
    assert contents(paths) == expected and seen == list(range(5))
    assert (threading.main_thread() not in threads) == overlap and len(threads) == 1
    assert sorted(tmp_path.iterdir()) == paths, "no temporary file is left"
    record = json.loads(Image.open(paths[2]).info[RECORD])
    assert record["prompt"] == "red" and record["seed"] == 5
    assert record["settings"] == {"guidance_scale": 2.0, "temperature": 0.9, "top_k": 12, "top_p": 0.95}


def test_a_gpu_decodes_beside_on_one_stream(pipe, expected, tmp_path, monkeypatch):
    """With stand-ins for the GPU: torch keeps the memory of each stream apart, and copying pixels on the sampler's
    stream would wait for what is sampled next."""
    made, waited, inside = [], [], []

    class Pixels(torch.Tensor):
        def cpu(self):
            inside.append(len(on_stream))
            return self.as_subclass(torch.Tensor)

    on_stream = []

    @contextmanager
    def entered(stream):
        on_stream.append(stream)
        yield
        on_stream.pop()

    def stream(device):
        made.append(SimpleNamespace(wait_event=waited.append))
        return made[-1]

    model = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    other = SimpleNamespace(
        model=model,
        picture=pipe.picture,
        decode=lambda codes: pipe.decode(codes).as_subclass(Pixels),
        sample_codes=pipe.sample_codes,
        image_sampler=pipe.image_sampler,
    )
    monkeypatch.setattr(many, "image_records", lambda _, prompts, seeds, **__: image_records(pipe, prompts, seeds))
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    event = SimpleNamespace(record_event=lambda: "sampled")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: event)
    paths = generate_many(other, PROMPTS, tmp_path, seed=3, batch_size=2)
    assert contents(paths) == expected
    assert len(made) == 1 and waited == ["sampled"] * 3 and inside == [1] * 3


def test_ranks_share_the_work(pipe, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = {}
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        made[rank] = []
        paths = generate_many(
            pipe, PROMPTS, tmp_path, seed=3, on_image=lambda index, _, rank=rank: made[rank].append(index)
        )
    assert made == {1: [1, 3], 0: [0, 2, 4]} and contents(paths) == expected


@pytest.mark.parametrize(
    ("variables", "share"),
    [
        ({"RANK": "1"}, (0, 1)),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3"}, (2, 3)),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3"}, (1, 2)),
        ({"RANK": "3", "WORLD_SIZE": "2"}, None),
    ],
)
def test_the_share_is_what_the_launcher_says(variables, share, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if share is not None:
        assert own_share() == share
        return
    with pytest.raises(UserError, match="rank 3 of 2"):
        own_share()


def test_an_interrupted_run_goes_on(pipe, expected, tmp_path):
    class Stop(Exception):
        pass

    def stop(index, path):
        if index == 2:
            raise Stop

    for overlap in (True, False):
        with pytest.raises(Stop):
            generate_many(pipe, PROMPTS, tmp_path, seed=3, batch_size=2, overlap=overlap, on_image=stop)
        assert len(list(tmp_path.iterdir())) == 3
        (tmp_path / "00002.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    rest = []
    paths = generate_many(pipe, PROMPTS, tmp_path, seed=3, on_image=lambda index, _: rest.append(index))
    assert rest == [2, 3, 4] and contents(paths) == expected
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "00000.png: was made with seed 3, now it is 4"),
        ({"prompts": ["x", *PROMPTS[1:]]}, "00000.png: was made with prompt a photo of a red circle, now it is x"),
        ({"precision": torch.bfloat16}, "was made with precision float32, now it is bfloat16"),
        ({"weights": "int8"}, "was made with weights None, now it is int8"),
        ({"top_k": 5}, r"was made with settings \{'top_k': 12\}, now it is \{'top_k': 5\}"),
    ],
)
def test_what_was_made_in_another_way_is_kept(pipe, changes, message, tmp_path):
    generate_many(pipe, PROMPTS[:1], tmp_path, seed=3)
    options = {"prompts": PROMPTS, "seed": 3} | changes
    prompts = options.pop("prompts")
    if {"precision", "weights"} & options.keys():
        model = copy.deepcopy(pipe.model).to(options.pop("precision", torch.float32))
        if kind := options.pop("weights", None):
            quantize_weights(model, kind)
        pipe = UniTokPipeline(model, pipe.processor, pipe.tokenizer)
    with pytest.raises(UserError, match=message):
        generate_many(pipe, prompts, tmp_path, **options)
    assert len(list(tmp_path.iterdir())) == 1


def test_settings_are_one_number_each_and_names_differ(pipe, tmp_path):
    for changes, message in (
        ({"temperature": [0.3, 0.5]}, r"temperature=\[0.3, 0.5\]: expected one number for all images"),
        ({"top_p": torch.tensor([0.5])}, "top_p=tensor.*: expected one number"),
        ({"top_k": "5"}, "top_k='5': expected one number"),
        ({"top_p": 1.5}, "top_p=1.5: expected a share"),
        ({"names": ["one.png"]}, "1 different names for 2 prompts"),
        ({"names": ["one.png", "one.png"]}, "1 different names for 2 prompts"),
    ):
        with pytest.raises(UserError, match=message):
            generate_many(pipe, PROMPTS[:2], tmp_path, **changes)
    options = {"temperature": np.float32(0.5), "top_k": np.int64(3), "do_sample": np.bool_(True)}
    (path,) = generate_many(pipe, PROMPTS[:1], tmp_path, **options)
    generate_many(pipe, PROMPTS[:1], tmp_path / "released", embedder_cache="released")  # no number, but a setting too
    record = json.loads(Image.open(path).info[RECORD])
    assert record["settings"] == pipe.image_sampler | {"temperature": 0.5, "top_k": 3, "do_sample": True}
    assert record["device"] == "cpu"
    per_image = pipe.generate_images(PROMPTS[:2], temperature=np.array([0.5, 0.9]), seed=1)
    assert per_image[1].tobytes() == pipe.generate_images(PROMPTS[1], seed=2)[0].tobytes()


def test_whether_to_record_graphs_is_passed_on(pipe, tmp_path):
    for draw in (pipe.generate_images, partial(generate_many, pipe, folder=tmp_path)):
        with pytest.raises(UserError, match="graph=True needs a CUDA device"):
            draw(prompts=PROMPTS[:1], graph=True)
        draw(prompts=PROMPTS[:1], graph=False)


def test_another_models_images_and_other_files_are_kept(pipe, tmp_path):
    paths = generate_many(pipe, PROMPTS[:1], tmp_path)
    model = pipe.model
    for weight in (model.depth.head.weight, model.lm_head.weight, model.embedder.mlp[1].weight):
        before = weight.detach().clone()
        with torch.no_grad():
            weight.add_(1e-3)
            try:
                with pytest.raises(UserError, match="was made with model"):
                    generate_many(pipe, PROMPTS, tmp_path)
            finally:
                weight.copy_(before)
    model.config.embedder_cache = "released"
    with pytest.raises(UserError, match="was made with embedder_cache consistent, now it is released"):
        generate_many(pipe, PROMPTS, tmp_path)
    model.config.embedder_cache = "consistent"
    Image.new("RGB", (4, 4)).save(paths[0])
    with pytest.raises(UserError, match="not made by this command"):
        generate_many(pipe, PROMPTS, tmp_path)
    paths[0].write_bytes(b"no image")
    with pytest.raises(UserError, match="no image"):
        generate_many(pipe, PROMPTS, tmp_path)
    with pytest.raises(UserError, match="batch_size=0"):
        generate_many(pipe, PROMPTS, tmp_path, batch_size=0)


def test_a_file_that_fails_to_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "0.png"
    write_image(Image.new("RGB", (4, 4)), path, {"prompt": "old"})

    def fail(self, target, **_):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_image(Image.new("RGB", (4, 4)), path, {"prompt": "new"})
    monkeypatch.undo()
    assert json.loads(Image.open(path).info[RECORD]) == {"prompt": "old"} and list(tmp_path.iterdir()) == [path]
