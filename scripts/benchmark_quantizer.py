"""Time and memory of the multi-codebook quantizer at the released size against one pass per codebook.

    python scripts/benchmark_quantizer.py [--threads 1] [--repeats 7] [--device cpu] [--out FILE]

8 codebooks of 4096 entries of 8 channels, 16 images of 256 positions, fp32. Both sides are timed in turn in one run and
compared in value (and gradient) first. Peak MiB is what one call adds at most to the memory held before it, its results
and gradients included: on a CPU the allocations that torch's profiler records (not the scratch memory of BLAS), on CUDA
`torch.cuda.max_memory_allocated`.

K codebooks, V entries per codebook, D channels per chunk, N chunks per codebook, B images, L positions, C = K * D.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitok.scripts.benchmark import measure
from unitok.tokenizer.quantizer import MultiCodebookQuantizer
from unitok.tokenizer.search import entropy_loss, search

K, V, D = 8, 4096, 8
IMAGES, POSITIONS = 16, 256
TEMPERATURE = 0.01
NEAR_TIE = 1e-6  # two products of one chunk that differ by less may be ordered either way by another kernel

Side = Callable[[], Any]


class LoopQuantizer(nn.Module):
    """The baseline: all of the quantizer's training pass, one codebook after the other."""

    def __init__(self, codebooks_KVD: Tensor, commitment_weight: float) -> None:
        super().__init__()
        self.codebooks = nn.ParameterList([codebook_VD.clone() for codebook_VD in codebooks_KVD])
        self.commitment_weight = commitment_weight

    def forward(self, features_BLC: Tensor, codes_BKL: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantized `[B, L, C]`, codes `[B, K, L]`, loss, usage `[K, V]`; given codes take the place of the search."""
        quantized, codes, losses, usage = [], [], [], []
        for k, chunk_BLD in enumerate(features_BLC.chunk(len(self.codebooks), dim=-1)):
            chunk_BLD, codebook_VD = F.normalize(chunk_BLD, dim=-1), F.normalize(self.codebooks[k], dim=-1)
            code_BL = loop_search(chunk_BLD, codebook_VD) if codes_BKL is None else codes_BKL[:, k]
            chosen_BLD = F.embedding(code_BL, codebook_VD)
            commitment = self.commitment_weight * F.mse_loss(chunk_BLD, chosen_BLD.detach())
            losses.append(commitment + F.mse_loss(chosen_BLD, chunk_BLD.detach()))
            quantized.append(chunk_BLD + (chosen_BLD - chunk_BLD).detach())
            codes.append(code_BL)
            usage.append(torch.bincount(code_BL.flatten(), minlength=len(codebook_VD)).float())
        return torch.cat(quantized, -1), torch.stack(codes, 1), torch.stack(losses).mean(), torch.stack(usage)


@torch.no_grad()
def loop_search(chunk_ND: Tensor, codebook_VD: Tensor) -> Tensor:
    """The plain search: the whole product, then argmax."""
    return (chunk_ND @ codebook_VD.T).argmax(-1)


def loop_entropy(chunks_KND: Tensor, codebooks_KVD: Tensor) -> Tensor:
    """The plain entropy loss, one codebook after the other."""
    losses = []
    for chunk_ND, codebook_VD in zip(chunks_KND, codebooks_KVD, strict=True):
        logits_NV = 2.0 * (chunk_ND @ codebook_VD.T) / TEMPERATURE
        probs_NV, log_probs_NV = logits_NV.softmax(-1), logits_NV.log_softmax(-1)
        mean_V = probs_NV.mean(0)
        losses.append((mean_V * (mean_V + 1e-7).log()).sum() - (probs_NV * log_probs_NV).sum(-1).mean())
    return torch.stack(losses).mean()


def search_sides(chunks_KND: Tensor, codebooks_KVD: Tensor) -> tuple[Side, Side, dict[str, Any]]:
    """Both searches and how they compare."""

    def plain() -> Tensor:
        return torch.stack([loop_search(x_ND, e_VD) for x_ND, e_VD in zip(chunks_KND, codebooks_KVD, strict=True)])

    ours_KN, theirs_KN = search(chunks_KND, codebooks_KVD), plain()
    similarity = [
        (chunks_KND * codebooks_KVD.gather(1, codes_KN.unsqueeze(-1).expand(-1, -1, D))).sum(-1)
        for codes_KN in (ours_KN, theirs_KN)
    ]
    gap = (similarity[0] - similarity[1]).abs().max().item()
    assert gap < NEAR_TIE, f"search chose an entry whose similarity is {gap} off"
    different = int((ours_KN != theirs_KN).sum())
    return lambda: search(chunks_KND, codebooks_KVD), plain, {"different_codes": different, "largest_gap": gap}


def training_sides(features_BLC: Tensor, weights_BLC: Tensor) -> tuple[Side, Side, dict[str, Any]]:
    """Both training passes (forward and backward) and how they compare."""
    quantizer = MultiCodebookQuantizer(K, V, D).to(features_BLC.device)
    plain = LoopQuantizer(quantizer.codebooks.detach(), quantizer.commitment_weight)

    def ours() -> tuple[Tensor, ...]:
        out = quantizer(features_BLC)
        loss = (out.quantized * weights_BLC).mean() + out.vq_loss
        return (
            loss,
            out.usage,
            out.codes,
            out.quantized,
            *torch.autograd.grad(loss, [features_BLC, quantizer.codebooks]),
        )

    def theirs(codes_BKL: Tensor | None = None) -> tuple[Tensor, ...]:
        quantized_BLC, codes_BKL, vq_loss, usage_KV = plain(features_BLC, codes_BKL)
        loss = (quantized_BLC * weights_BLC).mean() + vq_loss
        grad_BLC, *grads_VD = torch.autograd.grad(loss, [features_BLC, *plain.codebooks])
        return loss, usage_KV, codes_BKL, quantized_BLC, grad_BLC, torch.stack(grads_VD)

    found = ours()
    # With our codes: one near tie decided the other way moves the gradient of two entries.
    difference = compare(found, theirs(found[2]))
    return ours, theirs, {"different_codes": int((found[2] != theirs()[2]).sum()), **difference}


def entropy_sides(chunks_KND: Tensor, codebooks_KVD: Tensor) -> tuple[Side, Side, dict[str, Any]]:
    """Both entropy losses, forward and backward, and how they compare."""
    leaves = [chunks_KND.clone().requires_grad_(), codebooks_KVD.clone().requires_grad_()]

    def side(function: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        loss = function()
        return loss, *torch.autograd.grad(loss, leaves)

    def ours() -> tuple[Tensor, ...]:
        return side(lambda: entropy_loss(*leaves, TEMPERATURE))

    def theirs() -> tuple[Tensor, ...]:
        return side(lambda: loop_entropy(*leaves))

    return ours, theirs, compare(ours(), theirs())


def compare(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> dict[str, Any]:
    """Relative difference in norm of each result; more than rounding is an error."""
    differences = []
    for one, other in zip(ours, theirs, strict=True):
        one, other = one.detach().double(), other.detach().double()
        differences.append(float((one - other).norm() / other.norm()))
    assert all(difference < 1e-4 for difference in differences), (
        f"the two sides differ by {differences} (relative, in norm)"
    )
    return {"relative_differences": differences}


def peak_mib(function: Side, device: str) -> float:
    """What one call adds at most to the memory held before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]  # negative where memory is given back
        peak = max(peak, held)
    return peak / 2**20


def row(name: str, baseline: str, sides: tuple[Side, Side, dict[str, Any]], repeats: int, device: str) -> dict:
    """Seconds, ratio, peak memory and differences of one comparison."""
    ours, theirs, difference = sides

    def waited(function: Side) -> Side:
        return lambda: (function(), torch.cuda.synchronize()) if device == "cuda" else function()

    figures = measure((name, baseline, waited(ours), waited(theirs)), repeats)
    return {**figures, "peak_mib": peak_mib(ours, device), "baseline_peak_mib": peak_mib(theirs, device), **difference}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device, repeats = arguments.device, arguments.repeats
    features_BLC = torch.randn(IMAGES, POSITIONS, K * D).to(device).requires_grad_()
    weights_BLC = torch.randn(IMAGES, POSITIONS, K * D).to(device)
    chunks_KND = F.normalize(features_BLC.detach().view(-1, K, D).transpose(0, 1), dim=-1)
    codebooks_KVD = F.normalize(torch.randn(K, V, D).to(device), dim=-1)
    rows = [
        row("search", "product + argmax", search_sides(chunks_KND, codebooks_KVD), repeats, device),
        row("training pass", "loop over codebooks", training_sides(features_BLC, weights_BLC), repeats, device),
        row("entropy loss", "loop over codebooks", entropy_sides(chunks_KND, codebooks_KVD), repeats, device),
    ]
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {arguments.threads} thread(s)"
    print(f"{K} x {V} x {D}, {IMAGES} x {POSITIONS} positions, {name}; the last two forward + backward")
    print(f"{'':14} {'ms':>9} {'loop ms':>9} {'ratio':>7} {'peak MiB':>9} {'loop MiB':>9}")
    for r in rows:
        times = f"{r['seconds'] * 1e3:9.1f} {r['baseline_seconds'] * 1e3:9.1f} {r['ratio']:7.2f}"
        print(f"{r['what']:14} {times} {r['peak_mib']:9.1f} {r['baseline_peak_mib']:9.1f}")
    if arguments.out:
        figures = {"device": name, "threads": arguments.threads, "torch": torch.__version__, "rows": rows}
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
