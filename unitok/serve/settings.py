"""What a server allows and how long it waits."""

import math
from dataclasses import dataclass, fields

from unitok.core.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServeSettings:
    """Limits and waiting times; ConfigError for one that is not a positive number.

    Attributes:
        name: the model's name in the API; requests that name another one are refused.
        api_key: what clients must send as `Authorization: Bearer KEY`; None lets everybody in.
        allowed_hosts: values of the Host header (without port) that are answered; None answers all. On a loopback
            address it keeps web pages of other sites, which may point their own name at 127.0.0.1, away.
        max_batch: conversations or images that go through the model together.
        max_wait_ms: how long a request waits for others to go with it.
        max_queue: requests that may wait; more are refused with 429.
        request_seconds: a request must be answered in this time, waiting included (504).
        body_seconds: a request's body must have come in this time (408).
        grace_seconds: how long a stopping server goes on with what it has accepted.
        threads: CPU threads that the model computes with; None: as many as torch takes.
        unpack_threads: pictures that are unpacked at once, each beside its request's others.
        max_body_bytes, max_pixels, max_total_pixels, max_images, max_prompt_chars, max_new_tokens, max_n: limits of one
            request; `max_pixels` of one picture, `max_total_pixels` of all in it, `max_images` counts those of a
            conversation, `max_n` the answers or images asked for.
    """

    name: str = "unitok"
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] | None = None
    max_batch: int = 16
    max_wait_ms: float = 10.0
    max_queue: int = 64
    request_seconds: float = 120.0
    body_seconds: float = 20.0
    grace_seconds: float = 30.0
    threads: int | None = None
    unpack_threads: int = 2
    max_body_bytes: int = 16 * 2**20
    max_pixels: int = 16_000_000
    max_total_pixels: int = 48_000_000
    max_images: int = 8
    max_prompt_chars: int = 16_000
    max_new_tokens: int = 1024
    max_n: int = 16

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "max_wait_ms" else 1e-3 if field.type is float else 1
            if isinstance(value, int | float) and not least <= value < math.inf:
                raise ConfigError(f"{field.name}={value}: expected a number of at least {least}")
        if not self.name.strip():
            raise ConfigError("name='': expected the name that clients give as `model`")
        if self.api_key is not None and (len(self.api_key) < 8 or not self.api_key.isascii()):
            raise ConfigError("the API key is too short or not ASCII: expected at least 8 characters of ASCII")
