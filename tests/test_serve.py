"""The service with OpenAI's own client: answers, streams and pictures are those of the pipeline."""

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from pipelines import make_pipeline, picture
from serving import data_url, eventually, question, running, unpacked

from unitok.data.preprocess import PREPROCESS
from unitok.data.transforms import eval_transform
from unitok.mllm.chat import TextSampling, generate_answers
from unitok.mllm.session import answer_text, text_deltas
from unitok.serve.answers import Row, TextStream, answer_rows
from unitok.serve.model import ServedModel


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def server(pipe):
    with running(pipe, name="tiny", max_batch=8) as (address, server):
        yield address, server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


def messages_for(pipe, image, text):
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


def test_an_answer_is_the_pipelines(pipe, client):
    answer = client.chat.completions.create(
        model="tiny", messages=question("what color is the circle?", data_url(picture())), max_tokens=9
    )
    expected = pipe.chat(messages_for(pipe, picture(), "what color is the circle?"), max_new_tokens=9)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens > pipe.model.config.num_image_positions
    assert answer.model == "tiny"


@pytest.mark.parametrize("n", [1, 2])
def test_a_streamed_answer_is_the_whole_one(client, n):
    asked = {
        "model": "tiny",
        "messages": question("is there a green triangle?", data_url(picture("green"), "JPEG")),
        "max_tokens": 12,
        "temperature": 1.0,
        "seed": 3,
        "n": n,
    }
    whole = client.chat.completions.create(**asked)
    texts, reasons, usage, chunks = [""] * n, [None] * n, None, 0
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            chunks += 1
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    assert chunks > 4 * n, "it came in pieces"


def test_the_seed_decides_a_drawn_answer(client):
    def ask(seed):
        messages = [{"role": "user", "content": "red"}]
        settings = {"temperature": 2.0, "seed": seed, "max_tokens": 16}
        return client.chat.completions.create(model="tiny", messages=messages, **settings).choices[0].message.content

    assert ask(1) == ask(1) != ask(2)


def test_turns_and_a_system_message_reach_the_model(pipe, client):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "red"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "two"},
    ]
    answer = client.chat.completions.create(model="tiny", messages=turns, max_tokens=6)
    assert answer.choices[0].message.content == pipe.chat(turns, max_new_tokens=6)
    without = client.chat.completions.create(model="tiny", messages=turns[3:], max_tokens=6)
    assert without.usage.prompt_tokens < answer.usage.prompt_tokens


def test_a_stop_string_ends_the_answer(client):
    messages = [{"role": "user", "content": "a photo of two blue squares"}]
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=20).choices[0].message.content
    assert len(whole) > 6
    stop = whole[3:5]
    cut = client.chat.completions.create(model="tiny", messages=messages, max_tokens=20, stop=[stop, "\x00"])
    assert cut.choices[0].message.content == whole[: whole.index(stop)].rstrip()
    assert cut.choices[0].finish_reason == "stop"


def test_pictures_are_the_pipelines(pipe, client):
    answer = client.images.generate(
        model="tiny", prompt="a photo of a red circle", n=3, size="32x32", response_format="b64_json",
        extra_body={"seed": 5, "guidance": 3.0, "temperature": 0.8},
    )  # fmt: skip
    expected = pipe.generate_images(["a photo of a red circle"] * 3, seed=5, guidance_scale=3.0, temperature=0.8)
    assert len(answer.data) == 3
    for one, other in zip(answer.data, expected, strict=True):
        made = unpacked(one.b64_json)
        assert np.abs(np.asarray(made).astype(int) - np.asarray(other)).max() <= 1
    assert [one.seed for one in answer.data] == [5, 6, 7]
    assert '"seed": 7' in unpacked(answer.data[2].b64_json).info["unitok"]
    assert answer.usage.output_tokens == 3 * pipe.model.config.num_image_positions


@pytest.mark.parametrize("preprocess", PREPROCESS)
def test_a_large_picture_is_seen_as_the_pipeline_sees_it(pipe, preprocess, monkeypatch):
    """It is scaled down while its request waits, which must not change what the model sees."""
    monkeypatch.setattr(pipe.processor, "image_preprocess", preprocess)
    image = Image.effect_noise((301, 200), 60).convert("RGB")
    seen = client_seen(pipe, image)
    assert max(seen.size) < 60 and np.array_equal(*(pipe.processor.pixels([one]).numpy() for one in (image, seen)))
    expected = eval_transform(image, pipe.processor.image_size, preprocess)
    assert np.array_equal(pipe.processor.pixels([image])[0].numpy(), expected.numpy())


def client_seen(pipe, image):
    return ServedModel(pipe).views.seen(image)


def test_a_reconstruction_shows_codes_and_usage(pipe, server):
    response = httpx.post(f"{server[0]}/v1/tokenizer/reconstruct", json={"image": data_url(picture())})
    assert response.status_code == 200, response.text
    made = response.json()
    codes = np.array(made["codes"])
    assert codes.shape == (3, 4) and made["grid"] == [2, 2]
    assert made["usage"] == [{"used": len(set(row)), "entries": 16} for row in codes.tolist()]
    assert unpacked(made["original"]).size == unpacked(made["reconstruction"]).size == (32, 32)
    assert codes.tolist() == pipe.image_codes([picture()])[0].tolist()
    assert 0 < made["psnr"] < 100


def test_models_health_and_metrics(client, server):
    (model,) = client.models.list().data
    assert model.id == "tiny" and client.models.retrieve("tiny") == model
    assert httpx.get(f"{server[0]}/health").json() == {"status": "ok", "model": "tiny", "waiting": 0, "running": 0}
    text = httpx.get(f"{server[0]}/metrics").text
    assert 'unitok_requests_total{path="/v1/models",status="200"}' in text
    assert "unitok_batch_size_bucket" in text and "unitok_waiting 0.0" in text


def test_openapi_describes_everything(server):
    paths = httpx.get(f"{server[0]}/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/images/generations", "/v1/models", "/v1/tokenizer/reconstruct"} <= set(paths)
    assert httpx.get(f"{server[0]}/docs").status_code == 404


def test_async_clients_at_once_get_their_own_answers(pipe, server):
    """Different settings and lengths in one batch: each answer is the one it would be alone."""
    import asyncio

    prompts = [
        "red",
        "two",
        "yes",
        "a photo of a red circle",
        "is there a green triangle?",
        "what color is the circle?",
    ]

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server[0]}/v1", api_key="x", max_retries=0) as client:
            return await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model="tiny", messages=[{"role": "user", "content": text}], max_tokens=3 + 2 * i, seed=i,
                        temperature=[0, 1.5][i % 2],
                    )
                    for i, text in enumerate(prompts)
                )
            )  # fmt: skip

    answers = asyncio.run(ask_all())
    for i, (text, answer) in enumerate(zip(prompts, answers, strict=True)):
        sampling = {"do_sample": True, "temperature": 1.5} if i % 2 else {}
        expected = pipe.chat([{"role": "user", "content": text}], max_new_tokens=3 + 2 * i, seed=i, **sampling)
        assert answer.choices[0].message.content == expected, text


# ---- clients that go away


def test_a_client_that_goes_away_stops_its_work(server):
    address, own = server
    scheduler = own.service.scheduler
    body = {"model": "tiny", "messages": [{"role": "user", "content": "red"}], "max_tokens": 150, "temperature": 3.0}
    before = own.service.metrics.cancelled._value.get()
    for stream in (True, False):
        with httpx.Client() as client, pytest.raises((httpx.ReadTimeout, StopIteration)):
            if stream:
                with client.stream("POST", f"{address}/v1/chat/completions", json={**body, "stream": True}) as response:
                    next(response.iter_lines())
                    raise StopIteration
            client.post(f"{address}/v1/chat/completions", json=body, timeout=0.02)
        eventually(lambda: scheduler.idle)
    eventually(lambda: own.service.metrics.cancelled._value.get() == before + 2)


# ---- text that comes in pieces


@pytest.mark.parametrize("seed", range(4))
def test_pushed_ids_give_the_pieces_of_text_deltas(pipe, seed):
    tokenizer = pipe.processor.tokenizer
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, len(tokenizer), 40).tolist()
    stream = TextStream(tokenizer)
    pieces = [piece for piece in [*(stream.push(one) for one in ids), stream.end()] if piece]
    assert pieces == list(text_deltas(tokenizer, ids))
    assert "".join(pieces) == answer_text(tokenizer, ids)


def rows_for(pipe, texts, wanted=None):
    """Rows with a seed each; `wanted[i](row)` says whether somebody waits for row i."""
    tokenizer = pipe.processor.tokenizer
    prompts = pipe._chat_prompts([[{"role": "user", "content": text}] for text in texts], 20)
    sampling = TextSampling(do_sample=True, temperature=1.3)
    rows = [
        Row(prompt, TextStream(tokenizer), sampling, seed, 20, lambda text: None, lambda: True)
        for seed, prompt in enumerate(prompts)
    ]
    for place, says in (wanted or {}).items():
        rows[place].wanted = lambda row=rows[place], says=says: says(row)
    answer_rows(pipe.model, rows, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return rows, prompts, sampling


def test_rows_are_those_of_generate_answers(pipe):
    rows, prompts, sampling = rows_for(pipe, ["red", "two", "yes"])
    tokenizer = pipe.processor.tokenizer
    expected = generate_answers(
        pipe.model, prompts, tokenizer.eos_token_id, tokenizer.pad_token_id, 20, sampling, [0, 1, 2]
    )
    assert [row.stream.ids for row in rows] == expected


def test_a_row_that_nobody_waits_for_stops_and_leaves_the_others_alone(pipe):
    whole, *_ = rows_for(pipe, ["red", "two", "yes"])
    cut, *_ = rows_for(pipe, ["red", "two", "yes"], {1: lambda row: len(row.stream.ids) < 3})
    assert len(whole[1].stream.ids) > 3 and cut[1].stream.ids == whole[1].stream.ids[:3]
    assert cut[1].finish_reason is None
    assert [cut[i].stream.ids for i in (0, 2)] == [whole[i].stream.ids for i in (0, 2)]
    none, *_ = rows_for(pipe, ["red", "two"], dict.fromkeys((0, 1), lambda row: False))
    assert [row.stream.ids for row in none] == [[], []]


def test_choices_have_seeds_in_a_row(client):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "two"}], "max_tokens": 12, "temperature": 2.0}
    several = client.chat.completions.create(**asked, seed=4, n=3)
    alone = [client.chat.completions.create(**asked, seed=seed) for seed in (4, 5, 6)]
    texts = [choice.message.content for choice in several.choices]
    assert texts == [one.choices[0].message.content for one in alone] and len(set(texts)) > 1
    assert several.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)


def test_the_example_of_the_documentation(pipe, capsys):
    from pathlib import Path

    from unitok.commands.use import SMALL_MODEL

    text = (Path(__file__).resolve().parent.parent / "docs" / "serving.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    names: dict = {}
    with running(pipe, name=Path(SMALL_MODEL).name) as (address, _):  # the name that `unitok serve` gives it
        code = code.replace("http://127.0.0.1:8000", address).replace("data:image/png;base64,...", data_url(picture()))
        exec(compile(code, "docs/serving.md", "exec"), names)
    assert capsys.readouterr().out and unpacked(names["made"].data[3].b64_json).size == (32, 32)
