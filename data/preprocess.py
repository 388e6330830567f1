"""Names of the ways in which images become squares, for the command line, which loads no torch; see `transforms`."""

from typing import Literal, get_args

Preprocess = Literal["plain", "inference", "vae_val", "clip_val"]  # of a tokenizer
OF_TOKENIZERS: tuple[str, ...] = get_args(Preprocess)
PREPROCESS = (*OF_TOKENIZERS, "padded")  # and of what chats and codes are read from
