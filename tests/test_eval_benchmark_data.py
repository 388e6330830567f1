"""Documents of VQA benchmarks from local folders and snapshots of the hub: missing ones, their pictures, their hash."""

import io
import json

import pytest
from PIL import Image, ImageColor
from test_eval_vqa_tasks import DOCUMENTS

from unitok.core.errors import DataError, UserError
from unitok.data.source import open_source
from unitok.eval.benchmark_data import (
    documents_hash,
    load_documents,
    loaded_documents,
    missing_data,
    pictures,
    question,
)
from unitok.eval.benchmarks import SHORT, benchmark, score


def png(color):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "PNG")
    return buffer.getvalue()


def test_missing_data_say_where_they_come_from(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"hf download lmms-lab/MME --repo-type dataset --local-dir"):
        load_documents("mme", str(tmp_path))
    monkeypatch.setenv("UNITOK_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(DataError, match="elsewhere"):
        load_documents("mme")
    (tmp_path / "gqa").mkdir()
    (tmp_path / "gqa" / "data.jsonl").write_text('{"question": "what?"}')
    with pytest.raises(DataError, match="no field 'answer'"):
        load_documents("gqa", str(tmp_path))
    (tmp_path / "gqa" / "data.jsonl").write_text("{")
    with pytest.raises(DataError, match="line 1"):
        load_documents("gqa", str(tmp_path))
    (tmp_path / "pope").mkdir()
    with pytest.raises(DataError, match="pope: cannot read .*hf download lmms-lab/POPE"):
        load_documents("pope", str(tmp_path))
    assert missing_data("pope", str(tmp_path)).startswith("no data.jsonl and no .parquet file in ")
    (tmp_path / "pope" / "a.png").write_bytes(png("red"))
    assert "hf download lmms-lab/POPE" in missing_data("pope", str(tmp_path)), "a lone picture is no data"
    (tmp_path / "pope" / "data").mkdir()
    (tmp_path / "pope" / "data" / "test.parquet").touch()
    assert missing_data("pope", str(tmp_path)) is None
    with pytest.raises(DataError, match="known are"):
        benchmark("vqa")


def write_documents(root, name, documents):
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / name / "data.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (root / name / "red.png").write_bytes(png("red"))
    return load_documents(name, str(root))


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_a_question_is_not_asked_without_its_picture(name, tmp_path):
    """Of a misnamed field, and of a row that has none; ScienceQA's questions without one are as they should be."""
    documents = [one for one in DOCUMENTS[name] if one.get("data_type") != "video" and one.get("index", 0) < 1000]
    misnamed = [{key.replace("image", "img"): value for key, value in one.items()} for one in documents]
    with pytest.raises(DataError, match=r"no field 'image(_1)?'; expected"):
        write_documents(tmp_path / "misnamed", name, misnamed)
    without = [{key: None if key.startswith("image") else value for key, value in documents[0].items()}]
    doc = write_documents(tmp_path / "without", name, [*without, *documents])[0]
    if name == "scienceqa":
        assert pictures(doc) == []
    else:
        with pytest.raises(DataError, match=f"^{name}: (no picture in 'image'|the question names <image 2>)"):
            pictures(doc)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("textvqa", {"answers": None}, r"data\.jsonl, line 1: answers is null"),
        ("pope", {"question": None}, r"data\.jsonl, line 1: question is null"),
        ("pope", {"answer": ["yes"]}, r"data\.jsonl: a field is of one kind in one line and of another"),
        ("mmbench", {"A": 1, "B": 2, "C": 3, "D": 4}, "has no options"),
    ],
)
def test_rows_without_what_is_asked_are_refused_before_anything_is(name, changes, message, tmp_path):
    documents = [one for one in DOCUMENTS[name] if one.get("index", 0) < 1000]
    rows = [documents[0] | changes] + ([] if name == "mmbench" else documents)
    with pytest.raises(DataError, match=message) as error:
        write_documents(tmp_path, name, rows)
    assert "\n" not in str(error.value)


def test_a_line_ends_where_the_file_says(tmp_path):
    """Other marks that Unicode takes for ends of lines are text; empty lines are none."""
    documents = [DOCUMENTS["pope"][0] | {"question": f"Is there{mark}a dog?"} for mark in "\u2028\u2029\x85"]
    folder = tmp_path / "pope"
    folder.mkdir()
    (folder / "red.png").write_bytes(png("red"))
    lines = [json.dumps(one, ensure_ascii=False) for one in documents]
    (folder / "data.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    assert [doc["question"] for doc in load_documents("pope", str(tmp_path))] == [d["question"] for d in documents]


def test_the_hash_of_documents_is_of_what_is_asked_and_scored(tmp_path):
    documents = DOCUMENTS["pope"]
    found = {}
    for case, rows in (
        ("as they are", documents),
        ("with more fields", [one | {"id": 3} for one in documents]),
        ("other question", [one | {"question": "Is there a bird?"} for one in documents]),
        ("other answer", [documents[0] | {"answer": "no"}, documents[1]]),
        ("fewer", documents[:1]),
    ):
        write_documents(tmp_path / case, "pope", rows)
        found[case] = loaded_documents()["pope"]
        assert found[case] == documents_hash("pope", rows)
    assert found.pop("with more fields") == found["as they are"]
    assert len(set(found.values())) == 4
    turned = documents_hash("mmbench", write_documents(tmp_path / "turned", "mmbench", DOCUMENTS["mmbench"]))
    assert turned != documents_hash("mmbench", DOCUMENTS["mmbench"][:2]), "every rotation is a question"


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_no_answer_is_a_crash(name):
    texts = [
        "",
        "\n",
        "F",
        "I",
        "Z",
        "The answer is F.",
        "(I)",
        "A. B. C.",
        ".",
        "nan",
        "inf is -inf",
        "1e999",
        "²",
        "[1,",
    ]
    for doc in DOCUMENTS[name]:
        for text in texts:
            assert score(name, doc | {"rotation": 0}, text).keys() == benchmark(name).metrics.keys()


@pytest.mark.parametrize("colors", [("red", "blue"), ("green", "white")])
def test_a_snapshot_of_the_hub_is_read_with_its_pictures_apart(tmp_path, colors):
    """GQA: questions and pictures are two configurations, joined by the picture's name. Another snapshot in a folder of
    the same name is not mistaken for one that was read before."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    root = tmp_path / "gqa"
    questions = Dataset.from_dict({"question": ["what?", "who?"], "answer": ["x", "y"], "imageId": ["b", "a"]})
    features = Features({"id": Value("string"), "image": ImageFeature()})
    stored = [{"bytes": png(color), "path": None} for color in colors]
    files = {"instructions": questions, "images": Dataset.from_dict({"id": ["a", "b"], "image": stored}, features)}
    text = ["---", "configs:"]
    for part, rows in files.items():
        (root / part).mkdir(parents=True)
        rows.to_parquet(root / part / "testdev.parquet")
        text += [
            f"- config_name: testdev_balanced_{part}",
            "  data_files:",
            "  - split: testdev",
            f"    path: {part}/*",
        ]
    (root / "README.md").write_text("\n".join([*text, "---", ""]))
    documents = load_documents("gqa", str(tmp_path))
    found = [pictures(doc)[0].getpixel((0, 0)) for doc in documents]
    assert found == [ImageColor.getrgb(color) for color in reversed(colors)]
    assert question(documents[1]) == f"who?\n{SHORT}"


def test_the_shapes_world_asks_what_the_vqa_command_asks(tmp_path):
    from unitok.eval.vqa import choose_questions

    documents = load_documents("shapes", str(tmp_path))
    source = open_source(benchmark("shapes").hub)
    asked = choose_questions(source)
    assert [(doc["question"], doc["answer"]) for doc in documents] == [(one.text, one.answer) for one in asked]
    assert question(documents[7]) == asked[7].text
    (picture,) = pictures(documents[7])
    assert list(picture.getdata()) == list(source[asked[7].index].image.getdata())


@pytest.mark.parametrize("kept", ["path", "bytes"])
def test_pictures_are_decoded_when_they_are_looked_at(kept, tmp_path, monkeypatch):
    """And stand for PIL's own to whoever looks, lm-eval's cache of answers included."""
    import copy
    import pickle

    from lm_eval.api.model import hash_args

    from unitok.eval import lazy_pictures

    whole = Image.radial_gradient("L").resize((40, 30)).convert("RGB")
    file = tmp_path / "a.png"
    whole.save(file)
    value = str(file) if kept == "path" else {"bytes": file.read_bytes()}
    decoded = []
    for name in ("decode_image", "load_image"):
        original = getattr(lazy_pictures, name)
        monkeypatch.setattr(lazy_pictures, name, lambda *args, original=original: decoded.append(1) or original(*args))
    picture = lazy_pictures.picture_of(value, "pope image")
    assert isinstance(picture, Image.Image) and not decoded
    again = pickle.loads(pickle.dumps(picture))  # noqa: S301 - our own bytes, as spawn sends them
    assert not hasattr(picture, "nothing") and again.tobytes() == whole.tobytes()
    assert picture.size == (40, 30) and list(copy.deepcopy(picture).getdata()) == list(whole.getdata())
    assert hash_args("a", [{"visual": [picture]}]) == hash_args("a", [{"visual": [whole]}])
    before = len(decoded)
    assert lazy_pictures.opened(picture).tobytes() == whole.tobytes() and len(decoded) == before + 1
    assert lazy_pictures.opened(whole) is whole is lazy_pictures.picture_of(whole, "pope image")


def test_a_picture_that_is_none_is_told_at_once_and_a_cut_one_when_it_is_looked_at(tmp_path):
    from unitok.eval.lazy_pictures import picture_of

    text, cut = tmp_path / "a.png", tmp_path / "cut.png"
    text.write_text("no picture")
    Image.effect_noise((64, 64), 50).save(cut)
    cut.write_bytes(cut.read_bytes()[:1500])
    for value in (str(text), str(tmp_path / "lost.png"), {"bytes": b"no picture"}, {"path": None}, 7):
        with pytest.raises((DataError, UserError)):
            picture_of(value, "pope image")
    picture = picture_of(str(cut), "pope image")
    with pytest.raises(UserError, match=r"cut\.png"):
        picture.convert("RGB")
