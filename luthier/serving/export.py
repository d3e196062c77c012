"""A trained model as one ONNX file: from the pixels of an image to probabilities, with all that a program must know.

The file takes `pixel_values`, uint8 [N, H, W, 3], red, green, blue, as its resizing rule makes them of an image. What
the image processor does with their values is inside, and so are the softmax and the familiarity. It returns `logits`
and `probabilities`, float32 [N, C], and `sureness`, float32 [N], to compare with the metadata's `unsure_below`.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import nn

from luthier.errors import UserError, first_line
from luthier.escape import escape_terminal
from luthier.files import atomic_write
from luthier.images.resizing import find_rule
from luthier.images.views import EvaluationView
from luthier.run_files import ONNX_FILES
from luthier.serving.onnx_network import INPUT, OUTPUTS, Facts, OnnxNetwork
from luthier.serving.parity import Images
from luthier.serving.torch_network import TorchNetwork

OPSET = 20
WEIGHTED = ("Conv", "MatMul", "Gemm")
BETWEEN = ("Add", "Clip", "Relu", "MaxPool", "AveragePool", "GlobalAveragePool")
MAX_BYTES = 2e9  # of an ONNX file, which is one protobuf message
MAX_BATCH = 4096  # images; more at a time are no batch
MAX_HALF, MASKED = 65504, 1e30  # the largest float16; numbers that only stand for infinity, as in masks
RANGED = 100  # images whose values are compared with the largest float16


class PixelsToAnswer(nn.Module):
    """All that happens between the pixels of an image and the answer of a model.

    Args:
        network: whose model it is. It is taken apart: the network itself predicts no more.
        view: of the model.
    """

    scale: torch.Tensor
    black: torch.Tensor
    bank: torch.Tensor

    def __init__(self, network: TorchNetwork, view: EvaluationView):
        super().__init__()
        self.model, self.reversed = network.model, view.reversed
        self.register_buffer("scale", (view.contrast / 255)[:, None, None])
        self.register_buffer("black", view.black[:, None, None])
        self.familiarity, self.head = network.familiarity, network.head
        if self.familiarity:
            self.register_buffer("bank", self.familiarity.bank.float())

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits and probabilities [N, C] and the sureness [N] of pixels, uint8 [N, H, W, 3]."""
        levels = pixel_values.permute(0, 3, 1, 2).float()
        levels = levels.flip(1) if self.reversed else levels
        output = self.model(pixel_values=levels * self.scale + self.black).logits.float()
        logits = self.head(output)
        probabilities = logits.softmax(dim=-1)
        if not self.familiarity:
            return logits, probabilities, probabilities.amax(dim=-1)
        familiarity = self.familiarity._replace(bank=self.bank)
        return logits, probabilities, familiarity.rate(probabilities, output)


def export_precisions(
    network: TorchNetwork, folder: Path, precisions: Sequence[str], calibration: Images
) -> dict[str, Path]:
    """Write a model in float32 and in other precisions; return the files by precision.

    Args:
        network: whose model it is. It is taken apart: the network itself predicts no more.
        folder: where to write.
        precisions: `fp16`, `int8`.
        calibration: some of the images that the model has learned from, for `int8`.

    Raises:
        UserError: see `export_model`; or an image to calibrate with cannot be read.
    """
    files = {name: folder / ONNX_FILES[name] for name in ("fp32", *precisions)}
    facts = export_model(network, files["fp32"])
    if "fp16" in files:
        halve(files["fp32"], files["fp16"], facts)
    if "int8" in files:
        quantize(files["fp32"], files["int8"], facts, calibration.views(OnnxNetwork(files["fp32"]), "int8"))
    return files


def export_model(network: TorchNetwork, path: Path) -> Facts:
    """Write a model as an ONNX file, with weights in float32; return the facts that it holds as metadata.

    Args:
        network: whose model it is. It is taken apart: the network itself predicts no more.
        path: of the file; it is there when it is whole, or not at all.

    Raises:
        UserError: its image processor does more than resize and crop, its architecture cannot be exported, or it is
            too large.
    """
    view = network.view
    facts = Facts(network.labels, find_rule(view), network.unsure_below, network.none)
    # On the CPU, wherever the model has predicted: the file is the same, and its parts are in one place.
    module, example = PixelsToAnswer(network, view).cpu().eval(), torch.zeros(2, *view.size, 3, dtype=torch.uint8)
    name, size = network.model.config.model_type, sum(tensor.numel() * 4 for tensor in module.state_dict().values())
    if size > MAX_BYTES:
        raise UserError(f"the model has {size / 1e9:.1f} GB of weights, and an ONNX file holds 2: choose another one")
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                dynamic_shapes={INPUT: {0: torch.export.Dim("batch", max=MAX_BATCH)}},
                verbose=False,
            )
    except Exception as error:  # each architecture fails in a way of its own
        raise UserError(f"the architecture {name} cannot be exported to ONNX: {_root_cause(error)}") from error
    assert program is not None  # so with dynamo=True
    write_model(program.model_proto, facts, path)
    return facts


def _root_cause(error: BaseException) -> str:
    """Return the first line of the first error of a chain: the exporter wraps it in advice for its developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return escape_terminal(first_line(error))[:300]


def write_model(model: onnx.ModelProto, facts: Facts, path: Path) -> None:
    """Write an ONNX file whole, or not at all."""
    _remove_notes(model)
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in facts.describe().items()})
    model.producer_name = "luthier"
    with atomic_write(path) as written:
        onnx.save_model(model, written)


def _remove_notes(message: Any) -> None:
    """Remove what the exporter notes in all parts of a model: where in the source, on this machine, it comes from."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None and field.name != "initializer":
            for part in value if isinstance(value, Iterable) else [value]:
                _remove_notes(part)


def quantize(source: Path, path: Path, facts: Facts, views: Iterable[np.ndarray]) -> None:
    """Write a model with weights and activations of 8 bits; what follows the logits stays in float32.

    Args:
        source: the exported model in float32.
        path: of the file to write.
        facts: of the model.
        views: what the model sees of some of its training images, uint8 [H, W, 3]: they decide the range of each
            activation.
    """

    class Views(CalibrationDataReader):
        """Gives one view at a time."""

        def __init__(self) -> None:
            self.rest: Iterator[np.ndarray] = iter(views)

        def get_next(self) -> dict[str, np.ndarray] | None:
            view = next(self.rest, None)
            return None if view is None else {INPUT: view[None]}

    with tempfile.TemporaryDirectory() as scratch:
        prepared, written = Path(scratch, "prepared.onnx"), Path(scratch, "int8.onnx")
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        model = onnx.load(prepared)
        quantize_static(
            prepared, written, Views(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            op_types_to_quantize=_quantized_types(model), nodes_to_exclude=_in_float(model),
        )  # fmt: skip
        write_model(onnx.load(written), facts._replace(precision="int8"), path)


def halve(source: Path, path: Path, facts: Facts) -> None:
    """Write a model with weights in float16, for GPUs; what follows the logits stays in float32."""
    model = onnx.load(source)
    converted = convert_float_to_float16(model, keep_io_types=True, node_block_list=_after_logits(model))
    _skip_rounding(converted.graph)
    write_model(converted, facts._replace(precision="fp16"), path)


def _skip_rounding(graph: onnx.GraphProto) -> None:
    """Let nodes in float32 hand float32 to each other: the converter puts a float16 between any two of them.

    A probability of 0.9998 would be 1 there, and the logarithm of its odds infinite.
    """
    rounded = {node.output[0]: node for node in graph.node if _cast_to(node) == onnx.TensorProto.FLOAT16}
    for node in graph.node:
        if _cast_to(node) == onnx.TensorProto.FLOAT and node.input[0] in rounded:
            node.input[0] = rounded[node.input[0]].input[0]
    used = {name for node in graph.node for name in node.input}
    for name, node in rounded.items():
        if name not in used:
            graph.node.remove(node)


def _cast_to(node: onnx.NodeProto) -> int | None:
    """Return the type that a node casts to; None where it is no cast."""
    return next((entry.i for entry in node.attribute if node.op_type == "Cast" and entry.name == "to"), None)


def count_overflows(source: Path, views: Iterable[np.ndarray]) -> int:
    """Return for how many views a value inside a model is too large for float16.

    On a CPU, ONNX Runtime computes a float16 model in float32, and the answers do not show it.

    Args:
        source: the exported model in float32.
        views: what it sees of images, uint8 [H, W, 3].
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(source))
    later = set(_after_logits(model))
    kind, make = onnx.TensorProto.FLOAT, onnx.helper.make_node
    inner = {value.name for value in model.graph.value_info if value.type.tensor_type.elem_type == kind}
    nodes, names = list[onnx.NodeProto](), list[str]()
    end, zero = "where infinity begins", "nothing"
    for node in model.graph.node:
        nodes.append(node)
        for name in () if node.name in later else sorted(inner & {*node.output}):
            size, counts, counted = f"size of {name}", f"finite {name}", f"finite size of {name}"
            names.append(f"largest {size}")
            nodes += [
                make("Abs", [name], [size]),
                make("Less", [size, end], [counts]),  # before the largest is taken: a mask would hide all others
                make("Where", [counts, size, zero], [counted]),
                make("ReduceMax", [counted], [names[-1]], keepdims=0),
            ]
    if not names:
        return 0
    for name, number in ((end, MASKED), (zero, 0)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(number, np.float32), name))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, kind, []) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # In the order of the nodes. By default all values of the model would be in memory at once, several GB of them.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def overflows(view: np.ndarray) -> bool:
        return any(largest > MAX_HALF for largest in session.run(names, {INPUT: view[None]}))

    return sum(map(overflows, views))


def _after_logits(model: onnx.ModelProto) -> list[str]:
    """Return the names of the node of the logits, and of those that it does not depend on.

    They are few, and decide close calls. Their order in the file says nothing.
    """
    makers = {output: node for node in model.graph.node for output in node.output}
    needed, waiting = set[str](), list(makers[OUTPUTS[0]].input)
    while waiting:
        node = makers.get(waiting.pop())
        if node is not None and node.name not in needed:
            needed.add(node.name)
            waiting += node.input
    return [node.name for node in model.graph.node if node.name not in needed]


def _in_float(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes that stay in float32.

    Besides those after the logits they are those that scale the pixels: in 8 bits they take longer than all of the
    convolutions of EfficientNet-Lite0.
    """
    nodes = list(model.graph.node)
    first = next((number for number, node in enumerate(nodes) if node.op_type in WEIGHTED), len(nodes))
    return [node.name for node in nodes[:first]] + _after_logits(model)


def _quantized_types(model: onnx.ModelProto) -> list[str]:
    """Return the types of nodes that compute in 8 bits.

    Between layers of normalisation the sums of a transformer have values far from all others, and in 8 bits these
    would be all that is left.
    """
    normalised = any(node.op_type == "LayerNormalization" for node in model.graph.node)
    return [*WEIGHTED, *([] if normalised else BETWEEN)]
