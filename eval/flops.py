"""FLOPs of a tokenizer and of its training step, counted by running the real code on the meta device (shapes only).

A multiply-add is 2 FLOPs; counted are the products of convolutions, linear layers, attention and the codebook search.
They are model FLOPs as actually executed, so they may be set against the time the step takes (MFU):

- the decoder's `Upsample` (doubling + 3x3 convolution) counts as the four 2x2 convolutions that it runs, 4/9 of the
  products of the textbook form;
- a training step counts forward and backward passes of every network, as autograd runs them: a product in a trained
  layer three times (the usual 3 x forward), one in a frozen network that a gradient passes through twice (LPIPS,
  DINO), one without gradient once (a teacher, what `trainable` or `text_lock` freeze);
- what is computed a second time only to save memory (gradient checkpointing, fused attention's backward pass) is not
  counted again, nor are optimizer, norms and other work without products.

B batch, K codebooks, L positions, H W pixels, T text positions.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from unitok.core.distributed import world_size
from unitok.core.rng import torch_rng
from unitok.core.task import Network
from unitok.tokenizer import UniTok, UniTokConfig
from unitok.tokenizer.configuration import DOWNSAMPLING
from unitok.tokenizer.task import TokenizerTask, TokenizerTrainConfig

_aten = torch.ops.aten

# Dense products per second by GPU, from NVIDIA's data sheets: bf16 and TF32 tensor cores, and fp32 without them.
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"A100(-SXM4|-PCIE)?([ -](40|80)GB)?( PCIe)?", {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12}),
    (r"H100 80GB HBM3|H100 SXM5?", {"bf16": 989e12, "tf32": 494e12, "fp32": 67e12}),
    (r"H100 PCIe", {"bf16": 756e12, "tf32": 378e12, "fp32": 51e12}),
    (r"H200", {"bf16": 989e12, "tf32": 494e12, "fp32": 67e12}),
    (r"L40S", {"bf16": 362e12, "tf32": 183e12, "fp32": 91.6e12}),
    (r"A10", {"bf16": 125e12, "tf32": 62.5e12, "fp32": 31.2e12}),
    (r"(GeForce )?RTX 4090", {"bf16": 165e12, "tf32": 82.6e12, "fp32": 82.6e12}),
)


def peak_flops(gpu_name: str, kind: str) -> float | None:
    """Products per second that a GPU can do in "bf16", "tf32" or "fp32"; None for one that is not in the table.

    The whole name must fit: an A10G is no A10, and a slice of an H100 (MIG) is no H100.
    """
    name = gpu_name.removeprefix("NVIDIA ").strip()
    return next((peaks[kind] for pattern, peaks in _PEAKS if re.fullmatch(pattern, name)), None)


class FlopCount(TorchDispatchMode):
    """`with FlopCount() as count:` ... `count.total`, by torch's formulas.

    torch's own FlopCounterMode cannot be used for a step with `torch.autograd.grad` on a leaf (its module tracker
    refuses), and it counts the weight gradient of a grouped convolution as if it were dense.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:  # inference mode hands over whole layers
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def _convolution_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    output_mask: Sequence[bool],
    out_val: Any = None,
) -> int:
    """Each of the two gradients has as many products as the forward pass, whatever the groups."""
    forward = 2 * (x if transposed else grad_out).numel() * weight[0].numel()
    return forward * sum(output_mask[:2])


def _attention_backward(
    _grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, out_val: Any = None, **__: Any
) -> int:
    """Twice the forward pass, without the scores that a fused kernel computes again."""
    *batch, positions, width = query.shape
    pairs = positions * key.shape[-2]
    for size in batch:
        pairs *= size
    return 4 * pairs * (width + value.shape[-1])


_ATTENTION_BACKWARD = (
    "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_cudnn_attention_backward",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten.convolution_backward: _convolution_backward,
    **{getattr(_aten, name): _attention_backward for name in _ATTENTION_BACKWARD},
}


def count_flops(function: Callable[[], object]) -> int:
    """FLOPs of one call, on whatever device its tensors are."""
    with FlopCount() as count:
        function()
    return count.total


class MeasuredTask(TokenizerTask):
    """A stage-one task whose networks are built right on `place` ("meta" included) with fresh weights.

    Nothing is read for `init_from` and `init_clip`: neither speed nor FLOPs depend on the weights.
    """

    def readings(self) -> list[Any]:
        """Nothing is read: batches are random."""
        return []

    def check_batch(self) -> None:
        """A part of a larger run may be measured."""

    def __init__(self, config: TokenizerTrainConfig, place: torch.device) -> None:
        super().__init__(config)
        self.place = place
        self.config = config.model_copy(update={"init_from": None, "init_clip": None})  # after they were checked

    def build(self) -> dict[str, Network]:
        with torch.device(self.place):
            return super().build()


def random_batch(config: TokenizerTrainConfig, seed: int = 0) -> dict[str, Any]:
    """What `load_batch` gives, with random pixels and text ids: one micro-batch of this rank."""
    count, size = config.engine.micro_batch_size, config.model.image_size
    rng = torch_rng("speed", seed)
    batch: dict[str, Any] = {
        "pixels": torch.rand(count, 3, size, size, generator=rng) * 2 - 1,
        "captions": ["-"] * count,
    }
    tower = UniTokConfig(**config.model.model_dump()).text_tower_config
    if tower is not None:
        ids_BT = torch.randint(max(1, tower.vocab_size - 2), (count, tower.context_length), generator=rng)
        ids_BT[:, 0], ids_BT[:, -1] = tower.vocab_size - 2, tower.vocab_size - 1
        batch["text_ids"] = ids_BT
    return batch


def inference_flops(config: UniTokConfig, image_size: int) -> dict[str, int]:
    """FLOPs to "encode" and to "decode" one image, and to "search" one position (all of its K codes)."""
    with torch.device("meta"):
        model = UniTok(config).eval()
        pixels = torch.empty(1, 3, image_size, image_size)
        length = (image_size // DOWNSAMPLING) ** 2 + config.num_query_tokens
        features_BLC = torch.empty(1, length, config.code_width)

    def decode() -> None:  # without the look-up, which has no products and reads the codes
        model.decoder(model.post_quant_proj(features_BLC), (image_size, image_size))

    with torch.no_grad(), _runs_on_meta():
        search = count_flops(lambda: model.quantizer.encode(features_BLC))
        return {
            "encode": count_flops(lambda: model.encode(pixels)),
            "decode": count_flops(decode),
            "search": search // length,
        }


def training_flops(config: TokenizerTrainConfig, place: str = "meta") -> float:
    """FLOPs of a training step per image, its discriminator counted once it has started.

    `config` must name no file of weights (see `unitok.eval.speed.measured_config`). `place`: the device to count on;
    "meta" has no numbers to compute, and gives the same.
    """
    assert world_size() == 1, "losses over several ranks would have to communicate"
    engine = config.engine.model_copy(update={"precision": "fp32"})  # the count is the same in all precisions
    update = {"engine": engine, "gradient_checkpointing": False, "compile": False}
    device = torch.device(place)
    task = MeasuredTask(config.model_copy(update=update), device)
    engines = {name: _Engine(network.module.train(), device) for name, network in task.build().items()}
    batch = random_batch(config)
    with _runs_on_meta():
        flops = count_flops(lambda: task.micro_step(engines, batch, 0, config.discriminator.start_step))
    return flops / config.engine.micro_batch_size


class _Engine:
    """What `micro_step` asks of a DeepSpeed engine."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module, device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


@contextmanager
def _runs_on_meta() -> Iterator[None]:
    """Let the model's code run on the meta device: autocast does not know that device, and what a mask selects is
    unknown there (it is everything: all captions are given)."""
    from torch.fx.experimental import _config

    autocast = torch.autocast

    class Autocast(autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)

    torch.autocast = Autocast
    try:
        with _config.patch(meta_nonzero_assume_all_nonzero=True):
            yield
    finally:
        torch.autocast = autocast
