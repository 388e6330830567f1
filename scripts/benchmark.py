"""Speed claims of this project, each as a ratio against a named baseline measured in the same run: `make bench`.

    python scripts/benchmark.py [--repeats 5] [--threads 1] [--out FILE]

The two sides of a pair are timed in turn, and the ratio is that of their medians. The quantizer has a benchmark of its
own (`benchmark_quantizer.py`).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitok.mllm import UniTokMLLM, UniTokMLLMConfig
from unitok.tokenizer.decoder import Upsample

Pair = tuple[str, str, Callable[[], object], Callable[[], object]]


def upsample_pair() -> Pair:
    """Doubling with a 3x3 convolution on the small image against interpolate, then convolve."""
    layer, x_BCHW = Upsample(128, 128), torch.randn(8, 128, 16, 16, requires_grad=True)

    def folded() -> None:
        layer(x_BCHW).sum().backward()

    def plain() -> None:
        nn.functional.conv2d(
            F.interpolate(x_BCHW, scale_factor=2), layer.conv.weight, layer.conv.bias, padding=1
        ).sum().backward()

    return "decoder upsampling, 128 channels, 16 -> 32 px, forward + backward", "interpolate + conv", folded, plain


def generation_pair() -> Pair:
    """Sampling 64 positions x 8 codes with all caches against recomputing the whole prefix for each position."""
    text = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = UniTokMLLMConfig(
        text_config={"model_type": "llama", "vocab_size": 64, "num_key_value_heads": 4, **text},
        codebook_size=64,
        code_dim=4,
        num_image_positions=64,
        visual_width=96,
        visual_num_heads=3,
        depth_num_layers=2,
        begin_image_id=1,
        end_image_id=2,
        image_token_id=3,
    )
    torch.manual_seed(0)
    model = UniTokMLLM(config).eval()
    prompt_BT = torch.ones(4, 8, dtype=torch.long)

    @torch.no_grad()
    def cached() -> Tensor:
        return model.generate_codes(prompt_BT, do_sample=False)

    @torch.no_grad()
    def recomputed() -> Tensor:
        codes_BKL = torch.zeros(4, config.num_codebooks, 0, dtype=torch.long)
        for _ in range(config.num_image_positions):
            inputs = model.get_input_embeddings()(prompt_BT)
            if codes_BKL.shape[2]:
                inputs = torch.cat([inputs, model.embed_codes(codes_BKL)], dim=1)
            hidden_BD = model.backbone(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, -1]
            column_BK = torch.zeros(4, config.num_codebooks, dtype=torch.long)
            for k in range(config.num_codebooks):
                column_BK[:, k] = model.depth(hidden_BD, column_BK)[:, k].argmax(-1)
            codes_BKL = torch.cat([codes_BKL, column_BK.unsqueeze(-1)], dim=-1)
        return codes_BKL

    assert torch.equal(cached(), recomputed()), "the two sides of the generation benchmark disagree"
    return "generating 64 positions x 8 codes, 4 images", "no cache anywhere", cached, recomputed


def measure(pair: Pair, repeats: int) -> dict[str, object]:
    """Median seconds of both sides and their ratio."""
    name, baseline, ours, theirs = pair
    ours(), theirs()  # warm-up
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for side, function in zip(times, (ours, theirs), strict=True):
            start = time.perf_counter()
            function()
            side.append(time.perf_counter() - start)
    own, other = (statistics.median(side) for side in times)
    return {"what": name, "baseline": baseline, "seconds": own, "baseline_seconds": other, "ratio": other / own}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rows = [measure(pair(), arguments.repeats) for pair in (upsample_pair, generation_pair)]
    for row in rows:
        print(f"{row['ratio']:5.2f} x  {row['what']} ({row['seconds'] * 1e3:.1f} ms) against {row['baseline']}")
    if arguments.out:
        arguments.out.write_text(json.dumps({"threads": arguments.threads, "pairs": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
