"""The pipeline over an export folder: pictures by seed, conversations, the command line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import ask, make_pipeline, picture, same

from unitok.cli import main as cli
from unitok.commands.chat import Conversation, converse
from unitok.core.errors import UserError
from unitok.mllm.pipeline import UniTokPipeline, seeds_of

SMALL = Path(__file__).parent.parent / "assets" / "shapes-mini"
PROMPTS = ["a photo of a red circle", "a photo of two blue squares", "red"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def export(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(export):
    return UniTokPipeline.from_pretrained(export, device="cpu")


# ---- pictures


def test_pictures_depend_on_prompt_and_seed_alone(pipe):
    images = pipe.generate_images(PROMPTS, seed=4)
    assert [image.size for image in images] == [(32, 32)] * 3
    assert all(same(*pair) for pair in zip(images, pipe.generate_images(PROMPTS, seed=4), strict=True))
    in_twos = pipe.generate_images(PROMPTS, seed=4, batch_size=2)
    assert all(same(*pair) for pair in zip(images, in_twos, strict=True))
    assert same(pipe.generate_images(PROMPTS[1], seed=5)[0], images[1]), "image i of a batch has seed + i"
    assert same(pipe.generate_images(PROMPTS[::-1], seed=[6, 5, 4])[2], images[0])
    assert not same(pipe.generate_images(PROMPTS[0], seed=9)[0], images[0], 1)
    assert not same(pipe.generate_images(["two"], seed=4)[0], images[0], 1)


def test_pictures_of_the_small_model_are_the_same_alone_and_in_a_batch():
    """Its decoder rounds a batch in another way than one image, which showed in the pixels."""
    small = UniTokPipeline.from_pretrained(SMALL)
    prompts = [f"a photo of a {color} {shape}" for color in ("red", "blue", "green") for shape in ("circle", "square")]
    together = small.generate_images(prompts, seed=3)
    for index, image in enumerate(together):
        assert same(small.generate_images(prompts[index], seed=3 + index)[0], image)


def test_the_exports_sampler_is_the_default(pipe):
    assert pipe.image_sampler == {"guidance_scale": 2.0, "temperature": 0.9, "top_k": 12, "top_p": 0.95}
    images = pipe.generate_images(PROMPTS, seed=1)
    explicit = pipe.generate_images(PROMPTS, seed=1, **pipe.image_sampler)
    assert all(same(*pair) for pair in zip(images, explicit, strict=True))
    unguided = pipe.generate_images(PROMPTS, seed=1, guidance_scale=1.0)
    assert not all(same(*pair) for pair in zip(images, unguided, strict=True))


def test_the_exports_sampler_survives_saving_again(pipe, tmp_path):
    """transformers drops what it does not know from generation_config.json."""
    pipe.save_pretrained(tmp_path)
    assert UniTokPipeline.from_pretrained(tmp_path, device="cpu").image_sampler == pipe.image_sampler


def test_a_loaded_pipeline_draws_and_answers_as_the_one_that_was_saved(made, pipe):
    for one, other in zip(made.generate_images(PROMPTS, seed=2), pipe.generate_images(PROMPTS, seed=2), strict=True):
        assert same(one, other)
    question = ask("what color is the circle?")
    assert made.chat(question, max_new_tokens=6) == pipe.chat(question, max_new_tokens=6)


def test_the_likeliest_picture_does_not_depend_on_the_seed(pipe, export, tmp_path, capsys):
    one, other = (pipe.generate_images(PROMPTS[:1], seed=seed, do_sample=False)[0] for seed in (1, 2))
    drawn = pipe.generate_images(PROMPTS[:1], seed=1)[0]
    assert same(one, other) and not same(one, drawn, 1)
    command = ["generate", PROMPTS[0], "--model", str(export), "--no-graph", "--out", str(tmp_path / "a.png")]
    assert cli([*command, "--greedy", "--seed", "7"]) == 0
    assert same(Image.open(tmp_path / "a.png"), one, 1)
    for options, message in (
        (["--temperature", "0"], "--temperature 0: must be positive; for the likeliest image give --greedy"),
        (["--greedy", "--depth-temperature", "0.5"], "--depth-temperature 0.5 and --greedy: "),
    ):
        capsys.readouterr()
        assert cli([*command, *options]) == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_seeds_are_numbers_of_any_kind(pipe, kind):
    """A tensor or array is one number, or one each; what is no whole number is refused."""
    assert seeds_of(kind(4), 2, "prompts") == seeds_of(kind([4, 5]), 2, "prompts") == [4, 5]
    ids = torch.tensor([pipe.processor.builder.text_to_image_prompt(PROMPTS[0])] * 2)
    codes = pipe.model.generate_codes(ids, seeds=kind([4, 5]))
    assert torch.equal(codes, pipe.model.generate_codes(ids, seeds=[4, 5]))
    wanted = pipe.chat_batch([ask("what?")] * 2, 4, seed=[4, 5], do_sample=True)
    assert pipe.chat_batch([ask("what?")] * 2, 4, seed=kind([4, 5]), do_sample=True) == wanted
    for wrong in (kind(1.5), kind([0.5, 1.0]), [1, "2"], "12", None, kind([[1, 2]])):
        with pytest.raises(UserError, match="expected a whole number, or a list of one for each of the prompts"):
            seeds_of(wrong, 2, "prompts")


def test_wrong_requests_for_pictures(pipe):
    with pytest.raises(UserError, match="empty prompt"):
        pipe.generate_images(["a circle", " "])
    with pytest.raises(UserError, match="2 seeds for 3 prompts"):
        pipe.generate_images(PROMPTS, seed=[1, 2])
    with pytest.raises(UserError, match="top_p=3"):
        pipe.generate_images(PROMPTS, top_p=3.0)
    with pytest.raises(UserError, match="batch_size=-1"):
        pipe.generate_images(PROMPTS, batch_size=-1)
    assert pipe.generate_images([]) == []


# ---- conversations


def test_answers_in_a_batch_equal_answers_alone(pipe):
    conversations = [
        ask("what color is the circle?"),
        [*ask("red", picture("blue")), {"role": "assistant", "content": "two"}, {"role": "user", "content": "yes"}],
        [{"role": "user", "content": "is there a green triangle?"}],
        ask("two", picture("green"))[:1],
    ]
    together = pipe.chat_batch(conversations, max_new_tokens=6)
    assert together == [pipe.chat(messages, max_new_tokens=6) for messages in conversations]
    assert all(isinstance(answer, str) and "<image>" not in answer for answer in together)


def test_sampled_answers_have_seeds_of_their_own(pipe):
    conversations = [ask("two"), ask("red", picture("blue")), ask("two")]
    drawn = {"max_new_tokens": 8, "do_sample": True, "temperature": 2.0}
    together = pipe.chat_batch(conversations, seed=[5, 6, 7], **drawn)
    assert together == pipe.chat_batch(conversations, seed=5, batch_size=2, **drawn)
    assert together[1] == pipe.chat(conversations[1], seed=6, **drawn) and together[0] != together[2]
    assert "".join(pipe.stream_chat(conversations[1], seed=6, **drawn)) == together[1]
    for options, message in (({"seed": [1]}, "1 seeds for 3"), ({"top_p": 2}, "top_p=2"), ({"batch_size": 0}, "=0")):
        with pytest.raises(UserError, match=message):
            pipe.chat_batch(conversations, **options)
    assert pipe.chat_batch([]) == []


def test_pieces_together_are_the_answer(pipe):
    for conversation in (ask("what color is the circle?"), [{"role": "user", "content": "yes"}]):
        pieces = list(pipe.stream_chat(conversation, max_new_tokens=20))
        assert "".join(pieces) == pipe.chat(conversation, max_new_tokens=20)
        assert len(pieces) > 2
    with pytest.raises(UserError, match="empty question"):
        next(pipe.stream_chat([]))


def count_encoded(pipe, monkeypatch):
    """How many pictures each call of the visual tokenizer encodes."""
    counts, original = [], pipe.tokenizer.encode

    def encode(pixels):
        counts.append(len(pixels))
        return original(pixels)

    monkeypatch.setattr(pipe.tokenizer, "encode", encode)
    return counts


def test_a_picture_is_encoded_once(made, monkeypatch):
    pipe = UniTokPipeline(made.model, made.processor, made.tokenizer, image_cache_size=2)
    counts = count_encoded(pipe, monkeypatch)
    red, blue, green = picture("red"), picture("blue"), picture("green")
    first = pipe.image_codes([red, blue, red])
    assert counts == [2] and torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    again = pipe.image_codes([blue, red.copy()])
    assert counts == [2] and torch.equal(again[0], first[1]) and torch.equal(again[1], first[0])
    pipe.image_codes([green])  # the one unused for longest goes: blue
    pipe.image_codes([red])
    assert counts == [2, 1]
    pipe.image_codes([blue])
    assert counts == [2, 1, 1]
    reference = made.tokenizer.encode(made.processor.pixels([red]))[0]
    assert torch.equal(pipe.image_codes([red])[0], reference)
    many = [picture((shade, 0, 0)) for shade in range(0, 250, 50)]
    assert len(pipe.image_codes(many)) == 5, "more than are kept"
    assert len({codes.numpy().tobytes() for codes in pipe.image_codes([red, blue, green])}) == 3
    assert len(pipe._image_codes) == 2


def test_a_session_answers_as_the_whole_conversation_does_and_feeds_only_what_is_new(pipe, monkeypatch):
    counts, session, messages = count_encoded(pipe, monkeypatch), pipe.new_session(), []
    turns = [("what color is the circle?", [picture("red")]), ("yes", []), ("two", [picture("blue"), picture("red")])]
    for question, images in turns:
        parts = [{"type": "image", "image": image} for image in images]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        expected = pipe.chat(messages, max_new_tokens=6)
        assert session.ask(question, images, max_new_tokens=6) == expected
        messages.append({"role": "assistant", "content": expected})
    assert session.messages == messages
    assert sum(counts) <= 2, "red and blue, whoever asks"
    # No id of a question or a picture is fed twice. Of each answer up to 6 ids are, and again as its text reads: a
    # random model's ids are not those that its text is read as.
    whole = len(pipe._chat_prompts([messages[:-1]], 6)[0].ids)
    assert whole < session.kept.positions_fed <= whole + 3 * 6
    session.reset()
    assert session.messages == [] and session.ask("yes", max_new_tokens=6) == pipe.chat(
        [{"role": "user", "content": "yes"}], max_new_tokens=6
    )


def test_a_session_keeps_its_pictures_when_their_files_change_or_go(pipe, tmp_path):
    file, session, held = tmp_path / "a.png", pipe.new_session(), pipe.new_session()
    picture().save(file)
    assert session.ask("red", [file], max_new_tokens=4) == held.ask("red", [picture()], max_new_tokens=4)
    file.write_bytes(b"something else")
    fed = session.kept.positions_fed
    assert session.ask("two", max_new_tokens=4) == held.ask("two", max_new_tokens=4)
    file.unlink()
    assert session.ask("yes", max_new_tokens=4) == held.ask("yes", max_new_tokens=4)
    assert session.kept.positions_fed == held.kept.positions_fed > fed
    with pytest.raises(UserError, match=r"a\.png"):
        session.ask("red", [file])
    assert len(session.messages) == 6


def test_a_turn_that_cannot_be_asked_is_forgotten_and_one_that_is_left_stays(pipe):
    session = pipe.new_session()
    session.ask("red", [picture()], max_new_tokens=4)
    with pytest.raises(UserError, match="<image>"):
        session.ask("what <image>?")
    with pytest.raises(UserError, match="max_new_tokens"):
        session.ask("two", max_new_tokens=0)
    assert len(session.messages) == 2
    stream = session.stream("two", max_new_tokens=20)
    begun = next(stream)
    stream.close()
    assert session.messages[-1] == {"role": "assistant", "content": begun}
    follow_up = [*session.messages, {"role": "user", "content": [{"type": "text", "text": "yes"}]}]
    assert session.ask("yes", max_new_tokens=6) == pipe.chat(follow_up, max_new_tokens=6)


def test_a_conversation_on_the_terminal(pipe, tmp_path, monkeypatch, capsys):
    """Images in the middle, a new beginning, Ctrl-C within an answer, and one at the prompt."""
    picture("blue").save(tmp_path / "blue.png")
    session = pipe.new_session()
    stream, asked = session.stream, []

    def stopped_after_a_piece(question, images, **options):
        asked.append((question, len(images)))
        for piece in stream(question, images, **options):
            yield piece
            if question == "stop":
                raise KeyboardInterrupt

    def read(prompt=""):
        line = next(lines)
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr(session, "stream", stopped_after_a_piece)
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    blue = f"/image {tmp_path / 'blue.png'}"
    lines = iter(["two", blue, f"{blue}x", "/image", blue, "yes", "stop", "red", KeyboardInterrupt, "never read"])
    assert converse(Conversation(session, [picture()], max_new_tokens=6)) == 0
    assert asked == [("two", 1), ("yes", 2), ("stop", 0), ("red", 0)]
    printed = capsys.readouterr()
    assert printed.err.count("cannot read image") == 1 and printed.err.count("name a file") == 1
    answers = [message["content"] for message in session.messages if message["role"] == "assistant"]
    assert len(answers) == 4 and printed.out == "".join(f"{answer}\n" for answer in [*answers, ""])
    lines = iter(["/reset", "two", KeyboardInterrupt])
    converse(Conversation(session, [picture()], max_new_tokens=6))
    assert asked[-1] == ("two", 0) and len(session.messages) == 2


def test_answer_is_chat_about_one_image_each(pipe):
    images, questions = [picture("red"), picture("blue")], ["what color is the circle?", "two"]
    expected = [pipe.chat(ask(q, i), max_new_tokens=16) for i, q in zip(images, questions, strict=True)]
    assert pipe.answer(images, questions) == pipe.answer(images, questions, batch_size=1) == expected
    with pytest.raises(ValueError):
        pipe.answer(images, questions[:1])


def test_wrong_requests_in_a_chat(pipe):
    for empty in ([], [{"role": "user", "content": "  "}]):
        with pytest.raises(UserError, match="empty question"):
            pipe.chat(empty)
    with pytest.raises(UserError, match="user"):
        pipe.chat([*ask("q"), {"role": "assistant", "content": "r"}])
    with pytest.raises(UserError, match="1 x <image> .* 0 images"):
        pipe.chat([{"role": "user", "content": "what is <image>?"}])


# ---- the command line


def test_many_prompts_go_on_where_they_were_stopped(export, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "images"
    prompts.write_text("a red circle\na blue square\n")
    command = ["generate", "--model", str(export), "--from-file", str(prompts), "--num", "2", "--out", str(out)]
    assert cli(command) == 0
    made = capsys.readouterr().out.split()
    assert len(made) == len(set(made)) == 4 and sorted(out.iterdir()) == sorted(map(Path, made))
    before = {name: Path(name).read_bytes() for name in made}
    Path(made[1]).unlink()
    assert cli(command) == 0
    assert capsys.readouterr().out.split() == [made[1]]
    assert {name: Path(name).read_bytes() for name in made} == before
    assert cli([*command, "--seed", "7"]) == 2
    assert "was made with seed" in capsys.readouterr().err
    assert cli([*command[:-1], str(tmp_path / "one.jpg"), "--num", "1"]) == 2


def test_fewer_bits_on_the_command_line(export, tmp_path):
    out = tmp_path / "a.png"
    assert (
        cli(["generate", "a red circle", "--model", str(export), "--out", str(out), "--weights", "int8", "--no-graph"])
        == 0
    )
    assert Image.open(out).mode == "RGB"
    pipe = UniTokPipeline.from_pretrained(export, dtype=torch.bfloat16)
    assert pipe.model.dtype == torch.bfloat16 and pipe.model.embedder.codebooks.dtype == torch.float32


def test_progress_and_truncated_pixels(pipe, monkeypatch):
    seen = []
    (image,) = pipe.generate_images("a circle", on_position=lambda done, total: seen.append((done, total)))
    length = pipe.model.config.num_image_positions
    assert seen == [(done, length) for done in range(1, length + 1)]
    monkeypatch.setattr(pipe.processor, "truncate_pixels", True)
    (lower,) = pipe.generate_images("a circle")
    gap = np.asarray(image, dtype=int) - np.asarray(lower, dtype=int)
    assert gap.min() == 0 and gap.max() == 1


def test_a_mistyped_command_of_a_chat_is_named(pipe, monkeypatch, capsys):
    lines = iter(["/rest", "/reset", "/image"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines, None) or (_ for _ in ()).throw(EOFError))
    assert converse(Conversation(pipe.new_session(), [], 4)) == 0
    errors = capsys.readouterr().err.splitlines()
    assert ["/rest: no such command" in errors[0], "/image: name a file" in errors[1], len(errors)] == [True, True, 2]
