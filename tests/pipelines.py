"""A tiny pipeline of random weights, and what it is asked."""

import numpy as np
import torch
from PIL import Image
from tiny import make_text_tokenizer, make_tokenizer, roughen

from unitok.mllm.build import BackboneConfig, UniTokMLLMSettings, build_model
from unitok.mllm.pipeline import UniTokPipeline
from unitok.mllm.processor import UniTokProcessor

BACKBONE = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make_pipeline(folder, **tokenizer_changes):
    visual = make_tokenizer(**tokenizer_changes)
    text_tokenizer = make_text_tokenizer(folder)
    settings = UniTokMLLMSettings(visual_width=24, visual_num_heads=2, visual_mlp_ratio=1.5, depth_num_layers=1)
    torch.manual_seed(0)
    model = roughen(build_model(settings, BackboneConfig(config=BACKBONE), text_tokenizer, visual))
    model.generation_config.image_sampler = {"guidance_scale": 2.0, "temperature": 0.9, "top_k": 12, "top_p": 0.95}
    processor = UniTokProcessor(text_tokenizer, model.config, visual.config.image_size)
    return UniTokPipeline(model, processor, visual)


def same(one, other, levels=0):
    """Equal up to `levels` of 255: batches of other sizes round differently."""
    return np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= levels


def picture(color="red"):
    image = Image.new("RGB", (48, 40), "white")
    image.paste(color, (10, 10, 30, 30))
    return image


def ask(text, image=None):
    image = image or picture()
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
