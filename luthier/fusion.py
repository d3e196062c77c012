"""A model made faster for inference, by fusing BatchNorm and padding into its convolutions."""

import copy

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, get_same_padding
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from transformers import PreTrainedModel


def fuse_batchnorm(model: PreTrainedModel, size: tuple[int, int]) -> PreTrainedModel:
    """Return a model with the same outputs, in evaluation mode, with BatchNorm and padding fused into convolutions.

    This saves up to a third of the time on a CPU. Outputs differ by rounding alone. Where the fused model's outputs
    would differ by more, because something else uses a convolution's output too, the model itself is returned.

    Args:
        model: it is put into evaluation mode and otherwise left as it is.
        size: (height, width) in pixels of its input, and of everything that the fused model will be given.
    """
    model.eval()
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    fused = copy.deepcopy(model)
    pixel_values = torch.randn(
        2, 3, *size, device=model.device, generator=torch.Generator(model.device).manual_seed(0)
    )
    with torch.no_grad():
        expected = model(pixel_values).logits
        _fuse_in_place(fused, pixel_values)
        difference = (fused(pixel_values).logits - expected).abs().max()
    return fused if difference <= 1e-3 * expected.abs().mean() else model


def _fuse_in_place(model: PreTrainedModel, pixel_values: torch.Tensor) -> None:
    """Fuse each BatchNorm with the convolution whose output it takes in a forward pass of this input."""
    outputs: dict[int, tuple[nn.Conv2d, torch.Tensor]] = {}
    sides: dict[nn.Conv2d, torch.Size] = {}
    pairs: dict[nn.BatchNorm2d, nn.Conv2d] = {}
    names = {module: name for name, module in model.named_modules()}

    def remember(convolution: nn.Conv2d, args: tuple, output: torch.Tensor) -> None:
        outputs[id(output)] = (convolution, output)  # the output too, so that no other tensor gets its id
        sides[convolution] = args[0].shape[-2:]

    def pair(norm: nn.BatchNorm2d, args: tuple) -> None:
        if args and id(args[0]) in outputs and norm.running_mean is not None:
            pairs[norm] = outputs[id(args[0])][0]

    hooks = [m.register_forward_hook(remember) for m in names if isinstance(m, nn.Conv2d)]
    hooks += [m.register_forward_pre_hook(pair) for m in names if type(m) in (nn.BatchNorm2d, BatchNormAct2d)]
    model(pixel_values)
    for hook in hooks:
        hook.remove()
    for norm, convolution in pairs.items():
        assert norm.running_mean is not None and norm.running_var is not None  # `pair` has seen to it
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        model.set_submodule(names[norm], rest)
    for convolution, side in sides.items():
        if type(convolution) is Conv2dSame and convolution.dilation == (1, 1):
            model.set_submodule(names[convolution], _with_even_padding(convolution, (side[0], side[1])))


def _with_even_padding(convolution: Conv2dSame, side: tuple[int, int]) -> nn.Conv2d:
    """Return a convolution with the same outputs for inputs of this (height, width), padded alike on both sides.

    TensorFlow's padding may have one pixel more at the end. A row of zeros before the kernel's first row makes it
    even, and saves the copy of the input in which timm pads it.
    """
    axes = zip(side, convolution.kernel_size, convolution.stride, strict=True)
    needed = [get_same_padding(*axis, dilation=1) for axis in axes]
    rows, columns = (pixels % 2 for pixels in needed)
    weight = nn.functional.pad(convolution.weight, (columns, 0, rows, 0))
    even = nn.Conv2d(
        convolution.in_channels,
        convolution.out_channels,
        (weight.shape[-2], weight.shape[-1]),
        (convolution.stride[0], convolution.stride[1]),
        ((needed[0] + 1) // 2, (needed[1] + 1) // 2),
        groups=convolution.groups,
        device="meta",
    )
    even.weight, even.bias = nn.Parameter(weight), convolution.bias
    return even
