"""A model made faster for answers alone; used for the probe's features and for predictions."""

import copy

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, get_same_padding
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from transformers import PreTrainedModel


def fold(model: PreTrainedModel, size: tuple[int, int]) -> PreTrainedModel:
    """Return a model of the same answers, in evaluation mode, with BatchNorm and padding folded into convolutions.

    That saves up to a third of the time on a CPU. Where it changes the answer, because something else uses the output
    of a convolution too, the model stays as it is. Answers differ by rounding alone.

    Args:
        model: what to fold; it is put into evaluation mode, and else left as it is.
        size: (height, width) of its input, in pixels, and of all that the folded model will be shown.
    """
    model.eval()
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    folded = copy.deepcopy(model)
    pixel_values = torch.randn(
        2, 3, *size, device=model.device, generator=torch.Generator(model.device).manual_seed(0)
    )
    with torch.no_grad():
        expected = model(pixel_values).logits
        _fold(folded, pixel_values)
        difference = (folded(pixel_values).logits - expected).abs().max()
    return folded if difference <= 1e-3 * expected.abs().mean() else model


def _fold(model: PreTrainedModel, pixel_values: torch.Tensor) -> None:
    """Fold in place what `fold` promises, as far as one look at this input tells what follows what."""
    outputs, sides, pairs = {}, {}, {}
    names = {module: name for name, module in model.named_modules()}

    def remember(convolution: nn.Module, args: tuple, output: torch.Tensor) -> None:
        outputs[id(output)] = (convolution, output)  # the output too, so that no other tensor gets its id
        sides[convolution] = args[0].shape[-2:]

    def pair(norm: nn.Module, args: tuple) -> None:
        if args and id(args[0]) in outputs and norm.running_mean is not None:
            pairs[norm] = outputs[id(args[0])][0]

    hooks = [m.register_forward_hook(remember) for m in names if isinstance(m, nn.Conv2d)]
    hooks += [m.register_forward_pre_hook(pair) for m in names if type(m) in (nn.BatchNorm2d, BatchNormAct2d)]
    model(pixel_values)
    for hook in hooks:
        hook.remove()
    for norm, convolution in pairs.items():
        statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        convolution.weight, convolution.bias = fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics)
        rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        model.set_submodule(names[norm], rest)
    for convolution, shown in sides.items():
        if type(convolution) is Conv2dSame and convolution.dilation == (1, 1):
            model.set_submodule(names[convolution], _evenly_padded(convolution, shown))


def _evenly_padded(convolution: Conv2dSame, sides: tuple[int, int]) -> nn.Conv2d:
    """Return a convolution of the same answers for an input of these sides, with as much padding before as behind.

    TensorFlow's may have a pixel more behind; a row of zeros before the kernel's first then evens it out. That saves
    the copy of its input in which timm pads it.
    """
    along = zip(sides, convolution.kernel_size, convolution.stride, strict=True)
    needed = [get_same_padding(*axis, dilation=1) for axis in along]
    rows, columns = (pixels % 2 for pixels in needed)
    weight = nn.functional.pad(convolution.weight, (columns, 0, rows, 0))
    even = nn.Conv2d(
        convolution.in_channels,
        convolution.out_channels,
        weight.shape[-2:],
        convolution.stride,
        [(pixels + 1) // 2 for pixels in needed],
        groups=convolution.groups,
        device="meta",
    )
    even.weight, even.bias = nn.Parameter(weight), convolution.bias
    return even
