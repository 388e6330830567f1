"""Stage two as a training task: mixed batches of text-to-image, captioning and chat over code shards."""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from unitok.core.config import Config
from unitok.core.distributed import all_reduce_sum_, world_size
from unitok.core.errors import CheckpointError, DataError
from unitok.core.optim import OptimizerConfig
from unitok.core.pretrained import load_model_folder
from unitok.core.rng import derive_seed, numpy_rng
from unitok.core.run import TrainConfig, resumed_folder
from unitok.core.task import Network, Task
from unitok.data.captions import paraphrase
from unitok.data.codes import CodeSample, CodeSource
from unitok.data.conversations import IMAGE_MARK, Turn
from unitok.mllm.build import BackboneConfig, UniTokMLLMSettings, build_model, build_text_tokenizer
from unitok.mllm.configuration import IGNORE
from unitok.mllm.losses import LossSums
from unitok.mllm.model import UniTokMLLM
from unitok.mllm.pipeline import TOKENIZER_FOLDER
from unitok.mllm.processor import UniTokProcessor
from unitok.mllm.sequence import Sequence, SequenceBuilder, pad_right
from unitok.tokenizer import UniTok
from unitok.tokenizer.extract import fingerprint


class MixtureConfig(Config):
    """Relative shares of the three tasks. A sample takes part in those that it has words for: captions for the first
    two, questions or conversations for chat; one with none of them is a bad sample."""

    text_to_image: float = Field(0.6, ge=0)
    caption: float = Field(0.1, ge=0)
    chat: float = Field(0.3, ge=0)

    @model_validator(mode="after")
    def _some_task(self) -> "MixtureConfig":
        if self.text_to_image + self.caption + self.chat <= 0:
            raise ValueError("text_to_image, caption and chat are all 0; give at least one of them a share")
        return self


class MllmDataConfig(Config):
    """Code shards of stage one and how samples become sequences.

    `unconditional` is the share of text-to-image samples without their text (for guidance); `questions_per_image`
    questions make one conversation, in words drawn anew if `paraphrase` (made for the shapes world: its rules spoil
    other questions). Of an image's captions one is drawn with a chance that grows with its number of words to the power
    `caption_detail`: long ones say more of what is to be drawn. Samples that cannot be read, have no words for the
    mixture or more than `max_length` ids are left out and logged; a share of them above `max_bad_fraction` ends it.
    """

    codes: str = "runs/codes"
    mixture: MixtureConfig = MixtureConfig()
    unconditional: float = Field(0.1, ge=0, le=1)
    caption_detail: float = Field(0.0, ge=0)
    questions_per_image: int = Field(4, ge=1)
    paraphrase: bool = False
    max_length: int = Field(2048, ge=1)
    max_bad_fraction: float = Field(0.01, ge=0, le=1)


class SamplerDefaults(Config):
    """How images are sampled unless told otherwise: `image_sampler` in the export's generation_config.json.

    `depth_temperature` is that of all codes of a position but the first (null: `temperature`).
    """

    guidance_scale: float = Field(5.0, ge=0)
    temperature: float = Field(0.9, gt=0)
    top_k: int = Field(2048, ge=0)
    top_p: float = Field(0.96, gt=0, le=1)
    depth_temperature: float | None = Field(None, gt=0)


class MllmTrainConfig(TrainConfig):
    """Everything of a stage-two run. `tokenizer` is the folder of the visual tokenizer that made the codes."""

    tokenizer: str = "runs/tokenizer/export"
    model: UniTokMLLMSettings = UniTokMLLMSettings()
    backbone: BackboneConfig = BackboneConfig()
    data: MllmDataConfig = MllmDataConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-5, weight_decay=0.0)
    ema_decay: float | None = Field(None, ge=0, lt=1)
    loss_normalisation: Literal["tokens", "modality"] = "tokens"
    image_weight: float = Field(1.0, ge=0)
    sampler: SamplerDefaults = SamplerDefaults()
    gradient_checkpointing: bool = False


class _LossForward(nn.Module):
    """What the training engine calls: the model's loss sums as `forward`."""

    def __init__(self, model: UniTokMLLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> LossSums:
        return self.model.losses(**batch)

    def no_weight_decay(self) -> set[str]:
        return {f"model.{name}" for name in self.model.no_weight_decay()}


class MllmTask(Task):
    """One network, "mllm"."""

    name = "mllm"
    # places are told by the tokenizer's fingerprint in the codes' header and in the checkpoint
    incidental = ("tokenizer", "data.codes", "data.max_bad_fraction", "gradient_checkpointing")
    headline = ("loss", "image", "text")

    def __init__(self, config: MllmTrainConfig) -> None:
        self.config = config
        self.visual = load_model_folder(UniTok, config.tokenizer).eval().requires_grad_(False)
        sizes = self.visual.config
        expected = {
            "tokenizer": fingerprint(self.visual),
            "num_codebooks": sizes.num_codebooks,
            "codebook_size": sizes.codebook_size,
            "image_size": sizes.image_size,
            "num_positions": sizes.num_positions,
        }
        self.source = CodeSource(config.data.codes, expected, config.data.max_bad_fraction)
        self.builder: SequenceBuilder | None = None
        self._counts: dict[str, float] = {}

    @property
    def num_samples(self) -> int:
        return len(self.source)

    def build(self) -> dict[str, Network]:
        """The network with the same weights on every rank."""
        config = self.config
        settings = config.model
        symbols = [text.strip() for text in (settings.user_prefix, settings.assistant_prefix) if text.strip()]
        folder = Path(config.output_dir)
        resumed = resumed_folder(config)
        self.text_tokenizer = build_text_tokenizer(config.backbone, self._texts, symbols, folder, resumed)
        torch.manual_seed(derive_seed("mllm", config.seed))
        model = build_model(settings, config.backbone, self.text_tokenizer, self.visual, config.engine)
        # Apart from generate()'s own fields: those are for text, which is answered greedily.
        model.generation_config.image_sampler = config.sampler.model_dump()
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self.builder = SequenceBuilder(model.config, self.text_tokenizer)
        self.pad_id = self.text_tokenizer.pad_token_id
        return {"mllm": Network(_LossForward(model), config.optimizer, config.ema_decay)}

    def _texts(self) -> list[str]:
        """Everything that will be tokenized, for a text tokenizer trained on the data."""
        settings = self.config.model
        texts = {settings.instruction_suffix, settings.unconditional_text, settings.system_prompt}
        for index in range(len(self.source)):
            sample = self.source.first_good(index, self.source.text)
            texts |= set(sample.captions)
            texts |= {text for question in sample.questions for text in (question.question, question.answer)}
            if self.config.data.paraphrase:
                rng = numpy_rng("words", index)
                texts |= {paraphrase(question.question, rng) for question in sample.questions}
            texts |= {turn.content for conversation in sample.conversations for turn in conversation}
        return sorted(text.replace(IMAGE_MARK, " ").strip() for text in texts if text.strip())

    def load_batch(self, indices: list[int], epoch: int) -> dict[str, Any]:
        """One right-padded batch; what each sample is used for depends on (seed, epoch, index) alone."""
        pairs = [self.source.first_good(index, lambda i: self._read(i, epoch), always_bad=False) for index in indices]
        samples, sequences = zip(*pairs, strict=True)
        input_ids, attention_mask, labels = pad_right(sequences, self.pad_id)
        images = [s.codes for s, q in zip(samples, sequences, strict=True) for _ in q.learn_image]
        # conversations need not name their image: a batch may have none, and still runs through the whole model
        codes = torch.stack(images) if images else samples[0].codes.new_zeros(0, *samples[0].codes.shape)
        learn_image = torch.tensor([x for sequence in sequences for x in sequence.learn_image], dtype=torch.bool)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "codes": codes,
            "learn_image": learn_image,
        }

    def _read(self, index: int, epoch: int) -> tuple[CodeSample, Sequence]:
        """Sample `index` and what is learnt from it; DataError when it is bad."""
        sample = self.source[index]
        sequence = self._sequence(sample, index, epoch)
        if len(sequence.ids) > self.config.data.max_length:
            raise DataError(f"{sample.key}: {len(sequence.ids)} ids, data.max_length is {self.config.data.max_length}")
        return sample, sequence

    def _sequence(self, sample: CodeSample, index: int, epoch: int) -> Sequence:
        data, rng = self.config.data, numpy_rng("mixture", self.config.seed, epoch, index)
        shares = data.mixture
        kinds = {
            "text_to_image": shares.text_to_image * bool(sample.captions),
            "caption": shares.caption * bool(sample.captions),
            "chat": shares.chat * bool(sample.questions or sample.conversations),
        }
        total = sum(kinds.values())
        if total <= 0:
            raise DataError(
                f"{sample.key} has nothing for the tasks of data.mixture: no caption, question or conversation"
            )
        kind = rng.choice(list(kinds), p=[share / total for share in kinds.values()])
        if kind == "chat":
            return self.builder.chat(self._conversation(sample, rng))
        weights = [len(text.split()) ** data.caption_detail for text in sample.captions]
        caption = sample.captions[int(rng.choice(len(weights), p=[weight / sum(weights) for weight in weights]))]
        if kind == "caption":
            return self.builder.caption(caption)
        return self.builder.text_to_image(caption, unconditional=bool(rng.random() < data.unconditional))

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

    def prepare_step(self, batches: list[dict[str, Any]], step: int) -> None:
        """Count learnt ids and codes of the whole step, over micro-batches and ranks."""
        counts = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            counts[0] += (batch["labels"][:, 1:] != IGNORE).sum()
            counts[1] += batch["learn_image"].sum() * batch["codes"].shape[1] * batch["codes"].shape[2]
        text, image = all_reduce_sum_(counts).tolist()
        # The engine averages over micro-batches and ranks; sums are scaled so that this gives sum / global count.
        self._counts = {
            "text": max(text, 1.0),
            "image": max(image, 1.0),
            "share": image / max(image + text, 1.0),
            "parts": len(batches) * world_size(),
            "has_image": image > 0,
            "has_text": text > 0,
        }

    def micro_step(
        self, engines: dict[str, Any], batch: dict[str, Any], micro_index: int, step: int
    ) -> dict[str, Tensor]:
        engine, counts = engines["mllm"], self._counts
        sums = engine(**{name: value.to(engine.device) for name, value in batch.items()})
        text = sums.text * (counts["parts"] / counts["text"])
        image = sums.image * (counts["parts"] / counts["image"])
        weight = self.config.image_weight
        if self.config.loss_normalisation == "tokens":
            share = counts["share"]
            loss = weight * share * image + (1 - share) * text
        else:
            loss = (weight * image + text) / 2
        engine.backward(loss)
        metrics = {"loss": loss.detach()}
        if counts["has_image"]:  # of the whole step, so all ranks and micro-batches log the same names
            metrics["image"] = image.detach()
            metrics["image_accuracy"] = sums.image_correct.sum() * (counts["parts"] / counts["image"])
        if counts["has_text"]:
            metrics["text"] = text.detach()
            metrics["text_accuracy"] = sums.text_correct * (counts["parts"] / counts["text"])
        return metrics

    def extra_state(self) -> dict[str, Any]:
        return {"visual_tokenizer": self.source.header["tokenizer"]}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """CheckpointError when the codes are of another visual tokenizer than those the weights were trained on."""
        saved, present = state["visual_tokenizer"], self.source.header["tokenizer"]
        if saved != present:
            raise CheckpointError(
                f"{self.config.output_dir}: the checkpoint was trained on codes of visual tokenizer {saved}, "
                f"{self.config.data.codes} holds those of {present}; take another output_dir"
            )

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """Write the whole export folder: model, processor, visual tokenizer."""
        model = modules["mllm"].model
        model.save_pretrained(folder)
        UniTokProcessor(self.text_tokenizer, model.config, self.visual.config.image_size).save_pretrained(folder)
        self.visual.save_pretrained(folder / TOKENIZER_FOLDER)
