"""Tiny random models of several families as folders, the way transformers writes them, with their text tokenizers."""

import shutil
from pathlib import Path
from typing import Any

import torch
from reference import fixture
from tiny import TEXTS, roughen
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from unitok.mllm.processor import load_text_tokenizer

SIZES = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# name: (tokenizer, rows more than tokens, settings)
FAMILIES = {
    "llama2": ("sentencepiece", 0, {"model_type": "llama"}),
    "llama3": ("bpe", 9, {"model_type": "llama", "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "qwen2": ("bpe", 2, {"model_type": "qwen2", "tie_word_embeddings": True}),
    "qwen3": ("bpe", 0, {"model_type": "qwen3", "head_dim": 16}),
    "mistral": ("sentencepiece", 0, {"model_type": "mistral", "sliding_window": 16}),
    "phi3": ("bpe", 5, {"model_type": "phi3", "pad_token_id": 0}),
    "gemma": ("bpe", 0, {"model_type": "gemma", "head_dim": 8, "tie_word_embeddings": True}),
    "gemma3": ("bpe", 0, {"model_type": "gemma3_text", "head_dim": 8, "tie_word_embeddings": True}),
    # stored expert by expert, under other names than those of its modules
    "mixtral": ("sentencepiece", 0, {"model_type": "mixtral", "num_local_experts": 4}),
}


def make_folder(family: str, folder: Path, **changes: Any) -> Path:
    """A model of the family with random weights in several shards."""
    kind, spare, settings = FAMILIES[family]
    if kind == "sentencepiece":
        shutil.copytree(fixture("mllm/tokenizer"), folder)
    else:
        byte_level_tokenizer().save_pretrained(folder)
    tokenizer = load_text_tokenizer(folder)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    given = SIZES | ids | {"vocab_size": len(tokenizer) + spare} | settings | changes
    torch.manual_seed(1)
    source = roughen(AutoModelForCausalLM.from_config(AutoConfig.for_model(given.pop("model_type"), **given)))
    source.save_pretrained(folder, max_shard_size="20KB")
    return folder


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 3's or Qwen's: byte-level, without a space before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1])
