"""Which kinds of a mixture samples have words for, and which is taken."""

import logging
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from unitok.core.distributed import rank
from unitok.data.code_mixtures import CodeMixture
from unitok.data.codes import CodeSample, CodeSource
from unitok.mllm.settings import KINDS, Kind, MixtureConfig

_LOGGER = logging.getLogger(__name__)
_LOOKED_AT = 1000  # samples


def has_words(sample: CodeSample, kind: Kind) -> bool:
    """Can a sample be learnt from as `kind` (any but "text")?"""
    return bool(sample.questions or sample.conversations) if kind == "chat" else bool(captions_for(sample, kind))


def captions_for(sample: CodeSample, kind: Kind) -> list[str]:
    """The captions of a sample as `kind`. LLaVA's alignment data are conversations of one question, a request to
    describe the image, and LLaVA learns the answer alone: for "plain" it is a caption where there is no other."""
    if kind == "plain" and not sample.captions:
        return [turns[1].content for turns in sample.conversations if len(turns) == 2]
    return sample.captions


def drawn(weights: Sequence[float], rng: np.random.Generator) -> int:
    """A number drawn with chances as `weights`: that of `rng.choice(len(weights), p=...)`, whose checks of its input
    take longer than the rest of a sample's mixture. Zero is never drawn; their sum must be positive."""
    total = sum(weights)
    ends = list(accumulate(weight / total for weight in weights))
    return bisect_right([end / ends[-1] for end in ends], rng.random())


def warn_of_missing_words(source: CodeSource | CodeMixture, mixture: MixtureConfig) -> None:
    """A warning for each kind with a share that no sample looked at has words for: others take its place. Every rank
    looks, so that bad samples are counted alike; the first one speaks."""
    wanted = [kind for kind in KINDS if kind != "text" and getattr(mixture, kind) > 0]
    step = max(1, len(source) // _LOOKED_AT)
    for member, index in ((part, index) for part in source.parts for index in range(0, len(part), step)):
        if not wanted:
            return
        sample = member.first_good(index, member.text)
        wanted = [kind for kind in wanted if not has_words(sample, kind)]
    for kind in wanted if rank() == 0 else ():
        words = "question or conversation" if kind == "chat" else "caption"
        share = getattr(mixture, kind)
        _LOGGER.warning(
            "data.mixture.%s=%g, but no sample looked at has a %s: others take its place", kind, share, words
        )
