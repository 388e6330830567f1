"""Speed of answers in text: one conversation at a time and a batch, against transformers' `generate` and a plain loop.

All ways answer the same random prompts with the likeliest ids, and their ids are compared. Each way's figure is the
best of several rounds in which all take their turn; on a CPU the time is that of the process.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field

from unitok.core.config import Config
from unitok.core.errors import UserError
from unitok.core.rng import torch_rng
from unitok.mllm import UniTokMLLM, UniTokMLLMConfig
from unitok.mllm.chat import Prompt, generate_answers

BASELINE = "model.generate, one at a time"
PAD_ID = 0  # never read: all prompts are equally long
Answers = list[list[int]]
Way = Callable[[UniTokMLLM, list[Prompt], int], Answers]


class ChatWork(Config):
    """What is answered: `batch_size` conversations of `text_length` ids around a picture, `new_tokens` ids each.

    `same_picture`: all conversations are about one picture. The loop without a cache takes so long that it makes only
    the first `plain_tokens` ids of one answer.
    """

    batch_size: int = Field(8, ge=1)
    text_length: int = Field(60, ge=2)
    text_before_image: int = Field(40, ge=0)
    new_tokens: int = Field(48, ge=2)
    plain_tokens: int = Field(4, ge=2)
    same_picture: bool = False
    seed: int = 0


def random_prompts(config: UniTokMLLMConfig, work: ChatWork) -> list[Prompt]:
    """Random words around a picture of random codes; as in a chat, all prompts begin with the same words."""
    rng, marks = torch_rng("chat speed", work.seed), {config.begin_image_id, config.end_image_id, config.image_token_id}
    words = torch.tensor([index for index in range(config.text_config.vocab_size) if index not in marks])
    images = 1 if work.same_picture else work.batch_size
    codes = torch.randint(
        config.codebook_size, (images, config.num_codebooks, config.num_image_positions), generator=rng
    )
    texts = words[torch.randint(len(words), (work.batch_size, work.text_length), generator=rng)].tolist()
    before, picture = texts[0][: work.text_before_image], [config.image_token_id] * config.num_image_positions
    return [
        Prompt(before + picture + text[len(before) :], codes[row % images : row % images + 1])
        for row, text in enumerate(texts)
    ]


def answer_speed(model: UniTokMLLM, work: ChatWork | None = None, repeats: int = 5) -> list[dict[str, Any]]:
    """A row for each way of answering, the BASELINE first.

    A row holds `way`, `batch`, `seconds` and `answer_tokens_per_second` of whole answers, `decode_tokens_per_second`
    (all ids but the first, which waits for the prompt; None where they took no measurable time), `ratio` of the whole
    answers' rate to the baseline's, and `same_ids` as the baseline. Raises UserError where prompt and answer do not fit
    the backbone.
    """
    work = work or ChatWork()
    needed = work.text_length + model.config.num_image_positions + work.new_tokens
    limit = model.config.context_length
    if limit is not None and needed > limit:
        raise UserError(f"prompt and answer have {needed} positions, but the backbone reads {limit}: make them shorter")
    prompts = [Prompt(one.ids, one.codes.to(model.device)) for one in random_prompts(model.config, work)]
    ways: dict[str, tuple[Way, list[Prompt], int]] = {
        BASELINE: (generated, prompts, work.new_tokens),
        "chat, one at a time": (alone, prompts, work.new_tokens),
        f"chat, batch of {work.batch_size}": (together, prompts, work.new_tokens),
        "plain loop without a cache": (recomputed, prompts[:1], min(work.plain_tokens, work.new_tokens)),
    }
    whole, first, answers = (dict[str, float](), dict[str, float](), dict[str, Answers]())
    for _ in range(repeats):
        for name, (way, own, tokens) in ways.items():
            seconds, answers[name] = _timed(lambda way=way, own=own, tokens=tokens: way(model, own, tokens), model)
            whole[name] = min(seconds, whole.get(name, seconds))
            seconds, _ = _timed(lambda way=way, own=own: way(model, own, 1), model)
            first[name] = min(seconds, first.get(name, seconds))
    rows = []
    for name, (_, own, tokens) in ways.items():
        rate, decoding = len(own) * tokens / whole[name], whole[name] - first[name]
        rows.append(
            {
                "way": name,
                "batch": len(own) if ways[name][0] is together else 1,
                "seconds": whole[name],
                "answer_tokens_per_second": rate,
                "decode_tokens_per_second": len(own) * (tokens - 1) / decoding if decoding > 0 else None,
                "ratio": rate / (len(prompts) * work.new_tokens / whole[BASELINE]),
                "same_ids": answers[name] == [one[:tokens] for one in answers[BASELINE][: len(own)]],
            }
        )
    return rows


def generated(model: UniTokMLLM, prompts: list[Prompt], new_tokens: int) -> Answers:
    """transformers' `generate` with its growing cache, one conversation after the other."""
    answers = []
    for prompt in prompts:
        input_ids = torch.tensor([prompt.ids], device=model.device)
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            codes=prompt.codes,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=PAD_ID,
        )
        answers.append(output[0, len(prompt.ids) :].tolist())
    return answers


def alone(model: UniTokMLLM, prompts: list[Prompt], new_tokens: int) -> Answers:
    """The chat engine, one conversation after the other."""
    return [generate_answers(model, [prompt], None, PAD_ID, new_tokens)[0] for prompt in prompts]


def together(model: UniTokMLLM, prompts: list[Prompt], new_tokens: int) -> Answers:
    """The chat engine, all conversations in one batch."""
    return generate_answers(model, prompts, None, PAD_ID, new_tokens)


@torch.no_grad()
def recomputed(model: UniTokMLLM, prompts: list[Prompt], new_tokens: int) -> Answers:
    """No cache: every id after a pass over the whole conversation."""
    suppressed, answers = model.suppressed_ids(), []
    for prompt in prompts:
        ids = list(prompt.ids)
        for _ in range(new_tokens):
            logits_V = model(input_ids=torch.tensor([ids], device=model.device), codes=prompt.codes).logits[0, -1]
            logits_V[suppressed] = -torch.inf
            ids.append(int(logits_V.argmax()))
        answers.append(ids[len(prompt.ids) :])
    return answers


def _timed(function: Callable[[], Answers], model: UniTokMLLM) -> tuple[float, Answers]:
    """Seconds of a call: of the process on a CPU, which others share; by the clock on a GPU. And what it gave."""
    on_gpu = model.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    start = clock()
    result = function()  # ids in lists: a GPU is waited for
    return clock() - start, result
