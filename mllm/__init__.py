"""The unified model: reads codes for understanding, predicts them for generation."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
)

from unitok.mllm.configuration import UniTokMLLMConfig
from unitok.mllm.model import UniTokMLLM
from unitok.mllm.processor import UniTokProcessor, UniTokTextTokenizer

AutoConfig.register(UniTokMLLMConfig.model_type, UniTokMLLMConfig, exist_ok=True)
AutoModel.register(UniTokMLLMConfig, UniTokMLLM, exist_ok=True)
AutoModelForCausalLM.register(UniTokMLLMConfig, UniTokMLLM, exist_ok=True)
AutoModelForMultimodalLM.register(UniTokMLLMConfig, UniTokMLLM, exist_ok=True)
AutoTokenizer.register(UniTokMLLMConfig, slow_tokenizer_class=UniTokTextTokenizer, exist_ok=True)
AutoProcessor.register(UniTokMLLMConfig, UniTokProcessor, exist_ok=True)

__all__ = ["UniTokMLLM", "UniTokMLLMConfig", "UniTokProcessor"]
