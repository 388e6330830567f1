"""`unitok generate`, `reconstruct` and conversations: files, what they say about themselves, and refusals."""

import io
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import make_pipeline, picture

from unitok import __version__
from unitok.cli import main
from unitok.commands.chat import Conversation, converse
from unitok.commands.generate import prompts_of
from unitok.core.errors import UserError
from unitok.core.pretrained import load_model_folder
from unitok.data.source import open_source
from unitok.data.transforms import eval_transform
from unitok.mllm.many import fingerprint
from unitok.tokenizer import UniTok

PROMPT = "a photo of a red circle"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("use")
    make_pipeline(folder).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def pipe(model):
    from unitok import UniTokPipeline

    return UniTokPipeline.from_pretrained(model, device="cpu")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture("red").save("red.png")
    picture("blue").save("my blue.png")
    return tmp_path


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


# ---- generate


def test_a_png_says_how_it_was_made(model, pipe, here, capsys):
    assert main(["generate", PROMPT, "two «squares»", "--model", str(model), "--seed", "7", "--guidance", "3"]) == 0
    assert capsys.readouterr().out.split() == ["a_photo_of_a_red_circle.png", "two_squares.png"]
    text = Image.open("two_squares.png").text
    assert text["Description"] == "two «squares»"
    versions = dict(part.split(" ") for part in text["Software"].split(", "))
    assert versions["unitok"] == __version__ and versions["torch"] == torch.__version__
    record = json.loads(text["unitok"])
    assert record == {
        "prompt": "two «squares»",
        "seed": 7,
        "settings": {"guidance_scale": 3.0, "temperature": 0.9, "top_k": 12, "top_p": 0.95},
        "device": "cpu",
        "precision": "float32",
        "weights": None,
        "embedder_cache": "consistent",
        "model": fingerprint(pipe),
    }
    (again,) = pipe.generate_images(record["prompt"], seed=record["seed"], **record["settings"])
    assert np.array_equal(np.asarray(again), pixels("two_squares.png")), "the record is enough to draw it again"


def test_the_hash_knows_the_visual_tokenizer(model, pipe):
    before = fingerprint(pipe)
    weight = next(weight for weight in pipe.tokenizer.decoder.parameters() if weight.dim() == 1)
    weight.add_(1e-3)
    assert fingerprint(pipe) != before
    weight.sub_(1e-3)


def test_seeds_and_grid(model, here, capsys):
    command = ["generate", PROMPT, "two", "--model", str(model), "--seeds", "9,3,-1"]
    assert main([*command, "--out", "images", "--grid", "sheets/grid.png"]) == 0
    printed = capsys.readouterr().out.split()
    names = [f"images/{stem}_seed{seed}.png" for stem in ("a_photo_of_a_red_circle", "two") for seed in (9, 3, -1)]
    assert printed == [*names, "sheets/grid.png"]
    assert main(["generate", PROMPT, "--model", str(model), "--seed", "3", "--out", "alone.png"]) == 0
    assert np.array_equal(pixels("alone.png"), pixels(names[1])), "a seed decides alone"
    grid = pixels("sheets/grid.png")
    assert grid.shape == (32 + 2 + 32, 3 * 32 + 2 * 2, 3), "a row for each prompt"
    for index, name in enumerate(names):
        top, left = index // 3 * 34, index % 3 * 34
        assert np.array_equal(grid[top : top + 32, left : left + 32], pixels(name)), name
    assert (grid[32:34] == 255).all() and (grid[:, 32:34] == 255).all()
    records = json.loads(Image.open("sheets/grid.png").text["unitok"])["images"]
    assert [(record["prompt"], record["seed"]) for record in records] == [
        (prompt, seed) for prompt in (PROMPT, "two") for seed in (9, 3, -1)
    ]


def test_files_that_are_replaced_are_counted(model, here, capsys):
    command = ["generate", PROMPT, "--model", str(model), "--num", "3", "--grid", "grid.png"]
    assert main(command) == 0
    assert "replaced" not in capsys.readouterr().err
    assert pixels("grid.png").shape == (32, 3 * 34 - 2, 3)
    assert main([*command, "--seed", "1"]) == 0
    assert "3 of these files were there before and have been replaced" in capsys.readouterr().err
    assert json.loads(Image.open("a_photo_of_a_red_circle_00.png").text["unitok"])["seed"] == 1


def test_many_go_on_and_fill_the_same_grid(model, here, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    Path("prompts.txt").write_text("red\n\ntwo\nyes\n")
    command = ["generate", "--from-file", "prompts.txt", "--model", str(model), "--out", "many", "--grid", "grid.png"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert printed.err.count("\rimage position ") == 4 and "image position 4/4\n" in printed.err
    assert printed.err.endswith("3 images made of 3\n")
    before = pixels("grid.png")
    assert before.shape == (66, 66, 3), "three images, nearly square"
    Path("many/two.png").unlink()
    Path("grid.png").unlink()
    assert main(command) == 0
    assert capsys.readouterr().out.split() == ["many/two.png", "grid.png"] and np.array_equal(
        pixels("grid.png"), before
    )
    assert main([*command, "--temperature", "0.5"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "many/red.png: was made with settings {'temperature': 0.9}" in error
    for variables in ({"RANK": "0", "WORLD_SIZE": "2"}, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}):
        with monkeypatch.context() as launcher:
            for name, value in variables.items():
                launcher.setenv(name, value)
            assert main(command) == 2
        assert "--grid: this process makes a part of the images only" in capsys.readouterr().err


def test_progress_is_for_terminals(model, here, capsys):
    assert main(["generate", PROMPT, "--model", str(model)]) == 0
    assert "image position" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "1,x"], "--seeds: '1,x': expected whole numbers, as in 3,5,9"),
        (["--seeds", "1,1"], "names a seed twice"),
        (["--seeds", "1,2", "--num", "2"], "without --seed and --num"),
        (["--num", "1000000000"], "1000000000 images: expected at most 10000 (with --from-file"),
        (["--grid", "grid.jpg"], "--grid grid.jpg: expected a file ending in .png"),
        (["--grid", "folder"], "--grid folder: expected a file ending in .png"),
        (["--guidance", "-1"], "guidance_scale=-1.0: expected 0 to 1000 (up to 1 is off)"),
        (["--out", "a.png", "--grid", "./a.png"], "is also the file of an image"),
        (["--model", "nowhere"], "nowhere: no such model folder; give another, or make one: `unitok demo`"),
    ],
)
def test_mistakes_in_generate(model, here, capsys, options, message):
    assert main(["generate", "red", "--model", str(model), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert sorted(path.name for path in here.iterdir()) == ["my blue.png", "red.png"]


def test_prompts_of_a_file(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfred circle\r\n\r\n two \n")
    assert prompts_of(str(tmp_path / "prompts.txt")) == ["red circle", "two"]


def test_more_pictures_of_a_file_than_there_can_be(model, here, capsys):
    Path("prompts.txt").write_text("red\ntwo\n")
    options = ["--num", "500001", "--model", str(model), "--out", "many"]
    assert main(["generate", "--from-file", "prompts.txt", *options]) == 2
    assert "1000002 images: expected at most 1000000; make" in capsys.readouterr().err and not Path("many").exists()


def test_the_model_that_comes_with_the_repository_is_found_from_elsewhere(here, monkeypatch):
    from unitok.commands import use

    monkeypatch.setattr(use, "__file__", str(here / "checkout" / "unitok" / "commands" / "use.py"))
    assert use.small_model() == "assets/shapes-mini", "named as the README does where there is none"
    (here / "checkout" / "assets" / "shapes-mini").mkdir(parents=True)
    assert use.small_model() == str(here / "checkout" / "assets" / "shapes-mini")
    (here / "assets" / "shapes-mini").mkdir(parents=True)
    assert use.small_tokenizer() == "assets/shapes-mini/visual_tokenizer"


# ---- reconstruct


def test_pictures_are_not_all_in_memory(model, here, monkeypatch):
    from unitok.data import transforms

    load, seen = transforms.load_image, []

    def loaded(path):
        assert sum(one() is not None for one in seen) < 2
        image = load(path)
        seen.append(weakref.ref(image))
        return image

    monkeypatch.setattr(transforms, "load_image", loaded)
    tokenizer = ["--tokenizer", str(model / "visual_tokenizer")]
    assert main(["reconstruct", *["red.png", "my blue.png"] * 3, *tokenizer, "--out", "pairs"]) == 0
    Path("bad.png").write_bytes(b"nothing")
    assert main(["reconstruct", "red.png", "bad.png", *tokenizer, "--out", "none"]) == 2
    assert not list(here.glob("none/*")), "looked at before the work"


def test_pairs_with_psnr(model, here, capsys):
    tokenizer = ["--tokenizer", str(model / "visual_tokenizer")]
    assert main(["reconstruct", "red.png", "my blue.png", *tokenizer, "--out", "pairs", "--json", "psnr.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(Path("psnr.json").read_text())
    psnrs = []
    for name, figure, line in zip(("red", "my blue"), figures["images"], lines[:2], strict=True):
        pair = pixels(f"pairs/{name}_pair.png").astype(float)
        assert pair.shape == (32, 66, 3)
        left, right = pair[:, :32], pair[:, 34:]
        original = eval_transform(Image.open(f"{name}.png"), 32)
        assert np.abs(left - (original.permute(1, 2, 0).numpy() + 1) * 127.5).max() <= 0.51
        psnrs.append(10 * np.log10(255**2 / np.square(left - right).mean()))
        assert figure == {"image": f"{name}.png", "psnr_db": pytest.approx(psnrs[-1]), "file": f"pairs/{name}_pair.png"}
        assert line == f"pairs/{name}_pair.png  PSNR {psnrs[-1]:.2f} dB"
    assert figures["mean_psnr_db"] == pytest.approx(np.mean(psnrs)) and len(lines) == 3
    assert lines[2] == f"mean of 2 images: PSNR {np.mean(psnrs):.2f} dB"
    assert main(["reconstruct", "red.png", *tokenizer, "--out", "again.png", "--alone"]) == 0
    assert np.array_equal(pixels("again.png"), pixels("pairs/red_pair.png")[:, 34:])
    capsys.readouterr()
    assert main(["reconstruct", *["red.png", "my blue.png"] * 4, *tokenizer, "--sheet", "sheet.png"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "sheet.png"
    sheet = pixels("sheet.png")
    assert sheet.shape == (4 * 34 - 2, 4 * 34 - 2, 3), "eight pairs, two in a row"
    assert np.array_equal(sheet[34:66, 68:134], pixels("pairs/my blue_pair.png"))
    assert main(["reconstruct", "red.png", *tokenizer, "--sheet", "s.png", "--alone"]) == 2
    assert "without --out and --alone" in capsys.readouterr().err


def test_weights_of_half_the_bits(tmp_path, here):
    """Stored in fp16, computed in fp32: drawing, reading and reconstructing."""
    half = make_pipeline(tmp_path)
    half.model.half()
    half.tokenizer.half()
    half.save_pretrained("half")
    assert load_model_folder(UniTok, "half/visual_tokenizer").dtype == torch.float16
    assert main(["generate", "red", "--model", "half", "--out", "drawn.png"]) == 0
    assert main(["chat", "what color is it?", "--image", "drawn.png", "--model", "half", "--max-new-tokens", "2"]) == 0
    assert main(["reconstruct", "drawn.png", "--tokenizer", "half/visual_tokenizer"]) == 0


# ---- conversations


def test_names_that_cannot_be_printed_cost_no_picture(model, here, monkeypatch):
    """Where the terminal knows ASCII only."""
    printed = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", printed)
    assert main(["generate", "un café rouge", "two", "--model", str(model), "--out", "made"]) == 0
    assert {path.name for path in Path("made").iterdir()} == {"un_café_rouge.png", "two.png"}
    printed.flush()
    assert printed.buffer.getvalue().split() == [b"made/un_caf\\xe9_rouge.png", b"made/two.png"]


def test_any_white_space_stands_behind_a_command(pipe, here):
    session = pipe.new_session()
    drawn = Conversation(session, [], 4, here / "drawn", seed=5)
    drawn.take(f"/generate\t{PROMPT}")
    drawn.take(f"/generate   {PROMPT}")
    assert len(list((here / "drawn").glob("*.png"))) == 2 and not session.messages


def typed(monkeypatch, *lines):
    """The prompts that were shown while these lines were typed on a terminal."""
    prompts, left = [], iter(lines)

    def read(prompt=""):
        prompts.append(prompt)
        line = next(left, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", read)
    return prompts


def test_pictures_wait_for_the_next_question(pipe, here, monkeypatch, capsys):
    session = pipe.new_session()
    lines = [f"'{here}/my blue.png'", "what is in ./red.png and there", "two", "/image red.png", "/reset", "red"]
    prompts = typed(monkeypatch, *lines)
    assert converse(Conversation(session, [], max_new_tokens=4)) == 0
    waiting = ["you: ", "you [my blue.png]: ", "you: ", "you: ", "you [red.png]: ", "you: ", "you: "]
    assert prompts == waiting
    assert len(session.messages) == 2, "after /reset one question"
    prompts = typed(monkeypatch, *lines[:3])
    converse(Conversation(session, [], max_new_tokens=4))
    kinds = [part["type"] for part in session.messages[2]["content"]]
    assert kinds == ["image", "image", "text"] and len(session.messages) == 6
    assert session.messages[2]["content"][2]["text"] == "what is in and there"
    answers = [message["content"] for message in session.messages if message["role"] == "assistant"]
    assert [line for line in capsys.readouterr().out.splitlines() if line in answers]


def test_a_drawn_picture_is_asked_about_and_saved(pipe, here, monkeypatch, capsys):
    session = pipe.new_session()
    lines = [
        f"/generate {PROMPT}",
        "what color is the circle?",
        "/save my\\ talk.jsonl",
        "yes",
        "/save my\\ talk.jsonl",
    ]
    prompts = typed(monkeypatch, *lines)
    assert converse(Conversation(session, [], 4, here / "drawn", seed=5)) == 0
    drawn = here / "drawn" / "a_photo_of_a_red_circle.png"
    assert prompts[1] == f"you [{drawn.name}]: " and str(drawn) in capsys.readouterr().out
    record = json.loads(Image.open(drawn).text["unitok"])
    assert (record["prompt"], record["seed"]) == (PROMPT, 5)
    (fresh,) = pipe.generate_images(PROMPT, seed=5)
    assert np.array_equal(pixels(drawn), np.asarray(fresh))
    asked = session.messages[0]["content"][0]["image"]
    assert np.array_equal(np.asarray(asked), np.asarray(fresh)), "the model sees what it drew"

    saved = json.loads(Path("my talk.jsonl").read_text())
    assert saved["image"] == "drawn/a_photo_of_a_red_circle.png" and len(saved["conversations"]) == 4
    source = open_source("my talk.jsonl")
    (sample,) = [source[index] for index in range(len(source))]
    assert np.array_equal(np.asarray(sample.image), pixels(drawn))
    ((first, *_, last),) = sample.conversations
    assert first.content == "<image>\nwhat color is the circle?"
    assert last.content == session.messages[-1]["content"]


def test_drawing_twice_gives_another_picture_and_another_file(pipe, here, monkeypatch):
    conversation = Conversation(pipe.new_session(), [])
    for _ in range(2):
        conversation.take("/generate red")
    assert not np.array_equal(pixels("red_2.png"), pixels("red_3.png")), "red.png was there"
    assert pixels("red.png").shape == (40, 48, 3) and len(conversation.waiting) == 2


def test_several_pictures_are_saved_under_their_own_name(pipe, here):
    conversation = Conversation(pipe.new_session(), [], max_new_tokens=4)
    conversation.take("red.png 'my blue.png' two")
    conversation.take("/save talks/one.jsonl")  # its folder is made
    saved = json.loads(Path("talks/one.jsonl").read_text())
    assert saved["images"] == ["../red.png", "../my blue.png"] and "image" not in saved
    assert saved["conversations"][0]["content"] == "<image>\n<image>\ntwo"


def test_a_drawing_that_is_stopped(pipe, here, monkeypatch):
    session = pipe.new_session()
    typed(monkeypatch, "/generate red", "two")

    def stopped(*_, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipe, "generate_images", stopped)
    assert converse(Conversation(session, [], max_new_tokens=4)) == 0
    assert len(session.messages) == 2 and not Path("red_2.png").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/paint red", "/paint: no such command; there are /image, /generate, /save, /reset, /help, /quit"),
        ("/generate", "/generate: say what to draw"),
        ("/save", "/save: name a file"),
        ("/save red.png", "nothing has been said yet"),
        ("/image", "/image: name a file"),
        ("/image notes.txt", "cannot read image 'notes.txt'"),
        ("/image red.png what is it?", "'what is it\\?' names no picture"),
        ("./absent.png", "cannot read image 'absent.png'"),
        ("file://[bad/x.png", "no address of a file"),
        ("/image file://[x", "no address of a file"),
        ("what is <image>?", "<image>"),
    ],
)
def test_bad_lines(pipe, here, line, message):
    conversation = Conversation(pipe.new_session(), [])
    with pytest.raises(UserError, match=message) as error:
        conversation.take(line)
    assert "\n" not in str(error.value) and conversation.waiting == [] and conversation.session.messages == []


def test_files_that_cannot_be_written(pipe, here):
    conversation = Conversation(pipe.new_session(), [], max_new_tokens=4, out=Path("red.png"))
    conversation.take("two")
    for line, message in (
        ("/save red.png", "is there already; name another"),
        ("/save a\0b.json", "cannot be a file's name"),
        ("/save red.png/talk.json", r"cannot be written \((File exists|Not a directory)"),
        ("/generate red", r"cannot be written \(.*\); give --out a folder"),
    ):
        with pytest.raises(UserError, match=message):
            conversation.take(line)


def test_a_new_conversation_does_not_replace_the_file_of_the_former(pipe, here):
    conversation = Conversation(pipe.new_session(), [], max_new_tokens=2)
    for line in ("red", "/save talk.jsonl", "two", "/save talk.jsonl", "/reset", "yes"):
        conversation.take(line)
    with pytest.raises(UserError, match="is there already"):
        conversation.take("/save talk.jsonl")
    assert len(json.loads(Path("talk.jsonl").read_text())["conversations"]) == 4


def test_quit_leaves_whatever_its_case(pipe, monkeypatch):
    session = pipe.new_session()
    typed(monkeypatch, "/HELP", "two", "/Quit", "yes")
    assert converse(Conversation(session, [], 4)) == 0
    assert len(session.messages) == 2, "what stands behind it is not asked"


def test_help_names_every_command(pipe, capsys):
    conversation = Conversation(pipe.new_session(), [])
    conversation.take("/help")
    shown = capsys.readouterr().out
    assert all(command in shown for command in conversation.commands)
