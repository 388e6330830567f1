"""Stage two as a training task: mixed batches of text-to-image, captioning, chat and text over code shards."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unitok.core.bad_share import Reading
from unitok.core.distributed import all_reduce_sum_, training_device, world_size
from unitok.core.errors import CheckpointError, DataError
from unitok.core.pretrained import load_model_folder
from unitok.core.rng import derive_seed, numpy_rng
from unitok.core.run import resumed_folder
from unitok.core.same_run import check_same_mixture
from unitok.core.task import Network, Task
from unitok.data.bad import SampleError
from unitok.data.captions import paraphrase
from unitok.data.code_mixtures import CodeMixture, open_codes
from unitok.data.codes import PREPROCESS, TEXT_ONLY, CodeSample, CodeSource
from unitok.data.conversations import IMAGE_MARK, Turn
from unitok.data.packing import first_fit_decreasing
from unitok.data.texts import TextOrder, TextSource
from unitok.mllm.build import build_model, build_text_tokenizer
from unitok.mllm.configuration import IGNORE, UniTokMLLMConfig
from unitok.mllm.lora import merged_state
from unitok.mllm.losses import LossSums
from unitok.mllm.mixture import captions_for, drawn, has_words, warn_of_missing_words
from unitok.mllm.model import UniTokMLLM
from unitok.mllm.packing import check_packing
from unitok.mllm.pipeline import TOKENIZER_FOLDER
from unitok.mllm.processor import UniTokProcessor
from unitok.mllm.recipes import check_recipe
from unitok.mllm.sequence import Sequence, SequenceBuilder, TooLongError, pack_right, pad_right
from unitok.mllm.settings import KINDS, Kind, MllmTrainConfig, SamplerDefaults
from unitok.mllm.start import load_start, prepare_model
from unitok.tokenizer import UniTok
from unitok.tokenizer.extract import fingerprint

_LOGGER = logging.getLogger(__name__)

_TOKENIZER_DOCUMENTS = 10_000  # of `data.texts`, for a text tokenizer trained on the data


class Loaded(NamedTuple):
    """What one place of a batch holds: codes `[I, K, L]` (or latents) of its images and what is learnt of them; whether
    its own sample is bad, and another one stands in; codes that are read in place of those learnt, if any."""

    kind: Kind
    codes: Tensor
    sequence: Sequence
    bad: bool = False
    input_codes: Tensor | None = None
    key: str = ""  # of the sample that was read


class _LossForward(nn.Module):
    """What the training engine calls: the model's loss sums as `forward`."""

    def __init__(self, model: UniTokMLLM) -> None:
        super().__init__()
        self.model = model
        self._may_pack = False

    def forward(self, **batch: Any) -> LossSums:
        if "position_ids" in batch and not self._may_pack:
            check_packing(self.model)  # only here everything is as in training, and nothing has been trained yet
            self._may_pack = True
        return self.model.losses(**batch)

    def no_weight_decay(self) -> set[str]:
        return {f"model.{name}" for name in self.model.no_weight_decay()}


class MllmTask(Task):
    """One network, "mllm"."""

    name = "mllm"
    # places are told by the tokenizer's fingerprint in the codes' header and in the checkpoint; the sampler is exported
    incidental = (
        "tokenizer", "data.codes", "data.max_bad_fraction", "attention", "cross_entropy", "gradient_checkpointing",
        *(f"sampler.{name}" for name in SamplerDefaults.model_fields),
    )  # fmt: skip
    switches = ("data.mixture.text_to_image",)  # without it the depth transformer does not train
    decisive = ("recipe", "lora", "lora.rank", "lora.alpha", "lora.targets")
    headline = ("loss", "image", "text")

    def __init__(self, config: MllmTrainConfig) -> None:
        check_recipe(config)
        self.config, data = config, config.data
        folder = config.tokenizer if config.init_from is None else Path(config.init_from) / TOKENIZER_FOLDER
        self.visual = load_model_folder(UniTok, folder).eval().requires_grad_(False)
        sizes = self.visual.config
        expected = {
            "tokenizer": fingerprint(self.visual),
            "num_codebooks": sizes.num_codebooks,
            "codebook_size": sizes.codebook_size,
            "image_size": sizes.image_size,
            "num_positions": sizes.num_positions,
        }
        options = (data.max_bad_fraction, data.classes, config.seed, sizes.preprocess)
        self.source = open_codes(data.codes, expected, *options)
        self.members = self.source.names if isinstance(self.source, CodeMixture) else []
        self.text_only = self.source.header[TEXT_ONLY]  # conversations without an image
        self.texts = TextSource(data.texts, data.max_bad_fraction) if data.texts else None
        share = data.mixture.text / data.mixture.total
        self.text_order = TextOrder(len(self.source), share, len(self.texts), config.seed) if self.texts else None
        self.epochs_differ = bool(self.members) or self.texts is not None
        self._logged_kinds = [kind for kind in KINDS if getattr(data.mixture, kind) > 0]
        self.builder: SequenceBuilder | None = None
        self._counts: dict[str, float] = {}

    @property
    def num_samples(self) -> int:
        return len(self.source)

    @property
    def shard_sizes(self) -> list[int] | None:
        return self.source.reader.sizes if isinstance(self.source, CodeSource) else None

    def readings(self) -> list[Reading]:
        limit, source = self.config.data.max_bad_fraction, self.source
        if isinstance(source, CodeMixture):
            members = zip(self.members, source.parts, source.counts, strict=True)
            found = [Reading(name, len(part), count, limit) for name, part, count in members]
        else:
            found = [Reading(source.name, len(source), len(source), limit)]
        if self.texts is not None and self.text_order is not None:
            found.append(Reading("data.texts", len(self.texts), self.text_order.per_epoch, limit))
        return found

    def places(self, batch: dict[str, Any]) -> Tensor:
        return batch["places"]

    def build(self) -> dict[str, Network]:
        """The network with the same weights on every rank."""
        config = self.config
        # How the processor treats them: as they were for the codes that are read, whatever the start did
        self._pictures: dict[str, Any] = {"image_preprocess": self.visual.config.preprocess}
        if config.init_from is not None:
            model, processor = load_start(config.init_from, self.visual, config.engine)
            self.text_tokenizer = processor.tokenizer
            self._pictures = {name: getattr(processor, name) for name in ("image_preprocess", "truncate_pixels")}
        else:
            model = self._new_model()
        if any(getattr(config.data.mixture, kind) > 0 for kind in KINDS if kind not in ("text_to_image", "text")):
            self._pictures["image_preprocess"] = self.source.header[PREPROCESS]
        # Apart from generate()'s own fields: those are for text, which is answered greedily.
        sampler, start = config.sampler.model_dump(), getattr(model.generation_config, "image_sampler", None)
        if start and (changed := {name: value for name, value in start.items() if sampler.get(name) != value}):
            others = ", ".join(f"sampler.{name}={value}" for name, value in changed.items())
            _LOGGER.warning("%s draws with %s, what is trained here will not, unless told so", config.init_from, others)
        model.generation_config.image_sampler = sampler
        prepare_model(model, config, training_device(config.device))
        self._look_at_shards(model.config)
        warn_of_missing_words(self.source, config.data.mixture)
        data = config.data
        self.builder = SequenceBuilder(model.config, self.text_tokenizer, data.max_length, data.max_caption)
        self.pad_id = self.text_tokenizer.pad_token_id
        return {"mllm": Network(_LossForward(model), config.optimizer, config.ema_decay)}

    def _look_at_shards(self, config: UniTokMLLMConfig) -> None:
        """Ask for what the model reads: codes `[K, L]` or latents `[C, L]`."""
        self.continuous = config.visual_input == "continuous"
        if self.continuous:
            self.source.read_latents()
            self._no_images = torch.zeros(0, config.code_width, config.num_image_positions, dtype=torch.float16)
        else:
            self._no_images = torch.zeros(0, config.num_codebooks, config.num_image_positions, dtype=torch.int64)

    def _new_model(self) -> UniTokMLLM:
        config, settings = self.config, self.config.model
        symbols = [text.strip() for text in (settings.user_prefix, settings.assistant_prefix) if text.strip()]
        folder, resumed = Path(config.output_dir), resumed_folder(config)
        self.text_tokenizer = build_text_tokenizer(config.backbone, self._words, symbols, folder, resumed)
        torch.manual_seed(derive_seed("mllm", config.seed))
        return build_model(settings, config.backbone, self.text_tokenizer, self.visual, config.engine)

    def _words(self) -> list[str]:
        """Everything that will be tokenized (of documents a part), for a text tokenizer trained on the data."""
        settings = self.config.model
        texts = {settings.instruction_suffix, settings.unconditional_text, settings.system_prompt}
        for source, index in ((part, index) for part in self.source.parts for index in range(len(part))):
            sample = source.first_good(index, source.text)
            texts |= set(sample.captions)
            texts |= {text for question in sample.questions for text in (question.question, question.answer)}
            if self.config.data.paraphrase:
                rng = numpy_rng("words", index)
                texts |= {paraphrase(question.question, rng) for question in sample.questions}
            texts |= {turn.content for conversation in sample.conversations for turn in conversation}
        if self.texts is not None:
            step = max(1, len(self.texts) // _TOKENIZER_DOCUMENTS)
            texts |= {
                self.texts.first_good(number, self.texts.__getitem__) for number in range(0, len(self.texts), step)
            }
        return sorted(text.replace(IMAGE_MARK, " ").strip() for text in texts if text.strip())

    def load_batch(self, indices: list[int], epoch: int) -> dict[str, Any]:
        """One batch, right-padded or packed; what each place is used for depends on (seed, epoch, index) alone."""
        loaded = [self._load(*self.place(index, epoch)) for index in indices]
        kinds, places = self._count(indices, loaded), self._places(indices, loaded)
        keys = [one.key for one in loaded]  # in the order of `indices`
        sequences = [one.sequence for one in loaded]
        if self.config.data.pack:
            rows = first_fit_decreasing([len(one.ids) for one in sequences], self.config.data.max_length)
            input_ids, position_ids, labels = pack_right(sequences, rows, self.pad_id)
            layout = {"position_ids": position_ids}
            loaded = [loaded[number] for row in rows for number in row]
        else:
            input_ids, mask, labels = pad_right(sequences, self.pad_id)
            layout = {"attention_mask": mask}
        # a batch may have no image (documents, conversations that name none), and still runs through the whole model
        learn_image = [flag for one in loaded for flag in one.sequence.learn_image]
        return {
            "input_ids": input_ids,
            **layout,
            "labels": labels,
            "codes": torch.cat([one.codes for one in loaded]),
            **self._input_codes(loaded),
            "learn_image": torch.tensor(learn_image, dtype=torch.bool),
            "kinds": kinds,
            "places": places,
            "keys": keys,
        }

    def _input_codes(self, loaded: list[Loaded]) -> dict[str, Tensor]:
        if not self.config.data.code_noise:
            return {}
        read = [one.codes if one.input_codes is None else one.input_codes for one in loaded]
        return {"input_codes": torch.cat(read)}

    def _count(self, indices: list[int], loaded: list[Loaded]) -> Tensor:
        """How many samples are of each kind, cut, conversations without an image; and how many come from each member of
        a mixture (documents come from none), int64 `[kinds + 2 + members]`."""
        counts = [sum(one.kind == kind for one in loaded) for kind in KINDS]
        counts.append(sum(one.sequence.is_cut for one in loaded))
        counts.append(sum(one.kind == "chat" and not one.sequence.learn_image for one in loaded))
        if isinstance(self.source, CodeMixture):
            encoded = [index for index, one in zip(indices, loaded, strict=True) if one.kind != "text"]
            members = [self.source.member(index % self.num_samples) for index in encoded]
            counts += [members.count(number) for number in range(len(self.members))]
        return torch.tensor(counts)

    def _places(self, indices: list[int], loaded: list[Loaded]) -> Tensor:
        counts = [[0, 0] for _ in self.readings()]
        for index, one in zip(indices, loaded, strict=True):
            member = self.source.member(index % self.num_samples) if isinstance(self.source, CodeMixture) else 0
            count = counts[-1 if one.kind == "text" else member]  # documents are the last
            count[0] += 1
            count[1] += one.bad
        return torch.tensor(counts)

    def _load(self, index: int, epoch: int) -> Loaded:
        turn = None if self.text_order is None else self.text_order.turn(index, epoch)
        if turn is not None:
            return self._document(*turn)
        source, first = self.source.turn(index, epoch)
        place = index if self.members else None
        used, loaded = source.first_good(
            first, lambda number: (number, self._read(number, epoch, source, place)), always_bad=False
        )
        return loaded._replace(bad=used != first)

    def _document(self, number: int, part: int) -> Loaded:
        length = self.config.data.max_length
        used, sequence = self.texts.first_good(number, lambda n: (n, self.builder.text(self.texts[n], length, part)))
        return Loaded("text", self._no_images, sequence, bad=used != number, key=f"text {used}")

    def _read(self, number: int, epoch: int, source: CodeSource | None = None, place: int | None = None) -> Loaded:
        """Sample `number` and what is learnt from it; DataError when it is bad. What is drawn depends on its `place` in
        the epoch, where that is another one: of a mixture a sample may come twice in an epoch."""
        sample = (source or self.source)[number]
        try:
            kind, sequence = self._sequence(sample, number if place is None else place, epoch)
        except TooLongError as error:
            raise SampleError(f"{sample.key} is {error}", "too long") from None
        if not sequence.learn_image:
            return Loaded(kind, self._no_images, sequence, key=sample.key)
        image = sample.latents.T if self.continuous else sample.codes
        images = image.expand(len(sequence.learn_image), *image.shape)
        if kind != "text_to_image" or not self.config.data.code_noise:
            return Loaded(kind, images, sequence, key=sample.key)
        rng = numpy_rng("code noise", self.config.seed, epoch, number if place is None else place)
        return Loaded(kind, images, sequence, input_codes=self._with_noise(image, rng)[None], key=sample.key)

    def _with_noise(self, codes_KL: Tensor, rng: Any) -> Tensor:
        """Random codes in place of those of some positions."""
        is_noise_L = rng.random(codes_KL.shape[1]) < rng.random() * self.config.data.code_noise
        noise_KL = rng.integers(self.visual.config.codebook_size, size=codes_KL.shape)
        return torch.where(torch.from_numpy(is_noise_L), torch.from_numpy(noise_KL), codes_KL)

    def _sequence(self, sample: CodeSample, index: int, epoch: int) -> tuple[Kind, Sequence]:
        data, rng = self.config.data, numpy_rng("mixture", self.config.seed, epoch, index)
        shares = data.mixture
        kinds: dict[Kind, float] = {
            kind: getattr(shares, kind) * has_words(sample, kind) for kind in KINDS if kind != "text"
        }
        total = sum(kinds.values())
        if total <= 0:
            raise DataError(
                f"{sample.key} has nothing for the tasks of data.mixture: no caption, question or conversation"
            )
        kind: Kind = list(kinds)[drawn(list(kinds.values()), rng)]
        if kind == "chat":
            return kind, self.builder.chat(self._conversation(sample, rng))
        captions = captions_for(sample, kind)
        weights = [len(text.split()) ** data.caption_detail for text in captions]
        caption = captions[drawn(weights, rng)]
        if kind == "text_to_image":
            return kind, self.builder.text_to_image(caption, unconditional=bool(rng.random() < data.unconditional))
        return kind, self.builder.plain(caption) if kind == "plain" else self.builder.caption(caption)

    def _conversation(self, sample: CodeSample, rng: Any) -> list[Turn]:
        """One of the sample's conversations, or several of its questions one after the other."""
        if sample.conversations and (not sample.questions or rng.random() < 0.5):
            return sample.conversations[int(rng.integers(len(sample.conversations)))]
        chosen = rng.permutation(len(sample.questions))[: self.config.data.questions_per_image]
        turns: list[Turn] = []
        for position, number in enumerate(chosen):
            question = sample.questions[int(number)]
            image = IMAGE_MARK + "\n" if position == 0 else ""
            text = paraphrase(question.question, rng) if self.config.data.paraphrase else question.question
            turns += [Turn("user", image + text), Turn("assistant", question.answer)]
        return turns

    def sample_keys(self, indices: list[int], epoch: int) -> list[str]:
        """Keys of the encoded images; a place that a document takes is "text N"."""
        return [self._key(*self.place(index, epoch)) for index in indices]

    def batch_keys(self, batch: dict[str, Any], indices: list[int], epoch: int) -> list[str]:
        return batch["keys"]

    def _key(self, index: int, epoch: int) -> str:
        turn = None if self.text_order is None else self.text_order.turn(index, epoch)
        if turn is not None:
            return f"text {turn[0]}"
        source, number = self.source.turn(index, epoch)
        return source.text(number).key

    def prepare_step(self, batches: list[dict[str, Any]], step: int) -> None:
        """Count learnt ids and codes, and samples as `_count` does, of the whole step: over micro-batches and ranks."""
        counts = torch.zeros(2 + len(KINDS) + 2 + len(self.members), dtype=torch.float64)
        for batch in batches:
            counts[0] += (batch["labels"][:, 1:] != IGNORE).sum()
            counts[1] += batch["learn_image"].sum() * batch["codes"].shape[1] * batch["codes"].shape[2]
            counts[2:] += batch["kinds"]
        text, image, *samples = all_reduce_sum_(counts).tolist()
        # The engine averages over micro-batches and ranks; sums are scaled so that this gives sum / global count.
        self._counts = {
            "text": max(text, 1.0),
            "image": max(image, 1.0),
            "share": image / max(image + text, 1.0),
            "parts": len(batches) * world_size(),
            "has_image": image > 0,
            "has_text": text > 0,
        }
        kinds, (cut, text_only), members = samples[: len(KINDS)], samples[len(KINDS) :][:2], samples[len(KINDS) + 2 :]
        self._samples = {f"samples_{k}": n for k, n in zip(KINDS, kinds, strict=True) if k in self._logged_kinds}
        self._samples |= {"samples_cut": cut} | ({"samples_text_only": text_only} if self.text_only else {})
        self._samples |= {f"samples/{name}": n for name, n in zip(self.members, members, strict=True)}

    def micro_step(
        self, engines: dict[str, Any], batch: dict[str, Any], micro_index: int, step: int
    ) -> dict[str, Tensor]:
        engine, counts, config = engines["mllm"], self._counts, self.config
        inputs = {name: value for name, value in batch.items() if name not in ("kinds", "places", "keys")}
        sums = engine(**{name: value.to(engine.device) for name, value in inputs.items()})
        per_id, per_code = counts["parts"] / counts["text"], counts["parts"] / counts["image"]
        text, image, image_z = sums.text * per_id, sums.image * per_code, sums.image_z * per_code
        image_loss = config.image_weight * (image + config.image_z_weight * image_z)
        if config.loss_normalisation == "tokens":
            loss = counts["share"] * image_loss + (1 - counts["share"]) * text
        else:
            loss = (image_loss + text) / max(counts["has_image"] + counts["has_text"], 1)  # the other one is 0
        engine.backward(loss)
        metrics = {"loss": loss.detach()}
        if counts["has_image"]:  # of the whole step, so all ranks and micro-batches log the same names
            metrics["image"], metrics["image_z"] = image.detach(), image_z.detach()
            metrics["image_accuracy"] = sums.image_correct.sum() * per_code
        if counts["has_text"]:
            metrics["text"] = text.detach()
            metrics["text_accuracy"] = sums.text_correct * per_id
        return metrics | {name: torch.tensor(number) for name, number in self._samples.items()}

    def extra_state(self) -> dict[str, Any]:
        return {
            "visual_tokenizer": self.source.header["tokenizer"],
            "num_texts": 0 if self.texts is None else len(self.texts),
            "mixture": [[name, *share] for name, share in zip(self.members, self.source.shares, strict=True)]
            if isinstance(self.source, CodeMixture)
            else None,
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """CheckpointError when the codes are of another visual tokenizer than those the weights were trained on, or
        there are more or fewer documents, or members of a mixture share an epoch otherwise: the order would be another
        one."""
        present = self.extra_state()
        if state.get("num_texts", 0) != present["num_texts"]:
            raise CheckpointError(
                f"{self.config.output_dir}: the checkpoint was trained on {state.get('num_texts', 0)} documents, "
                f"data.texts now holds {present['num_texts']}; resume with the same texts"
            )
        check_same_mixture(self.config.output_dir, state.get("mixture"), present["mixture"])
        saved, present = state["visual_tokenizer"], present["visual_tokenizer"]
        if saved != present:
            raise CheckpointError(
                f"{self.config.output_dir}: the checkpoint was trained on codes of visual tokenizer {saved}, "
                f"{self.source.name} holds those of {present}; take another output_dir"
            )

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """Write the whole export folder: model, processor, visual tokenizer."""
        model = modules["mllm"].model
        model.save_pretrained(folder, state_dict=merged_state(model))
        size = self.visual.config.image_size
        UniTokProcessor(self.text_tokenizer, model.config, size, **self._pictures).save_pretrained(folder)
        self.visual.save_pretrained(folder / TOKENIZER_FOLDER)
