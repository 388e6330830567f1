"""`unitok chat`, `generate` and `reconstruct` given odd things: bytes that are no text, long names, damaged files."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pipelines import make_pipeline, picture

from unitok.cli import main
from unitok.commands.chat import Conversation, converse
from unitok.commands.use import file_stem
from unitok.core.errors import NonFiniteError, UserError
from unitok.core.signals import interrupt_ends
from unitok.mllm.sampler import CodeSampler, filter_logits

ROOT = Path(__file__).resolve().parent.parent
LATIN = b"caf\xe9 what?".decode("utf-8", "surrogateescape")
LONG = "\u65e5\u672c\u8a9e" * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
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
    return tmp_path


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("unitok: error: "), error
    return error


# ---- sampler settings


@pytest.mark.parametrize("option", ["--temperature", "--depth-temperature"])
def test_a_cold_temperature_is_the_likeliest_choice(model, here, option):
    command = ["generate", "red", "--model", str(model), "--temperature", "0.9"]
    for number, value in enumerate(("1e-5", "1e-40", "1e-300")):
        assert main([*command, option, value, "--out", f"{number}.png"]) == 0
    drawn = [Image.open(f"{number}.png").tobytes() for number in range(3)]
    assert drawn[0] == drawn[1] == drawn[2]


@pytest.mark.parametrize("value", ["1e300", "inf", "nan", "-1", "1001"])
def test_guidance_out_of_range(model, here, capsys, value):
    assert main(["generate", "red", "--model", str(model), "--guidance", value]) == 2
    assert "guidance_scale=" in one_line(capsys) and not list(here.glob("red_*"))


@pytest.mark.parametrize("value", ["inf", "nan", "0", "-1"])
def test_temperatures_out_of_range(model, here, capsys, value):
    assert main(["generate", "red", "--model", str(model), "--temperature", value]) == 2
    assert "temperature" in one_line(capsys)


def test_logits_stay_finite_at_the_ends_of_all_ranges():
    logits = torch.tensor([[5.0, -torch.inf, 4.0, -1e4]])
    for temperature in (5e-324, 1e-40, 1e40, 1e300):
        for given in (temperature, torch.tensor([[temperature]])):
            for top_k, top_p in ((0, 1.0), (10**30, 1e-300), (1, 1.0)):
                probs = filter_logits(logits, given, top_k, top_p).softmax(dim=-1)
                assert torch.isfinite(probs).all() and probs[0, 1] == 0 and probs[0, 0] == probs.max()
    sampler = CodeSampler([0], True, 1e-300, 10**30, 1e-300)
    assert sampler(logits, 0).tolist() == [0]


def test_a_model_without_finite_scores_draws_nothing(tmp_path):
    broken = make_pipeline(tmp_path)
    with torch.no_grad():
        broken.model.depth.head.weight[-1].fill_(torch.nan)
        broken.model.lm_head.weight.fill_(torch.nan)
    for ask in (lambda: broken.generate_images("red"), lambda: broken.chat([{"role": "user", "content": "red"}])):
        with pytest.raises(NonFiniteError, match="weights are damaged"):
            ask()


# ---- text that is none


def test_a_line_that_is_not_utf8_costs_only_itself(pipe, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9 what?\nred\n/generate \xff\n"), "utf-8"))
    session = pipe.new_session()
    assert converse(Conversation(session, [], max_new_tokens=4)) == 0
    assert [message["role"] for message in session.messages] == ["user", "assistant"]
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "user 'caf\\\\udce9 what?': what stands at character 4 is no text" in errors[0]
    assert "prompt '\\\\udcff'" in errors[1]


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_arguments_that_are_not_utf8(model, here, capsys, command):
    assert main([command, LATIN, "--model", str(model)]) == 2
    assert "at character 4 is no text; give it in UTF-8" in one_line(capsys)


def test_names_that_are_not_utf8(pipe, here, monkeypatch, capsys):
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    picture("blue").save(Path(name).open("wb"), format="PNG")
    lines, prompts = iter([f"./{name}", "red", "/save talk.jsonl"]), []

    def read(prompt=""):
        prompts.append(prompt.encode().decode())
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", read)
    assert converse(Conversation(pipe.new_session(), [], max_new_tokens=4)) == 0
    assert prompts == ["you: ", "you [caf\\udce9.png]: ", "you: ", "you: "]
    assert "is not UTF-8" in capsys.readouterr().err and not Path("talk.jsonl").exists()


def test_a_warning_is_about_the_last_turn(pipe, caplog):
    session = pipe.new_session()
    session.ask("what is \u65e5\u672c?", max_new_tokens=2)
    assert "'what is \u65e5\u672c?' has characters" in caplog.text
    caplog.clear()
    session.ask("two", max_new_tokens=2)
    assert not caplog.records


# ---- long names


def test_a_stem_fits_every_file_system():
    for prompt in (LONG, "\U00010400" * 100, "red " * 100):
        assert 60 <= len(file_stem(prompt).encode()) <= 180
        assert LONG.startswith(file_stem(LONG))
    assert file_stem("a photo of a red circle") == "a_photo_of_a_red_circle" and file_stem("?") == "image"


def test_long_prompts_get_files(model, pipe, here, capsys):
    assert main(["generate", LONG[:100], "--num", "2", "--model", str(model), "--out", "g"]) == 0
    assert len(list((here / "g").glob("*.png"))) == 2 and not list((here / "g").glob(".*"))
    conversation = Conversation(pipe.new_session(), [])
    conversation.take("/generate " + "\U00010400" * 80)
    assert len(list(here.glob("\U00010400*.png"))) == 1


def test_a_name_that_is_too_long_is_told_before_the_work(model, here, capsys):
    assert main(["generate", "red", "--model", "missing", "--out", "x" * 252 + ".png"]) == 2
    assert "File name too long" in one_line(capsys)
    assert main(["generate", "red", "--model", str(model), "--out", "x" * 251 + ".png"]) == 0
    assert main(["generate", "red", "--model", "missing", "--grid", "x" * 252 + ".png"]) == 2


def test_a_conversation_outlives_what_cannot_be_written(pipe, here, monkeypatch, capsys):
    lines = iter(["red", f"/save {'x' * 300}", f"/image {'y' * 300}", "two"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _="": next(lines, None) or (_ for _ in ()).throw(EOFError()))
    session = pipe.new_session()
    assert converse(Conversation(session, [], max_new_tokens=2)) == 0
    assert len(session.messages) == 4
    assert capsys.readouterr().err.count("File name too long") == 2


# ---- files that are there


def damaged(whole: bytes) -> dict[str, bytes]:
    text, buffer = PngInfo(), io.BytesIO()
    text.add_text("unitok", "no JSON")
    Image.new("RGB", (8, 8)).save(buffer, format="PNG", pnginfo=text)
    return {
        "head": whole[:100],
        "no end": whole[:-200],
        "middle": whole[:-300] + bytes(100) + whole[-200:],
        "nothing": b"",
        "other record": buffer.getvalue(),
    }


def test_damaged_pictures_are_not_taken_as_made(model, here, capsys):
    Path("prompts.txt").write_text("red\ntwo\n")
    command = ["generate", "--from-file", "prompts.txt", "--model", str(model), "--out", "many"]
    assert main(command) == 0
    whole = Path("many/two.png").read_bytes()
    for what, data in damaged(whole).items():
        Path("many/two.png").write_bytes(data)
        capsys.readouterr()
        assert main([*command, "--grid", "grid.png"]) == 2, what
        error = one_line(capsys)
        assert "many/two.png: is there, but" in error and "another folder" in error
    Path("many/two.png").write_bytes(whole)
    assert main([*command, "--grid", "grid.png"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alone", "--out", "red.png"], "red.png: would replace the input red.png"),
        (["--alone", "--out", "link.png"], "link.png: would replace the input red.png"),
        (["--sheet", "red.png"], "would replace the input red.png"),
        (["--json", "red.png"], "would replace the input red.png"),
        (["--out", "a.png", "--json", "a.png"], "--json a.png: is also the file of an image"),
        (["--json", "."], "--json .: is a folder"),
    ],
)
def test_inputs_are_never_replaced(model, here, capsys, options, message):
    os.link("red.png", "link.png")
    before = Path("red.png").read_bytes()
    assert main(["reconstruct", "red.png", "--tokenizer", str(model / "visual_tokenizer"), *options]) == 2
    assert message in one_line(capsys) and Path("red.png").read_bytes() == before
    assert sorted(path.name for path in here.iterdir()) == ["link.png", "red.png"]


def test_figures_get_their_folder(model, here):
    tokenizer = ["--tokenizer", str(model / "visual_tokenizer")]
    assert main(["reconstruct", "red.png", *tokenizer, "--json", "new/x.json"]) == 0
    assert Path("new/x.json").is_file() and Path("red_pair.png").is_file()


def test_ctrl_c_while_the_program_begins():
    """The first imports are ours already: an interrupt in them is no traceback."""
    code = (
        "import sys, runpy, importlib.abc\n"
        "class Stop(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'unitok.commands.checkpoint': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\n"
        "runpy.run_module('unitok', run_name='__main__')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "unitok: interrupted\n")


def test_a_command_line_is_read_before_anything_large_is_imported():
    """So that its mistakes are told at once, and Ctrl-C meets torch's import within `interrupt_ends`."""
    code = (
        "import sys; from unitok.cli import parse; parse(['chat', 'x']); import unitok.commands.reconstruct\n"
        "print({'torch', 'transformers', 'deepspeed'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_a_closed_terminal_holds_no_ctrl_c_up():
    code = (
        "import os, signal, sys\n"
        "from unitok.core.signals import interrupt_ends\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "os.close(2)\n"
        "with interrupt_ends():\n"
        "    try: signal.raise_signal(signal.SIGINT)\n"
        "    except BaseException: pass\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 130


@pytest.mark.parametrize(
    "command,module",
    [
        ("chat hello", "unitok.mllm.pipeline"),
        ("generate red", "transformers.modeling_utils"),
        ("reconstruct x.png", "unitok.tokenizer"),
        ("serve --port 0", "unitok.serve.app"),
        ("chat hello --image red.png", "torch"),
    ],
)
def test_ctrl_c_while_a_command_imports_and_loads(command, module, here):
    """Libraries that swallow the interrupt, or fail for it in their own way, do not get it."""
    code = (
        "import importlib.abc, signal, sys\n"
        "class Stop(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}:\n"
        "            try: signal.raise_signal(signal.SIGINT)\n"
        "            except BaseException: pass\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Stop())\n"
        "from unitok.__main__ import main\n"
        "sys.exit(main())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split()], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (130, "unitok: interrupted\n")


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_ctrl_c_is_as_before_once_the_model_is_there(before):
    """Who ignores it, as nohup does, ignores it all the time."""
    outside = signal.signal(signal.SIGINT, before)
    try:
        with interrupt_ends():
            assert (signal.getsignal(signal.SIGINT) is before) == (before is signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, outside)


def test_unicode_is_checked_where_texts_come_in(pipe):
    with pytest.raises(UserError, match="no text; give it in UTF-8"):
        pipe.chat([{"role": "user", "content": LATIN}])
    with pytest.raises(UserError, match="no text; give it in UTF-8"):
        pipe.generate_images(LATIN)
