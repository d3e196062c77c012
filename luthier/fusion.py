"""A model made faster, by fusing BatchNorm and padding into its convolutions: for inference, or while it trains."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, get_same_padding
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from transformers import PreTrainedModel

NARROW = 16  # input channels


def fuse_batchnorm(model: PreTrainedModel, size: tuple[int, int]) -> PreTrainedModel:
    """Return a model with the same outputs, in evaluation mode, with BatchNorm and padding fused into convolutions.

    This saves up to a third of the time on a CPU. Outputs differ by rounding alone. Where the fused model's outputs
    would differ by more, because something else uses a convolution's output too, the model itself is returned.

    Args:
        model: it is put into evaluation mode and otherwise left as it is.
        size: (height, width) in pixels of its input, and of everything that the fused model will be given.
    """
    return _if_equal(model, _fuse_in_place, size)


def fuse_for_training(model: PreTrainedModel, size: tuple[int, int]) -> PreTrainedModel:
    """Return a model with the same parameters and outputs that trains faster through BatchNorm in evaluation mode.

    There BatchNorm multiplies each channel and shifts it. In each forward pass the weights of the convolution before
    it are multiplied, and not its output. The gradients are the same, and a step on a CPU takes about an eighth less
    time (`python -m benchmarks.training_step`). On a GPU EfficientNet-Lite0 takes 1.45 times as long
    (`benchmarks/gpu_check.sh`). See `fuse_batchnorm` for the check.

    Args:
        model: its BatchNorm layers stay in evaluation mode while it trains. It is put into evaluation mode, and its
            1x1 convolutions that have a stride and fewer than `NARROW` input channels skip pixels before they compute.
        size: (height, width) in pixels of an input to check it with.
    """
    _stride_before_narrow_convolutions(model)
    return _if_equal(model, _fuse_forward, size)


def _stride_before_narrow_convolutions(model: nn.Module) -> None:
    """Skip pixels before 1x1 convolutions of few input channels, and not in them: the outputs are the same.

    With a stride, in channels_last on a CPU, their backward pass writes beyond its memory: processes crash, or
    gradients are wrong (torch 2.14 with oneDNN 3.12; RepVGG, MobileOne and GENet have such layers).
    """
    for module in model.modules():
        if not isinstance(module, nn.Conv2d) or module.in_channels // module.groups >= NARROW:
            continue
        if module.kernel_size == (1, 1) and module.padding == (0, 0) and module.stride != (1, 1):
            module.register_forward_pre_hook(functools.partial(_skip_pixels, stride=module.stride))
            module.stride = (1, 1)


def _skip_pixels(module: nn.Module, args: tuple, stride: tuple[int, ...]) -> tuple:
    rows, columns = stride
    return args[0][..., ::rows, ::columns], *args[1:]


def _if_equal(
    model: PreTrainedModel, fuse: Callable[[PreTrainedModel, torch.Tensor], None], size: tuple[int, int]
) -> PreTrainedModel:
    """Return a copy of the model that is changed by `fuse`, if its outputs are then the same; the model otherwise."""
    model.eval()
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    fused = copy.deepcopy(model)
    pixel_values = torch.randn(
        2, 3, *size, device=model.device, generator=torch.Generator(model.device).manual_seed(0)
    )
    # cuDNN would plan each convolution for batches of this size, for seconds (2 to 3 on an H100, torch 2.11).
    with torch.no_grad(), _without_cudnn():
        expected = model(pixel_values).logits
        fuse(fused, pixel_values)
        difference = (fused(pixel_values).logits - expected).abs().max()
    return fused if difference <= 1e-3 * expected.abs().mean() else model


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    """Switch cuDNN off alone: `cudnn.flags` reads `allow_tf32` too, which fails after `--tf32 False`."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def _find_pairs(
    model: PreTrainedModel, pixel_values: torch.Tensor
) -> tuple[dict[nn.BatchNorm2d, nn.Conv2d], dict[nn.Conv2d, torch.Size]]:
    """Return the convolution whose output each BatchNorm takes, and the size of each convolution's input."""
    outputs: dict[int, tuple[nn.Conv2d, torch.Tensor]] = {}
    sides: dict[nn.Conv2d, torch.Size] = {}
    pairs: dict[nn.BatchNorm2d, nn.Conv2d] = {}
    modules = list(model.modules())

    def remember(convolution: nn.Conv2d, args: tuple, output: torch.Tensor) -> None:
        outputs[id(output)] = (convolution, output)  # the output too, so that no other tensor gets its id
        sides[convolution] = args[0].shape[-2:]

    def pair(norm: nn.BatchNorm2d, args: tuple) -> None:
        if args and id(args[0]) in outputs and norm.running_mean is not None:
            pairs[norm] = outputs[id(args[0])][0]

    hooks = [m.register_forward_hook(remember) for m in modules if isinstance(m, nn.Conv2d)]
    hooks += [m.register_forward_pre_hook(pair) for m in modules if type(m) in (nn.BatchNorm2d, BatchNormAct2d)]
    model(pixel_values)
    for hook in hooks:
        hook.remove()
    return pairs, sides


def _fuse_in_place(model: PreTrainedModel, pixel_values: torch.Tensor) -> None:
    """Fuse each BatchNorm with the convolution whose output it takes in a forward pass of this input."""
    pairs, sides = _find_pairs(model, pixel_values)
    names = {module: name for name, module in model.named_modules()}
    for norm, convolution in pairs.items():
        assert norm.running_mean is not None and norm.running_var is not None  # `pair` has seen to it
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        model.set_submodule(names[norm], _after_norm(norm))
    for convolution, side in sides.items():
        if type(convolution) is Conv2dSame and convolution.dilation == (1, 1):
            model.set_submodule(names[convolution], _with_even_padding(convolution, side))


def _fuse_forward(model: PreTrainedModel, pixel_values: torch.Tensor) -> None:
    """Let convolutions compute their BatchNorm too, from parameters that stay where they are."""
    pairs, _ = _find_pairs(model, pixel_values)
    for norm, convolution in pairs.items():
        if norm.weight is None or norm.bias is None:
            continue
        # Not by hooks, which cannot replace a forward pass. A partial is copied with the modules that it holds.
        vars(convolution)["forward"] = functools.partial(_convolve_and_norm, convolution, norm)
        vars(norm)["forward"] = _after_norm(norm)


def _convolve_and_norm(convolution: nn.Conv2d, norm: nn.BatchNorm2d, features: torch.Tensor) -> torch.Tensor:
    """Return what BatchNorm in evaluation mode makes of a convolution's output."""
    assert norm.running_mean is not None and norm.running_var is not None  # `_find_pairs` has seen to it
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight = convolution.weight * scale[:, None, None, None]
    bias = norm.bias - norm.running_mean * scale
    if convolution.bias is not None:
        bias = bias + convolution.bias * scale
    padding = convolution.padding
    if isinstance(convolution, Conv2dSame) and convolution.dilation == (1, 1):
        weight, padding = _pad_evenly(convolution, weight, features.shape[-2:])
    return nn.functional.conv2d(
        features, weight, bias, convolution.stride, padding, convolution.dilation, convolution.groups
    )


def _after_norm(norm: nn.BatchNorm2d) -> nn.Module:
    """Return what is left of a layer of normalisation without the normalisation."""
    return nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()


def _pad_evenly(
    convolution: Conv2dSame, weight: torch.Tensor, side: torch.Size
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Return weights, and a padding alike on both sides, with the same outputs for inputs of this (height, width).

    TensorFlow's padding may have one pixel more at the end. A row of zeros before the kernel's first row makes it
    even, and saves the copy of the input in which timm pads it.
    """
    axes = zip(side, convolution.kernel_size, convolution.stride, strict=True)
    needed = [get_same_padding(*axis, dilation=1) for axis in axes]
    rows, columns = (pixels % 2 for pixels in needed)
    return nn.functional.pad(weight, (columns, 0, rows, 0)), ((needed[0] + 1) // 2, (needed[1] + 1) // 2)


def _with_even_padding(convolution: Conv2dSame, side: torch.Size) -> nn.Conv2d:
    """Return a convolution with the same outputs for inputs of this (height, width); see `_pad_evenly`."""
    weight, padding = _pad_evenly(convolution, convolution.weight, side)
    even = nn.Conv2d(
        convolution.in_channels,
        convolution.out_channels,
        (weight.shape[-2], weight.shape[-1]),
        (convolution.stride[0], convolution.stride[1]),
        padding,
        groups=convolution.groups,
        device="meta",
    )
    even.weight, even.bias = nn.Parameter(weight), convolution.bias
    return even
