"""Bodies of requests and answers, as far as the model can do what OpenAI's API describes.

What is not listed is refused: a setting that does nothing would look as if it worked. Settings that clients send
unasked, with a value that asks for nothing, are listed with that value alone.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SEEDS = 2**63  # 0 to this less 1
Seed = Annotated[int, Field(ge=0, lt=SEEDS, strict=True)]
Text = Annotated[str, Field(strict=True)]
# Temperatures of text may be 0 (the likeliest); codes of images are always drawn.
TextTemperature = Annotated[float, Field(strict=True, ge=0, le=5, allow_inf_nan=False)]
ImageTemperature = Annotated[float, Field(strict=True, gt=0.01, le=5, allow_inf_nan=False)]
TopP = Annotated[float, Field(strict=True, gt=0, le=1)]
TopK = Annotated[int, Field(ge=0, le=1_000_000, strict=True)]
Zero = Annotated[float, Field(strict=True, ge=0, le=0)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, given: Any) -> Any:
        """Of the keys that are unknown the first alone: pydantic makes an error of each, for seconds where they are
        many."""
        if not isinstance(given, dict):
            return given
        known = cls.model_fields
        unknown = next(([key] for key in given if key not in known), [])
        return {key: given[key] for key in (*known, *unknown) if key in given}


class TextPart(_Body):
    type: Literal["text"]
    text: Text


class ImageUrl(_Body):
    """`url` is a data URL: `data:image/png;base64,...` (png, jpeg or webp)."""

    url: Text
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Body):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


# Of lists the first wrong entry is enough.
Content = Text | Annotated[list[Part], Field(min_length=1, max_length=256, fail_fast=True)]
Empty = Annotated[list[Any], Field(max_length=0)]
Nothing = Annotated[dict[str, Any], Field(max_length=0)]


class Message(_Body):
    role: Literal["system", "developer", "user"]
    content: Content
    name: Text | None = None


class AssistantMessage(_Body):
    """An earlier answer, as clients send it back: what our answers do not have may be there, but empty."""

    role: Literal["assistant"]
    content: Content | None = None
    name: Text | None = None
    refusal: Literal[""] | None = None
    annotations: Empty | None = None
    tool_calls: Empty | None = None
    function_call: None = None
    audio: None = None


AnyMessage = Annotated[Message | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Body):
    include_usage: Annotated[bool, Field(strict=True)] = False
    include_obfuscation: Literal[False] = False


class TextFormat(_Body):
    type: Literal["text"]


class ChatRequest(_Body):
    """A conversation that ends with a user's message. `top_k` is an extra; penalties can only be 0."""

    model: Text
    messages: Annotated[list[AnyMessage], Field(min_length=1, max_length=256, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, strict=True)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, strict=True)] | None = None
    temperature: TextTemperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    n: Annotated[int, Field(ge=1, strict=True)] | None = None
    seed: Seed | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    stream: Annotated[bool, Field(strict=True)] | None = None
    stream_options: StreamOptions | None = None
    response_format: TextFormat | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    user: Text | None = None
    # what asks for nothing
    tools: Empty | None = None
    functions: Empty | None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: Annotated[bool, Field(strict=True)] | None = None
    logit_bias: Nothing | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    reasoning_effort: Literal["none"] | None = None
    store: Literal[False] | None = None
    metadata: Nothing | None = None
    service_tier: Literal["auto", "default"] | None = None


class ImageRequest(_Body):
    """Pictures of one prompt. Extras beside OpenAI's: `seed` (picture i has seed + i), `guidance`, `temperature`,
    `depth_temperature`, `top_k`, `top_p`; left out, they are those of the model's export."""

    model: Text | None = None
    prompt: Annotated[Text, Field(min_length=1)]
    n: Annotated[int, Field(ge=1, strict=True)] | None = None
    size: Text | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    seed: Seed | None = None
    guidance: Annotated[float, Field(strict=True, ge=1, le=50, allow_inf_nan=False)] | None = None
    temperature: ImageTemperature | None = None
    depth_temperature: ImageTemperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    user: Text | None = None
    # what asks for nothing
    quality: Literal["auto", "standard"] | None = None
    style: None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto"] | None = None
    stream: Literal[False] | None = None


class ReconstructRequest(_Body):
    """A data URL; see `ImageUrl`."""

    image: Text
    model: Text | None = None


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    error: ErrorBody


class ModelInfo(BaseModel):
    """`unitok`: what a client must know to ask well."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "unitok"
    unitok: dict[str, Any]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelInfo]


class Health(BaseModel):
    status: Literal["ok", "stopping"]
    model: str
    waiting: int
    running: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Answer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: int
    message: Answer
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatAnswer(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Picture(BaseModel):
    """A PNG in base64, and the seed that makes it again."""

    b64_json: str
    seed: int


class ImageUsage(BaseModel):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: dict[str, int]


class ImageAnswer(BaseModel):
    created: int
    data: list[Picture]
    size: str
    output_format: Literal["png"] = "png"
    usage: ImageUsage


class CodebookUsage(BaseModel):
    """How many different entries of one codebook the image used."""

    used: int
    entries: int


class ReconstructAnswer(BaseModel):
    """PNGs in base64: what the tokenizer saw, and what it made of its codes; `codes` `[K][L]`, row by row of `grid`."""

    original: str
    reconstruction: str
    size: str
    psnr: float = Field(description="dB; 100 for identical pictures")
    grid: tuple[int, int]
    codes: list[list[int]]
    usage: list[CodebookUsage]
