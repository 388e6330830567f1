"""The unified model for lm-eval, registered as `unitok`: questions about pictures, and text tasks beside `hf`.

Text is scored by lm-eval's own `hf` code on our model, so figures are those of `hf` on the same backbone. A question
about pictures is a chat turn, as in training; answers are decoded in batches, with keys and values kept, and pictures
that come again are encoded once.

B rows, T positions, V text vocabulary, N positions of a continuation.
"""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor

from unitok.core.distributed import all_gather_object, barrier, inference_device, is_distributed, rank, world_size
from unitok.core.errors import DataError, UserError
from unitok.core.rng import torch_rng
from unitok.data.conversations import IMAGE_MARK, Turn
from unitok.eval.lazy_pictures import opened
from unitok.eval.progress import batches, progress
from unitok.mllm.chat import Prompt, TextRows, TextSampling
from unitok.mllm.pipeline import UniTokPipeline

_LOGGER = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NO_LIMIT = 2048  # positions, where a backbone names no limit: lm-eval's own default
_HF_OPTIONS = {"add_bos_token", "prefix_token_id", "truncation", "logits_cache", "softmax_dtype"}
_OPTION_NAMES = ", ".join(["pretrained", "dtype", "max_length", "seed", *sorted(_HF_OPTIONS)])
_SAMPLING = ("top_k", "top_p")


@register_model("unitok")
class UniTokLM(HFLM):
    """lm-eval's view of an export folder (`pretrained`), or of a pipeline that is there already.

    Args:
        batch_size: rows decoded or scored together; a number.
        dtype: of the unified model: float32, bfloat16 or float16.
        seed: of drawn answers (`do_sample`); each request has a generator of its own.
        options: those of `hf` that are about texts.
    """

    MULTIMODAL = True

    def __init__(
        self,
        pretrained: str | UniTokPipeline | None = None,
        batch_size: int | str = 32,
        device: str | None = None,
        dtype: str = "float32",
        max_length: int | None = None,
        seed: int = 0,
        max_batch_size: int | None = None,  # lm-eval gives it always; it belongs to batch_size=auto
        **options: Any,
    ) -> None:
        if pretrained is None:
            raise UserError("--model_args has no pretrained=DIR: name the export folder of a unified model")
        if unknown := sorted(set(options) - _HF_OPTIONS):
            raise UserError(f"--model_args {unknown[0]}={options[unknown[0]]}: unknown; known are {_OPTION_NAMES}")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch_size={batch_size}: expected a whole number of at least 1")
        if dtype not in _DTYPES:
            raise UserError(f"dtype={dtype}: expected one of {', '.join(_DTYPES)}")
        self.pipeline = _open(pretrained, device, _DTYPES[dtype])
        model, self.processor = self.pipeline.model, self.pipeline.processor
        limit = model.config.context_length
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=self.processor.tokenizer,
            batch_size=int(batch_size),
            max_length=int(max_length or limit or _NO_LIMIT),
            **options,
        )
        self.seed, self._templated = seed, False
        self.folder = pretrained if isinstance(pretrained, str) else None
        self._rank, self._world_size = (rank(), world_size()) if is_distributed() else (0, 1)

    # ---- Of several ranks each answers its share (lm-eval cuts the documents)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack([one.to(self.device) for one in all_gather_object(tensor.cpu())])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        found = all_gather_object(obj)
        return found if self.rank == dst else None

    def barrier(self) -> None:
        barrier()

    # ---- Chat template

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """Text tasks as conversations (`--apply_chat_template`), in the model's own layout."""
        self._templated = True
        return self.processor.apply_chat_template(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        self._templated = bool(chat_template)
        return self.processor.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return str(self.folder or self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What was measured: parameters, precision, the SHA-256 of the weights where they came from a folder, what else
        decides the answers, and the documents that were asked (lm-eval's file has no other place for them)."""
        from unitok.eval.benchmark_data import loaded_documents
        from unitok.eval.results import checkpoint_hash

        model = self.pipeline.model
        return {
            "model_num_parameters": model.num_parameters(),
            "model_dtype": str(model.dtype),
            "model_revision": None,
            "model_sha": checkpoint_hash(self.folder) if self.folder else None,
            "embedder_cache": model.config.embedder_cache,
            "weights": model.weight_kind,
            "documents": loaded_documents(),
        }

    # ---- Generation

    @torch.no_grad()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers of (context, settings) and, about pictures, (context, settings, {"visual": pictures})."""
        answers = [""] * len(requests)
        generators = self._generators(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        for indices in groups.values():
            settings = normalize_gen_kwargs(dict(requests[indices[0]].args[1]), self.max_gen_toks)
            until = handle_stop_sequences(settings.get("until"), self.tokenizer.eos_token)
            sampling, new = _sampling(settings), settings["max_gen_toks"]
            for rows in progress(batches(len(indices), self.batch_size), "answering"):
                part = [indices[row] for row in rows]
                prompts = self._prompts([requests[index].args for index in part], new)
                found = self._continue(prompts, new, sampling, [generators[index] for index in part], until)
                for index, text in zip(part, found, strict=True):
                    answers[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return answers

    def _generators(self, requests: Sequence[Instance]) -> list[torch.Generator]:
        """One for each request, by its task, document and repetition: the same on any number of ranks."""
        seen: Counter[tuple] = Counter()
        out = []
        for request in requests:
            place = (request.task_name or "", request.doc_id or 0, request.idx)
            parts = ("lm-eval", self.seed, *place, seen[place])
            out.append(torch_rng(*parts, device=self.pipeline.model.device))
            seen[place] += 1
        return out

    def _prompts(self, arguments: Sequence[tuple], new: int) -> list[Prompt]:
        """Ids, and codes of pictures. A text is cut at its beginning where it is too long, as `hf` does; a question
        about pictures never (UserError)."""
        if self.max_length <= new:
            raise UserError(f"max_gen_toks={new}: the backbone reads {self.max_length} positions in all; ask for fewer")
        pictures = [list(one[2]["visual"] or []) if len(one) > 2 else None for one in arguments]
        codes = self.pipeline.image_codes([opened(picture) for own in pictures for picture in own or []])
        prompts = []
        for (context, *_), own in zip(arguments, pictures, strict=True):
            if own is None:
                room = self.max_length - new
                ids = self.tok_encode(context, left_truncate_len=room) if context else [self.prefix_token_id]
                prompts.append(Prompt(ids))
                continue
            ids = self._question(context, len(own)).ids
            if len(ids) + new > self.max_length:
                raise UserError(
                    f"a question of {len(ids)} positions and {new} new ones: the backbone reads {self.max_length}; "
                    "give fewer pictures or a smaller max_gen_toks"
                )
            prompts.append(Prompt(ids, torch.stack(codes[: len(own)]) if own else None))
            codes = codes[len(own) :]
        return prompts

    def _question(self, context: str, count: int, answer: str | None = None) -> Any:
        """The sequence of a chat turn with `count` pictures: where the text has marks, else before it."""
        marks = context.count(IMAGE_MARK)
        if marks not in (0, count) or (self._templated and marks != count):
            hint = "; leave --apply_chat_template off, questions about pictures are chat turns anyway"
            raise UserError(
                f"{marks} x {IMAGE_MARK} in a question with {count} pictures: expected as many, or none"
                f"{hint if self._templated else ''}"
            )
        if self._templated:
            raise UserError("--apply_chat_template: leave it off, questions about pictures are chat turns anyway")
        turns = [Turn("user", context if marks else (IMAGE_MARK + "\n") * count + context)]
        if answer is not None:
            turns.append(Turn("assistant", answer))
        return self.processor.builder.chat(turns, prompt=answer is None)

    def _continue(
        self,
        prompts: Sequence[Prompt],
        new: int,
        sampling: TextSampling,
        generators: Sequence[torch.Generator],
        until: Sequence[str],
    ) -> list[str]:
        """What follows each prompt, up to the first of `until`; a row that has ended takes no more time."""
        rows = TextRows(self.pipeline.model, room=new)
        logits_BV = rows.start(prompts, self.tokenizer.pad_token_id)
        answers: list[list[int]] = [[] for _ in prompts]
        owners = list(range(len(prompts)))
        for step in range(new):
            ids_B = sampling.choose(logits_BV, [generators[owner] for owner in owners])
            going = []
            for row, (owner, one) in enumerate(zip(owners, ids_B.tolist(), strict=True)):
                if one == self.eot_token_id:
                    continue
                answers[owner].append(one)
                if not _stopped(self.tok_decode(answers[owner]), until):
                    going.append(row)
            if not going or step == new - 1:
                break
            if len(going) < len(owners):
                rows.select(going)
                owners, ids_B = [owners[row] for row in going], ids_B[going]
            logits_BV = rows.feed(ids_B.unsqueeze(1))
        return [postprocess_generated_text(self.tok_decode(ids), list(until), None) for ids in answers]

    # ---- Likelihood

    @torch.no_grad()
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, is it the likeliest?) of continuations: of texts as `hf` does, of answers to questions
        about pictures as the assistant's turn (without the end of the turn)."""
        found: dict[int, tuple[float, bool]] = {}
        texts = [index for index, request in enumerate(requests) if len(request.args) < 3]
        if texts:
            scores = super().loglikelihood([requests[index] for index in texts], disable_tqdm)
            found |= dict(zip(texts, scores, strict=True))
        about = [index for index, request in enumerate(requests) if len(request.args) > 2]
        for rows in progress(batches(len(about), self.batch_size), "scoring"):
            part = [about[row] for row in rows]
            arguments = [requests[index].args for index in part]
            for index, score in zip(part, self._score(arguments), strict=True):
                found[index] = score
                self.cache_hook.add_partial("loglikelihood", requests[index].args, score)
        return [found[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As `hf`; DataError for pictures, which have no likelihood as a text."""
        if any(len(request.args) > 1 for request in requests):
            raise DataError("loglikelihood_rolling of a document with pictures: only texts have one")
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def _score(self, arguments: Sequence[tuple]) -> list[tuple[float, bool]]:
        prompts = self._prompts([(context, None, more) for context, _, more in arguments], 1)
        answers = [self._answer_ids(one, prompt) for one, prompt in zip(arguments, prompts, strict=True)]
        model, device = self.pipeline.model, self.pipeline.model.device
        rows = [[*prompt.ids, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        length = max(map(len, rows))
        if length > self.max_length:
            raise UserError(f"a question and answer of {length} positions: the backbone reads {self.max_length}")
        pad = self.tokenizer.pad_token_id
        ids_BT = torch.tensor([row + [pad] * (length - len(row)) for row in rows], device=device)
        mask_BT = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
        codes = [prompt.codes for prompt in prompts if prompt.codes is not None]
        hidden_BTD = model.backbone(
            inputs_embeds=model.embed(ids_BT, torch.cat(codes) if codes else None),
            attention_mask=mask_BT,
            use_cache=False,
        ).last_hidden_state
        scores = []
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            start = len(prompt.ids) - 1
            logits_NV = model.lm_head(hidden_BTD[row, start : start + len(answer)]).float()
            wanted_N = torch.tensor(answer, device=device)
            log_probs_N = logits_NV.log_softmax(-1).gather(1, wanted_N[:, None])[:, 0]
            scores.append((log_probs_N.sum().item(), bool((logits_NV.argmax(-1) == wanted_N).all())))
        return scores

    def _answer_ids(self, arguments: tuple, prompt: Prompt) -> list[int]:
        """Ids of the continuation as the assistant's turn is tokenized in training, without what ends it."""
        context, continuation, more = arguments
        ids = self._question(context, len(more["visual"] or []), continuation.strip()).ids
        assert ids[: len(prompt.ids)] == list(prompt.ids), (ids, prompt.ids)
        answer = ids[len(prompt.ids) : -1]
        if not answer:
            raise DataError(f"choice {continuation!r}: has no text to score")
        return answer


def _open(pretrained: str | UniTokPipeline, device: str | None, dtype: torch.dtype) -> UniTokPipeline:
    if isinstance(pretrained, UniTokPipeline):
        return pretrained
    if device and device.startswith("cuda") and not torch.cuda.is_available():
        _LOGGER.warning("device %s (lm-eval's default): no GPU here, running on the CPU", device)
        device = None
    if device == "cuda:0" and is_distributed():
        device = None  # lm-eval's default too: each rank has a GPU of its own
    return UniTokPipeline.from_pretrained(Path(pretrained), device or inference_device(), dtype)


def _stopped(text: str, until: Sequence[str]) -> bool:
    return any(stop and stop in text for stop in until)


def _sampling(settings: dict[str, Any]) -> TextSampling:
    """UserError for a setting that our sampler does not have."""
    known = {"until", "do_sample", "max_gen_toks", "temperature", *_SAMPLING}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise UserError(
            f"generation setting {unknown[0]}={settings[unknown[0]]!r}: known are {', '.join(sorted(known))}"
        )
    if not settings["do_sample"]:
        return TextSampling()
    chosen = {name: settings[name] for name in _SAMPLING if name in settings}
    return TextSampling(do_sample=True, temperature=settings["temperature"], **chosen)
