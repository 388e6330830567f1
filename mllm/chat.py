"""Answers in text: several conversations decoded together, and one whose keys and values are kept from turn to turn.

Everything here works on ids and codes; `unitok.mllm.session` and `unitok.mllm.pipeline` are about texts and images.

B conversations (rows), T positions, D model width, V text vocabulary, I images of a conversation, K codebooks, L image
positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from unitok.core.errors import UserError
from unitok.core.onednn import wide_products
from unitok.core.rng import torch_rng
from unitok.mllm.backbone_steps import LIKE_LLAMA, POSITIONS_AT_ONCE, LlamaSteps, check_steps, why_generic
from unitok.mllm.growing_cache import GrowingLayer
from unitok.mllm.model import UniTokMLLM
from unitok.mllm.sampler import check_filter, check_logits, check_temperature, draw, filter_logits
from unitok.mllm.sequence import pad_left

ROOM = 128  # positions that a kept conversation's buffers grow by
LEAST_SAVED = 128  # positions of a batch that are worth a pass of their own


@dataclass(frozen=True)
class Prompt:
    """Ids of a conversation up to where the answer begins, and codes `[I, K, L]` of its images in their order."""

    ids: Sequence[int]
    codes: Tensor | None = None


@dataclass(frozen=True)
class TextSampling:
    """How the next id is chosen: the likeliest, or drawn after temperature, top-k (0: off) and nucleus filtering.

    Raises UserError for settings out of range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.do_sample:
            check_temperature([self.temperature])
        check_filter([self.top_k], [self.top_p])

    def choose(self, logits_BV: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Ids `[B]`; every row has a generator of its own, so that it does not depend on its neighbours.

        NonFiniteError for logits of a broken model.
        """
        check_logits(logits_BV.amax(dim=-1))
        if not self.do_sample:
            return logits_BV.argmax(dim=-1)
        logits_BV = filter_logits(logits_BV.float(), self.temperature, self.top_k, self.top_p)
        uniform_BV = torch.empty_like(logits_BV)
        for own, generator in zip(uniform_BV, generators, strict=True):
            own.uniform_(generator=generator)
        return draw(logits_BV, uniform_BV)


class TextRows:
    """Rows of ids inside the backbone: their keys and values, and which positions are not padding."""

    def __init__(self, model: UniTokMLLM, room: int) -> None:
        check_steps(model.backbone)
        self.model = model
        self.mask_BT: Tensor | None = None  # True for what is no padding; None before the first pass
        self.padded = False
        self.cache = DynamicCache(config=model.config.text_config)
        # Layers of another kind (sliding windows) stay what they are.
        self.cache.layers = [GrowingLayer(room) if type(one) is DynamicLayer else one for one in self.cache.layers]
        self.plain = all(isinstance(one, GrowingLayer) for one in self.cache.layers)
        # Padding within a row counts in a sliding window, and wherever a family takes distances from slots.
        self.gaps = self.plain and isinstance(model.backbone, LIKE_LLAMA)
        self.room, self.steps = room, None  # `LlamaSteps` in place of the cache, from `start` on, where they serve
        self._suppressed = torch.tensor(model.suppressed_ids(), dtype=torch.long, device=model.device)

    def start(self, prompts: Sequence[Prompt], pad_id: int) -> Tensor:
        """Feed the prompts; logits `[B, V]` of the first ids of their answers.

        Questions about one picture share what stands before them, and conversations about different pictures the
        system prompt: what is shared goes through the backbone once.
        """
        beginnings, owners = shared_beginnings(prompts, self.model.config.image_token_id)
        cuts = [len(beginnings[owner].ids) for owner in owners]
        rests = [Prompt(prompt.ids[cut:]) for prompt, cut in zip(prompts, cuts, strict=True)]
        apart = len(beginnings) == len(prompts) or not self._may_follow(rests)
        lengths = [[len(one.ids) for one in group] for group in (prompts, beginnings)]
        slots = self.room + max(lengths[0]) + (0 if apart else max(lengths[1]))
        if self.plain and why_generic(self.model.backbone, slots) is None:
            rows, like = len(prompts if apart else beginnings), self.model.lm_head.weight.new_empty(0)
            self.steps = LlamaSteps(self.model.backbone, rows, slots, like, zeroed=False)
        if apart:
            return self._feed_with_shared_text(prompts, pad_id)
        self._feed_with_shared_text(beginnings, pad_id)
        self.select(owners)
        return self._feed_padded(rests, pad_id)

    def _may_follow(self, rests: Sequence[Prompt]) -> bool:
        """Whether these may be fed behind what is shared, also where shorter ones get padding in between."""
        return self.gaps or (self.plain and len({len(rest.ids) for rest in rests}) == 1)

    def _feed_with_shared_text(self, prompts: Sequence[Prompt], pad_id: int) -> Tensor:
        """The first pass: of the text that all prompts begin with, before their pictures, one row is enough."""
        length = shared_text([prompt.ids for prompt in prompts], self.model.config.image_token_id)
        rests = [Prompt(prompt.ids[length:], prompt.codes) for prompt in prompts]
        if not self._may_follow(rests) or length * (len(prompts) - 1) < LEAST_SAVED:
            return self._feed_padded(prompts, pad_id)
        self._feed_padded([Prompt(prompts[0].ids[:length])], pad_id)
        if self.steps is None:
            self.select([0] * len(prompts))
        else:
            self.steps.spread(length)
            self.mask_BT = self.mask_BT.expand(len(prompts), -1)
        return self._feed_padded(rests, pad_id)

    def _feed_padded(self, prompts: Sequence[Prompt], pad_id: int) -> Tensor:
        input_ids, mask_BT = (one.to(self.model.device) for one in pad_left([one.ids for one in prompts], pad_id))
        codes = [prompt.codes for prompt in prompts if prompt.codes is not None]
        return self.feed(input_ids, torch.cat(codes) if codes else None, mask_BT.bool())

    def feed(self, input_ids: Tensor, codes: Tensor | None = None, mask_BT: Tensor | None = None) -> Tensor:
        """Append ids `[B, T]` and the codes of the images among them; text logits `[B, V]` after the last one, with
        -inf for what no answer may hold. `mask_BT`: False for padding."""
        new_BT = torch.ones_like(input_ids, dtype=torch.bool) if mask_BT is None else mask_BT
        self.padded = self.padded or not (mask_BT is None or bool(mask_BT.all()))
        now_BT = new_BT if self.mask_BT is None else torch.cat([self.mask_BT, new_BT], dim=1)
        with wide_products(input_ids):
            at_once = None
            if codes is not None and codes.device.type == "cpu":
                at_once = max(1, POSITIONS_AT_ONCE // codes.shape[-1])
            inputs_BTD = self.model.embed(input_ids, codes, at_once)
            hidden_BD = self._run(inputs_BTD, now_BT, follow=self.mask_BT is not None and mask_BT is None)
        self.mask_BT = now_BT
        return self.model.lm_head(hidden_BD).index_fill(-1, self._suppressed, -torch.inf)

    def _run(self, inputs_BTD: Tensor, now_BT: Tensor, follow: bool) -> Tensor:
        """The last hidden state `[B, D]`. `now_BT`: the mask with the new positions, which `follow` without padding."""
        if self.steps is None:
            return self.model.backbone(
                inputs_embeds=inputs_BTD,
                attention_mask=now_BT if self.padded else None,
                position_ids=(now_BT.cumsum(dim=1) - 1).clamp(min=0)[:, -inputs_BTD.shape[1] :],
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
        end = now_BT.shape[1]
        assert end <= self.steps.slots, f"{end} positions in {self.steps.slots} slots"
        if follow and inputs_BTD.shape[1] == 1:
            return self.steps(inputs_BTD[:, 0], end - 1, end)
        return self.steps.start(inputs_BTD, now_BT)

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows, each of which may be named several times."""
        index = torch.tensor(rows, device=self.model.device)
        (self.cache.batch_select_indices if self.steps is None else self.steps.select)(index)
        self.mask_BT = self.mask_BT[index]

    def cut(self, length: int) -> bool:
        """Forget all positions from `length` on; False where a layer has no way back. Not after `start`."""
        assert self.steps is None
        if not self.plain:
            layers = self.cache.layers
            return all(isinstance(layer, DynamicLayer) and layer.get_seq_length() == length for layer in layers)
        for layer in self.cache.layers:
            layer.cut(length)
        self.mask_BT = self.mask_BT[:, :length]
        return True


def shared_beginnings(prompts: Sequence[Prompt], image_id: int | None) -> tuple[list[Prompt], list[int]]:
    """The different beginnings of the prompts, and the number of each prompt's own.

    A beginning ends with the last picture (without one: after the first id). Where a prompt has nothing behind it, the
    prompts themselves are given.
    """
    cuts = []
    for prompt in prompts:
        pictures = [place for place, one in enumerate(prompt.ids) if one == image_id]
        cuts.append(pictures[-1] + 1 if pictures else 1)
    if any(cut >= len(prompt.ids) for cut, prompt in zip(cuts, prompts, strict=True)):
        return list(prompts), list(range(len(prompts)))
    numbers: dict[tuple, int] = {}
    beginnings, owners = [], []
    for cut, prompt in zip(cuts, prompts, strict=True):
        codes = None if prompt.codes is None else tuple(prompt.codes.flatten().tolist())
        owners.append(numbers.setdefault((tuple(prompt.ids[:cut]), codes), len(numbers)))
        if owners[-1] == len(beginnings):
            beginnings.append(Prompt(prompt.ids[:cut], prompt.codes))
    return beginnings, owners


def shared_text(rows: Sequence[Sequence[int]], image_id: int | None) -> int:
    """How many ids all rows begin with alike, without pictures and each row's last id."""
    length = 0
    for ids in zip(*(row[:-1] for row in rows), strict=False):
        if ids[0] == image_id or any(one != ids[0] for one in ids):
            break
        length += 1
    return length


@torch.no_grad()
def generate_answers(
    model: UniTokMLLM,
    prompts: Sequence[Prompt],
    eos_id: int | None,
    pad_id: int,
    max_new_tokens: int = 128,
    sampling: TextSampling | None = None,
    seeds: Sequence[int] | Tensor | None = None,
) -> list[list[int]]:
    """New ids of every prompt, without `eos_id` (None: nothing ends an answer but `max_new_tokens`).

    `seeds`: one per prompt where ids are drawn (None: 0 to B - 1); an answer depends on its own prompt and seed alone.
    """
    sampling = sampling or TextSampling()
    seeds = range(len(prompts)) if seeds is None else seeds
    seeds = seeds.tolist() if isinstance(seeds, Tensor) else seeds
    if len(seeds) != len(prompts):
        raise UserError(f"{len(seeds)} seeds for {len(prompts)} conversations: give one seed per conversation")
    generators = [torch_rng("answer", seed, device=model.device) for seed in seeds]
    answers: list[list[int]] = [[] for _ in prompts]
    rows = TextRows(model, room=max_new_tokens)
    logits_BV = rows.start(prompts, pad_id)
    owners = list(range(len(prompts)))  # whose answer each row is
    for step in range(max_new_tokens):
        ids_B = sampling.choose(logits_BV, [generators[owner] for owner in owners])
        going = []
        for row, (owner, new) in enumerate(zip(owners, ids_B.tolist(), strict=True)):
            if new != eos_id:
                answers[owner].append(new)
                going.append(row)
        if not going or step == max_new_tokens - 1:
            break
        if len(going) < len(owners):
            rows.select(going)
            owners, ids_B = [owners[row] for row in going], ids_B[going]
        logits_BV = rows.feed(ids_B.unsqueeze(1))
    return answers


class KeptConversation:
    """One conversation in the backbone, kept between its turns: a new prompt feeds only what was not yet fed.

    A prompt that changes earlier text or images is fed again from there on (from its beginning where the backbone has
    layers without a way back), so answers are always those of a fresh start. `positions_fed` counts all positions that
    went through the backbone.
    """

    def __init__(self, model: UniTokMLLM) -> None:
        self.model, self.positions_fed = model, 0
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self._rows, self._ids, self._codes = TextRows(self.model, ROOM), [], None

    @torch.no_grad()
    def answer(
        self,
        prompt: Prompt,
        eos_id: int | None,
        max_new_tokens: int = 128,
        sampling: TextSampling | None = None,
        seed: int = 0,
    ) -> Iterator[int]:
        """The new ids of one answer as they come, without `eos_id`. It may be left before its end."""
        sampling, generator = sampling or TextSampling(), torch_rng("answer", seed, device=self.model.device)
        known, images = self._rewind(prompt)
        more_images = prompt.codes is not None and len(prompt.codes) > images
        logits_1V = self._feed(list(prompt.ids[known:]), prompt.codes[images:] if more_images else None)
        for step in range(max_new_tokens):
            new = int(sampling.choose(logits_1V, [generator]))
            if new == eos_id:
                return
            yield new
            if step < max_new_tokens - 1:
                logits_1V = self._feed([new])

    def _rewind(self, prompt: Prompt) -> tuple[int, int]:
        """Forget what differs from `prompt`; how many of its ids and images are then in the cache."""
        known, images = 0, 0
        last = min(len(self._ids), len(prompt.ids) - 1)  # the last id is always fed: its logits begin the answer
        while known < last and self._ids[known] == prompt.ids[known]:
            is_image = prompt.ids[known] == self.model.config.image_token_id
            if is_image and not _same_image(self._codes, prompt.codes, images):
                break
            step = prompt.codes.shape[-1] if is_image else 1
            if known + step > last:
                break
            images += is_image
            known += step
        if known == 0 or not self._rows.cut(known):
            self.reset()
            known, images = 0, 0
        self._ids, self._codes = self._ids[:known], prompt.codes
        return known, images

    def _feed(self, ids: list[int], codes: Tensor | None = None) -> Tensor:
        logits_1V = self._rows.feed(torch.tensor([ids], device=self.model.device), codes)
        self._ids += ids
        self.positions_fed += len(ids)
        return logits_1V


def _same_image(held: Tensor | None, given: Tensor | None, index: int) -> bool:
    if held is None or given is None or index >= min(len(held), len(given)):
        return False
    return torch.equal(held[index], given[index])
