"""Conversations without an image, as LLaVA's instruction mix has them: read, counted, encoded, learnt in stage two."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from equal_runs import differences
from ranks import run_ranks
from stages import GLOBAL_BATCH, plain_steps, run_stage, task_of, write_configs
from test_mllm_sequence import LetterTokenizer, letters, unlearnt
from tiny import BOS, EOS, mllm_config

from unitok.cli import main
from unitok.core.errors import DataError
from unitok.core.sampling import SampleOrder
from unitok.data.check import check_source
from unitok.data.codes import CodeSource
from unitok.data.conversations import Turn, import_llava
from unitok.data.source import open_source
from unitok.mllm.mixture import has_words
from unitok.mllm.sequence import SequenceBuilder
from unitok.tokenizer import UniTok
from unitok.tokenizer.extract import Share, extract_codes

IMAGES, TALKS = 16, 8
CHAT = "data.mixture={text_to_image: 0, caption: 0, chat: 1}"


def turns(*texts: str, first: str = "human") -> list[dict[str, str]]:
    roles = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": roles[number % 2], "value": text} for number, text in enumerate(texts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations, `llava.json` with every third record text-only, the same as JSON lines, and their codes."""
    path = tmp_path_factory.mktemp("text_only")
    write_configs(path)
    scenes = open_source(f"shapes:val?num={IMAGES}&seed=4&size=32")
    (path / "images").mkdir()
    records: list[dict[str, Any]] = []
    for number in range(IMAGES):
        scenes[number].image.save(path / "images" / f"{number}.png")
        talk = turns("<image>\nWhat is this?", scenes.texts(number)[0])
        records.append({"id": f"image {number}", "image": f"{number}.png", "conversations": talk})
        if number % 2:
            records.append({"id": f"talk {number}", "conversations": turns("red or blue?", "red", "and now?", "blue")})
    records[2]["conversations"] = turns("left over", "a?", "b", first="gpt")  # a piece of a longer one
    records[5]["image"] = None
    (path / "llava.json").write_text(json.dumps(records))
    (path / "lines.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    (path / "only.jsonl").write_text("\n".join(json.dumps(record) for record in records if not record.get("image")))
    tokenizer = UniTok.from_pretrained(path / "visual")
    for name, spec, latents in (("mix", "llava.json", False), ("latents", "llava.json", True)):
        source = open_source(f"{path}/{spec}?images={path}/images")
        extract_codes(tokenizer, source, path / name, 3, progress=False, latents=latents)
    extract_codes(tokenizer, open_source(path / "only.jsonl", text_only=True), path / "only", progress=False)
    return path


# ---- sources


@pytest.mark.parametrize("name", ["llava.json", "lines.jsonl"])
def test_they_stand_behind_the_images(folder: Path, name: str) -> None:
    """Training on images does not see them; keys and places are those of the file."""
    source = open_source(f"{folder}/{name}?images={folder}/images")
    assert (len(source), source.num_text_only) == (IMAGES, TALKS)
    assert [source[n].key for n in range(IMAGES)] == [f"image {n}" for n in range(IMAGES)]
    assert [source.key(IMAGES + n) for n in range(TALKS)] == [f"talk {1 + 2 * n}" for n in range(TALKS)]
    assert source.place(IMAGES + 1).endswith("record 5") and source.place(2).endswith("record 3")
    asked = [Turn("user", "red or blue?"), Turn("assistant", "red")]
    asked += [Turn("user", "and now?"), Turn("assistant", "blue")]
    assert source.read_words(IMAGES + 1).conversations == [asked]
    assert source.read_words(IMAGES).conversations == [[Turn("user", "a?"), Turn("assistant", "b")]]
    with pytest.raises(IndexError):
        source[IMAGES]


def test_a_check_counts_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = f"{folder}/llava.json?images={folder}/images"
    report = check_source(spec)
    assert report.num_samples == report.num_conversations == IMAGES + TALKS
    assert (report.num_text_only, report.num_bad) == (TALKS, 0)
    assert check_source(spec, limit=IMAGES + 2).num_text_only == 2
    assert main(["data", "check", f"mix:{spec};{folder}/only.jsonl"]) == 2  # it could not be trained on as a mixture
    assert main(["data", "check", spec]) == main(["data", "check", f"{folder}/only.jsonl"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split() for line in out if line.startswith("num_text_only")] == [["num_text_only", str(TALKS)]] * 2


def test_what_is_wrong_with_them_is_told(tmp_path: Path) -> None:
    wrong = [
        ({"conversations": turns("<image> a", "b")}, "1 x <image> in the turns and 0 images", "conversation"),
        ({"conversations": turns("a", "b", "c")}, "ending with assistant", "conversation"),
        ({"conversations": turns("a", first="gpt")}, "roles are", "conversation"),
        ({"conversations": turns("a", "b"), "caption": "c"}, "no image, but captions", "missing image"),
        ({"caption": "c"}, "no image path", "missing image"),
        ({"meta": [{"image": None}], "conversations": turns("a", "b")}, "", ""),
    ]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps(record) for record, _, _ in wrong))
    source = open_source(path, max_bad_fraction=1.0)
    assert (len(source), source.num_text_only) == (1, 5)
    report = check_source(str(path))
    assert report.bad_kinds == {"conversation": 3, "missing image": 2} and report.num_text_only == 1
    for number, (_, message, _) in enumerate(wrong):
        reasons = [reason for place, reason in report.bad if place.endswith(f"record {number}")]
        assert len(reasons) == bool(message) and all(message in reason for reason in reasons), number


def test_images_are_asked_for_where_images_are_learnt(folder: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(DataError, match=f"{TALKS} conversations and no image; only stage two"):
        open_source(folder / "only.jsonl")
    run = ["train", "tokenizer", "--config", str(folder / "tokenizer.yaml"), f"output_dir={tmp_path}"]
    assert main([*run, f"data.source={folder}/only.jsonl"]) == 2
    assert "conversations and no image" in capsys.readouterr().err.splitlines()[-1]


def test_an_import_keeps_them(folder: Path, tmp_path: Path) -> None:
    path, kept, dropped = import_llava(folder / "llava.json", folder / "images", tmp_path)
    source = open_source(path)
    assert (kept, dropped, len(source), source.num_text_only) == (IMAGES + TALKS, 0, IMAGES, TALKS)
    assert source.read_words(IMAGES).conversations == [[Turn("user", "a?"), Turn("assistant", "b")]]


# ---- codes


def test_extraction_keeps_them(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any number of processes, of workers and images a unit: the same samples, and the same bytes for equal units."""
    spec, tokenizer = f"{folder}/llava.json?images={folder}/images", UniTok.from_pretrained(folder / "visual")
    header = json.loads((folder / "mix" / "header.json").read_text())
    assert (header["count"], header["text_only"], header["failed"]) == (IMAGES + TALKS, TALKS, 0)
    for rank in (1, 0):
        options = {"share": Share(rank, 2), "unit_size": 10, "num_workers": rank}
        extract_codes(tokenizer, open_source(spec), tmp_path / "two", 4, False, **options)
    ours, other = CodeSource(folder / "mix"), CodeSource(tmp_path / "two")
    assert other.header["shards"] == 3 and other.header["text_only"] == ours.header["text_only"] == TALKS
    for index in range(len(ours)):
        sample = ours[index]
        assert (sample.key, sample.conversations) == (other[index].key, other[index].conversations)
        assert torch.equal(sample.codes, other[index].codes)
        assert sample.has_image == other.text(index).has_image == (index < IMAGES) == bool(sample.codes.numel())
        assert has_words(sample, "chat") and not has_words(sample, "caption")
    assert "npy" not in ours.reader[IMAGES] and json.loads(ours.reader[IMAGES]["json"])["image"] is False
    command = ["data", "codes", "--tokenizer", str(folder / "visual"), "--shards", spec, "--out", str(tmp_path / "cli")]
    assert main(command) == 0
    assert f"{IMAGES} images encoded to {tmp_path / 'cli'}, {TALKS} conversations" in capsys.readouterr().out
    assert (tmp_path / "cli" / "codes-00000.tar").read_bytes() == (folder / "mix" / "codes-00000.tar").read_bytes()
    mixture = open_source(f"mix:{spec};{folder}/lines.jsonl?images={folder}/images")
    assert (len(mixture), mixture.num_text_only) == (2 * IMAGES, 2 * TALKS)
    keys = [mixture.key(len(mixture) + n) for n in range(2 * TALKS)]
    assert keys == 2 * [f"talk {1 + 2 * n}" for n in range(TALKS)]


def test_a_lost_image_is_no_text_only_sample(folder: Path) -> None:
    """Only the file's own word makes one: codes that are missing are bad as ever."""
    source = CodeSource(folder / "mix", max_bad_fraction=1.0)
    read = source.reader.read
    source.reader.read = lambda index, names: {n: d for n, d in read(index, names).items() if n == "json"}
    with pytest.raises(DataError, match="codes of image 0 cannot be read"):
        source[0]
    assert source[IMAGES].conversations


# ---- learnt


def test_answers_alone_are_learnt(folder: Path) -> None:
    texts = {"system_prompt": "S", "user_prefix": "U:", "assistant_prefix": "A:"}
    build = SequenceBuilder(mllm_config(**texts), LetterTokenizer(), 200, 100)
    sequence = build.chat(CodeSource(folder / "mix")[IMAGES + 1].conversations[0])
    first, second = [BOS, *letters("SU:red or blue?A:")], letters("U:and now?A:")
    assert sequence.ids == [*first, *letters("red"), EOS, *second, *letters("blue"), EOS]
    assert sequence.labels == [*unlearnt(first), *letters("red"), EOS, *unlearnt(second), *letters("blue"), EOS]
    assert sequence.learn_image == [] and not sequence.is_cut


@pytest.mark.parametrize("recipe", ["sft", "llava_sft"])
def test_they_train_beside_images(folder: Path, tmp_path: Path, recipe: str) -> None:
    """Two steps, packed as alone; the log counts them, and members of a mixture count theirs."""
    spec = f"mix:1={folder}/mix;1={folder}/codes;1={folder}/only"
    shares = CHAT if recipe == "llava_sft" else "data.mixture={text_to_image: 1, caption: 0, chat: 1}"
    options = [f"data.codes={spec}", shares, f"recipe={recipe}", "data.max_bad_fraction=0"]
    task = task_of(folder, tmp_path / "0", *options)
    task.build()
    only = task.load_batch([task.num_samples - 1, task.num_samples - 2], 0)
    assert only["codes"].shape == (0, 3, 4) and not len(only["learn_image"]) and (only["labels"] != -100).sum() > 4
    assert "red or blue?" in " ".join(task._words())
    expected = sum(
        not source[number].has_image for source, number in (task.source.turn(index, 0) for index in range(48))
    )
    logs = []
    for pack in ("false", "true"):
        model, log = plain_steps(task_of(folder, tmp_path / pack, *options, f"data.pack={pack}"), size=24)
        logs.append((log, torch.cat([p.flatten() for p in model.parameters()]).detach()))
        assert sum(record["samples_text_only"] for record in log) == expected > 0
        assert all(record["samples_chat"] >= record["samples_text_only"] for record in log)
        assert all(sum(n for name, n in record.items() if name.startswith("samples/")) == 24 for record in log)
        assert all(record["text"] > 0 and record["samples_cut"] == 0 for record in log)
    for packed, alone in zip(logs[1][0], logs[0][0], strict=True):
        assert packed == pytest.approx(alone, rel=1e-5, abs=1e-6)
    assert (logs[1][1] - logs[0][1]).norm() <= 1e-5 * logs[0][1].norm()


def test_they_train_models_that_read_latents(folder: Path, tmp_path: Path) -> None:
    options = [f"data.codes={folder / 'latents'}", CHAT, "recipe=llava_sft", "model.visual_input=continuous"]
    _, log = plain_steps(task_of(folder, tmp_path, *options, "data.pack=true"), size=12)
    assert sum(record["samples_text_only"] for record in log) == TALKS


def test_where_nothing_chats_they_are_bad(folder: Path, tmp_path: Path) -> None:
    task = task_of(folder, tmp_path, f"data.codes={folder / 'only'}", "data.mixture={caption: 1, chat: 0}")
    task.build()
    with pytest.raises(DataError, match="nothing for the tasks of data.mixture"):
        task.load_batch([0], 0)


def halves(folder: Path) -> Callable[[Any], None]:
    """Of every micro-batch one half is text-only, the other has images: in turn the first and the second."""

    def prepare(task: Any) -> None:
        order, size = SampleOrder(task.num_samples, task.config.seed), task.num_samples
        assert size % GLOBAL_BATCH == 0 and size == IMAGES + TALKS

        def load(index: int, epoch: int) -> Any:
            position = next(p for p in range(epoch * size, (epoch + 1) * size) if order.index(p) == index)
            half, turn = position % GLOBAL_BATCH * 2 // GLOBAL_BATCH, position // GLOBAL_BATCH % 2
            return task._read(IMAGES + index % TALKS if half == turn else index % IMAGES, epoch)

        task._load = load

    return prepare


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_ranks_out_of_phase_equal_one_process(folder: Path, tmp_path: Path, zero: int) -> None:
    options = ["steps=4", f"data.codes={folder / 'mix'}", CHAT]
    prepare = halves(folder)
    one = run_ranks(1, run_stage, "mllm", folder / "mllm.yaml", tmp_path / "one", 1, options, None, prepare)[0]
    options.append(f"engine.zero_stage={zero}")
    two = run_ranks(2, run_stage, "mllm", folder / "mllm.yaml", tmp_path / "two", 2, options, None, prepare)[0]
    assert max(differences(two, one).values()) < 1e-4
    assert all(record["samples_text_only"] == GLOBAL_BATCH / 2 for record in two)
