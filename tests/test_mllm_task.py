"""What stage two makes of its code shards, bad samples included."""

import logging
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stages import make_task, write_configs
from tiny import make_mllm

from unitok.core.errors import CheckpointError, ConfigError, DataError
from unitok.core.rng import torch_rng
from unitok.core.same_run import check_same_run
from unitok.data.codes import CodeSource, write_codes
from unitok.data.conversations import IMAGE_MARK, Turn
from unitok.mllm.mixture import has_words, warn_of_missing_words
from unitok.mllm.settings import MixtureConfig
from unitok.mllm.task import MllmTask

WORDLESS, WORDY = 3, 5


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Configurations of the stages, and `codes`: shards with a sample without words and one with very many."""
    folder = tmp_path_factory.mktemp("stages")
    files = write_configs(folder)
    source = CodeSource(folder / "codes")
    samples = [source[index] for index in range(20)]
    samples[WORDLESS].captions, samples[WORDLESS].questions = [], []
    samples[WORDY].captions, samples[WORDY].questions = [], []
    samples[WORDY].conversations = [[Turn("user", f"{IMAGE_MARK} {'what? ' * 3000}"), Turn("assistant", "yes " * 3000)]]
    files["codes"] = write_codes(samples, folder / "uneven", source.header)
    return files


def built(files: dict[str, Path], out: Path, *options: str) -> Any:
    task, _ = make_task("mllm", files["mllm"], out, 1, [f"data.codes={files['codes']}", *options])
    task.build()
    return task


def test_bad_samples_are_left_out_and_named(
    files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The next good one stands in, whatever was read before; the log names sample and reason once."""
    task = built(files, tmp_path / "one", "data.max_bad_fraction=0.1")
    with caplog.at_level(logging.WARNING):
        batches = [task.load_batch(list(range(WORDLESS - 1, WORDY + 2)), epoch) for epoch in (0, 0)]
    text = caplog.text
    assert text.count("nothing for the tasks of data.mixture") == 1 and text.count("data.max_length=2048;") == 1
    assert re.search(r"train-0-000005 is too long: image, question and an id of what is learnt do not fit", text)
    assert set(task.source.bad) == {WORDLESS, WORDY}
    assert [task.places(batch).tolist() for batch in batches] == [[[5, 2]], [[5, 2]]]
    indices = list(range(WORDLESS - 1, WORDY + 2))
    read = [f"train-0-{number:06d}" for number in (2, 4, 4, 6, 6)]  # not what was drawn: two stand in
    assert task.batch_keys(batches[0], indices, 0) == read != task.sample_keys(indices, 0)
    fresh = built(files, tmp_path / "two", "data.max_bad_fraction=0.1")
    batches.append(fresh.load_batch(list(range(WORDLESS - 1, WORDY + 2)), 0))
    for batch in batches[1:]:
        assert batch.pop("keys") == read
        assert all(torch.equal(batch[name], batches[0][name]) for name in batch)
    alone = fresh.load_batch([WORDLESS + 1], 0)["input_ids"][0]
    for row in (1, 2):  # the sample without words has become the one after it
        assert torch.equal(batches[0]["input_ids"][row][: len(alone)], alone)


def test_too_many_bad_samples_end_the_run(files: dict[str, Path], tmp_path: Path) -> None:
    task = built(files, tmp_path)
    with pytest.raises(
        DataError, match=r"1 of 20 samples are bad, more than max_bad_fraction=0.01; .*caption, question"
    ):
        task.load_batch([WORDLESS], 0)


def test_a_sample_may_lack_what_one_task_needs(files: dict[str, Path], tmp_path: Path) -> None:
    """Without captions it still chats: no share of the mixture is lost to an error."""
    task = built(files, tmp_path, "data.max_length=100000", "data.max_bad_fraction=0")
    for epoch in range(5):
        assert (task.load_batch([WORDY], epoch)["labels"] != -100).sum() > 3000
    assert not task.source.bad


def test_detailed_captions_are_drawn_more_often(files: dict[str, Path], tmp_path: Path) -> None:
    """In proportion to their number of words to the power `caption_detail`; alike at 0."""
    sample = CodeSource(files["codes"])[0]
    sample.captions = ["a circle", "a big red circle"]
    for detail, share in ((0, 0.5), (2, 0.8)):
        options = ["data.mixture={text_to_image: 1, caption: 0, chat: 0}", f"data.caption_detail={detail}"]
        task = built(files, tmp_path / str(detail), *options, "data.unconditional=0")
        lengths = [len(task._sequence(sample, 0, epoch)[1].ids) for epoch in range(600)]
        assert len(set(lengths)) == 2
        assert abs(lengths.count(max(lengths)) / 600 - share) < 0.07


def test_a_finished_run_may_be_exported_with_another_sampler(files: dict[str, Path], tmp_path: Path) -> None:
    """It trained nothing; what did is refused where no step is left."""
    saved, other, trained = (
        make_task("mllm", files["mllm"], tmp_path, 1, options)[1].model_dump(mode="json")
        for options in ([], ["sampler.temperature=0.3", "sampler.guidance_scale=2"], ["data.code_noise=0.5"])
    )
    counts = {"global_micro_batch": 4, "num_samples": 20, "step": saved["steps"]}
    same = partial(check_same_run, tmp_path, {"config": saved, **counts}, incidental=MllmTask.incidental)
    same({"config": other, **counts})
    with pytest.raises(CheckpointError, match="no step is left .*data.code_noise"):
        same({"config": trained, **counts})


def test_noise_is_read_and_never_learnt(files: dict[str, Path], tmp_path: Path) -> None:
    """Whole positions of pictures to draw, at most the share that is set, other ones each epoch, again the same."""
    task = built(files, tmp_path / "one", "data.code_noise=0.5", "data.max_bad_fraction=0.1")
    plain = built(files, tmp_path / "two", "data.max_bad_fraction=0.1")
    shares = []
    for epoch in range(3):
        batch, without = (one.load_batch(list(range(6, 20)), epoch) for one in (task, plain))
        assert "input_codes" not in without
        assert batch["keys"] == without.pop("keys")
        assert all(torch.equal(batch[name], without[name]) for name in without)
        again = task.load_batch(list(range(6, 20)), epoch)["input_codes"]
        assert torch.equal(batch["input_codes"], again)
        changed_IL = (batch["input_codes"] != batch["codes"]).any(dim=1)
        assert (
            not changed_IL[~batch["learn_image"]].any()
            and batch["input_codes"].max() < task.visual.config.codebook_size
        )
        shares.append(changed_IL[batch["learn_image"]].float().mean(dim=1))
    share = torch.cat(shares)
    assert 0.1 < share.mean() < 0.4 and share.std() > 0.05


def test_the_loss_reads_one_code_and_predicts_the_other(files: dict[str, Path], tmp_path: Path) -> None:
    """Read codes count up to the last position but one, learnt ones everywhere."""
    model = make_mllm()
    config = model.config
    ids = torch.tensor([[7, config.begin_image_id, *[config.image_token_id] * config.num_image_positions]])
    shape = (1, config.num_codebooks, config.num_image_positions)
    codes, other = (torch.randint(config.codebook_size, shape, generator=torch_rng("codes", n)) for n in (0, 1))
    given = {"input_ids": ids, "labels": torch.full_like(ids, -100), "attention_mask": torch.ones_like(ids)}
    given["learn_image"] = torch.ones(1, dtype=torch.bool)
    loss = lambda read, learnt: float(model.losses(codes=learnt, input_codes=read, **given).image.detach())  # noqa: E731
    assert loss(codes, codes) == loss(None, codes) != loss(other, codes) != loss(other, other)
    last = codes.clone()
    last[..., -1] = other[..., -1]
    assert loss(last, codes) == pytest.approx(loss(codes, codes), rel=1e-6)
    first = codes.clone()
    first[..., 0] = other[..., 0]
    assert loss(first, codes) != pytest.approx(loss(codes, codes), rel=1e-6)


def test_answers_of_one_question_are_captions_to_align_with(files: dict[str, Path], tmp_path: Path) -> None:
    """As LLaVA's alignment data are distributed; a caption of its own goes before, and other kinds do not take them."""
    source = CodeSource(files["codes"])
    samples = [source[index] for index in range(6, 10)]
    for sample in samples[:3]:
        asked = [Turn("user", f"what is this?\n{IMAGE_MARK}"), Turn("assistant", "a red circle")]
        sample.captions, sample.questions, sample.conversations = [], [], [asked]
    samples[1].captions = ["a blue square"]
    samples[2].conversations[0] += [Turn("user", "and?"), Turn("assistant", "nothing")]
    codes = write_codes(samples, tmp_path / "llava", source.header)
    mixture = "data.mixture={text_to_image: 0, caption: 0, plain: 1, chat: 0, text: 0}"
    task = built(files, tmp_path / "run", f"data.codes={codes}", "data.max_bad_fraction=0.5", mixture)
    batch = task.load_batch([0, 1], 0)
    learnt = [row[row >= 0] for row in batch["labels"]]
    assert [task.text_tokenizer.decode(ids).strip() for ids in learnt] == ["a red circle", "a blue square"]
    task.load_batch([2], 0)
    assert set(task.source.bad) == {2}, "of a longer conversation no answer is a caption"
    drawn = built(files, tmp_path / "drawn", f"data.codes={codes}", "data.max_bad_fraction=0.9")
    assert not has_words(drawn.source[0], "text_to_image") and has_words(drawn.source[0], "plain")


def test_a_mixture_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="text_to_image, caption, plain, chat and text are all 0"):
        MixtureConfig(text_to_image=0, caption=0, chat=0)


def test_codes_of_another_tokenizer_are_refused_by_the_task(files: dict[str, Path], tmp_path: Path) -> None:
    header = CodeSource(files["codes"]).header | {"tokenizer": "0" * 16}
    samples = [CodeSource(files["codes"])[index] for index in range(2)]
    other = write_codes(samples, tmp_path / "codes", header)
    with pytest.raises((ConfigError, DataError), match="tokenizer of the codes is '0000000000000000'"):
        make_task("mllm", files["mllm"], tmp_path / "out", 1, [f"data.codes={other}"])


def test_kinds_without_words_are_named(caplog):
    class Source:
        parts = property(lambda self: [self])

        def __len__(self):
            return 3

        def first_good(self, index, read):
            return read(index)

        def text(self, index):
            return SimpleNamespace(captions=["a"] if index == 2 else [], questions=[], conversations=[])

    warn_of_missing_words(Source(), MixtureConfig(text_to_image=1, caption=0, chat=2))
    assert [record.getMessage() for record in caplog.records] == [
        "data.mixture.chat=2, but no sample looked at has a question or conversation: others take its place"
    ]
