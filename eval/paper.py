"""The rows that the UniTok paper prints (arXiv 2502.20321v2), as data, in the units of our results.

Shares are fractions of 1 here (the paper prints some in per cent); FID, MME and inception scores are as printed. The
paper does not state every setting, so a protocol is what it says and no more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

_IMAGENET = "ImageNet-val at 256 px"
_UNIFIED = "Llama-2-7B with UniTok"


@dataclass(frozen=True)
class PaperRow:
    """One system's figures on one benchmark, `metrics` by the names that our results use."""

    system: str
    metrics: Mapping[str, float]
    protocol: str = ""
    source: str = field(default="arXiv 2502.20321v2")


# Which of our two tasks it belongs to is not said: it stands beside both.
_TEXTVQA = PaperRow(_UNIFIED, {"accuracy": 0.516}, "soft accuracy; with or without OCR hints not stated")

PAPER: dict[str, tuple[PaperRow, ...]] = {
    "reconstruction": (
        PaperRow("UniTok (random init)", {"rfid": 0.41}, _IMAGENET),
        PaperRow("UniTok (CLIP init)", {"rfid": 0.38}, _IMAGENET),
        PaperRow("SD-VAE", {"rfid": 0.87}, _IMAGENET),
        PaperRow("VQGAN", {"rfid": 4.98}, _IMAGENET),
        PaperRow("RQ-VAE", {"rfid": 1.30}, _IMAGENET),
        PaperRow("VAR", {"rfid": 0.90}, _IMAGENET),
        PaperRow("TokenFlow", {"rfid": 1.37}, _IMAGENET),
        PaperRow("VILA-U", {"rfid": 1.80}, _IMAGENET),
    ),
    "zeroshot": (
        PaperRow("UniTok (random init)", {"top1": 0.708}, _IMAGENET),
        PaperRow("UniTok (CLIP init)", {"top1": 0.786}, _IMAGENET),
        PaperRow("VILA-U", {"top1": 0.733}, _IMAGENET),
        PaperRow("CLIP", {"top1": 0.762}, _IMAGENET),
        PaperRow("SigLIP", {"top1": 0.805}, _IMAGENET),
        PaperRow("ViTamin", {"top1": 0.812}, _IMAGENET),
    ),
    "class_conditional": (
        PaperRow("LlamaGen-XXL on UniTok", {"fid": 2.51, "isc": 216.7}, "no guidance, ImageNet 256 px"),
        PaperRow("LlamaGen-XXL on VQGAN", {"fid": 14.65}, "no guidance, ImageNet 256 px"),
        PaperRow("LlamaGen-XXL on UniTok, guided", {"fid": 2.77}, "classifier-free guidance, ImageNet 256 px"),
        PaperRow("LlamaGen-XXL on VQGAN, guided", {"fid": 2.34}, "classifier-free guidance, ImageNet 256 px"),
    ),
    "geneval": (
        PaperRow(
            _UNIFIED,
            {
                "overall": 0.59,
                "single_object": 0.99,
                "two_object": 0.71,
                "counting": 0.36,
                "colors": 0.79,
                "position": 0.26,
                "color_attr": 0.45,
            },
            "official prompts; samples and rewriting not stated",
        ),
    ),
    "genai_bench": (PaperRow(_UNIFIED, {"basic": 0.85, "advanced": 0.67}, "VQAScore"),),
    "mjhq30k": (
        PaperRow(_UNIFIED, {"fid": 7.46}, "released script: guidance 7, images saved as JPEG"),
        PaperRow("the same, measured by UniCompress", {"fid": 16.14}, "not stated", "CVPR 2026"),
    ),
    "vqav2": (PaperRow(_UNIFIED, {"accuracy": 0.768}, "soft accuracy"),),
    "gqa": (PaperRow(_UNIFIED, {"accuracy": 0.611}),),
    "textvqa": (_TEXTVQA,),
    "textvqa_ocr": (_TEXTVQA,),
    "pope": (PaperRow(_UNIFIED, {"f1_mean": 0.832}, "over the three splits; accuracy or F1 not stated"),),
    "mme": (PaperRow(_UNIFIED, {"perception": 1448.0}, "perception or both halves not stated"),),
    "mmvet": (PaperRow(_UNIFIED, {"score": 0.339}, "judged by GPT-4"),),
}


def paper_rows(benchmark: str) -> tuple[PaperRow, ...]:
    """The paper's rows of a benchmark; none where it has none."""
    return PAPER.get(benchmark, ())
