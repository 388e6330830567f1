"""The unified model: reads codes for understanding, predicts them for generation."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

from unitok.mllm.configuration import UniTokMLLMConfig
from unitok.mllm.model import UniTokMLLM
from unitok.mllm.processor import UniTokProcessor

AutoConfig.register(UniTokMLLMConfig.model_type, UniTokMLLMConfig, exist_ok=True)
AutoModelForCausalLM.register(UniTokMLLMConfig, UniTokMLLM, exist_ok=True)
AutoModelForMultimodalLM.register(UniTokMLLMConfig, UniTokMLLM, exist_ok=True)

__all__ = ["UniTokMLLM", "UniTokMLLMConfig", "UniTokProcessor"]
