"""A captioner as two ONNX graphs, for ``captioner.runtime`` and for browsers.

The graphs come from the encoder and from the one step of the decoder, by torch's own exporter.
"""

import dataclasses
import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from captioner.checksums import write_checksums
from captioner.errors import UsageError
from captioner.files import atomic_directory, write_json
from captioner.models.captioning_model import CaptioningModel
from captioner.models.decoder import Decoder, Memory, State
from captioner.models.inference_encoder import FastCNN
from captioner.runtime.exported import (
    ENCODER_FILE,
    EXPORT_FILE,
    NGRAMS_FILE,
    STEP_FILE,
    VOCABULARY_FILE,
    ExportConfig,
)
from captioner.version import __version__

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

PRECISIONS = ("float32", "float16", "int8")
OPSET = 20
LARGE_WEIGHT = 4096  # numbers; smaller weights stay as they are


class _EncoderGraph(nn.Module):
    """Pixels (B, 3, S, S), uint8, to the first state (B, 1, H), the memory (B, …) and more.

    That is the n-grams that each image lets expect, (B, G), if the captioner has a consensus.
    Attributes' logits are left out, which no step takes.
    """

    def __init__(self, model: CaptioningModel) -> None:
        super().__init__()
        self.cnn, self.decoder = FastCNN(model.encoder, torch.float32), model.decoder
        self.consensus = model.consensus

    def forward(self, pixels: Tensor) -> tuple[State, Memory, Memory]:
        features = self.cnn(pixels)
        state, memory = self.decoder.init_state(features)
        expected = (self.consensus.expected(features),) if self.consensus else ()
        return state, memory[:-1] if self.decoder.attributes else memory, expected


class _StepGraph(nn.Module):
    """Last tokens (B, K), state and memory to log-probabilities, new state and attention."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, token_ids: Tensor, state: State, memory: Memory) -> tuple[Tensor, ...]:
        if self.decoder.attributes:
            memory = (*memory, token_ids)  # in the place of their logits
        words = self.decoder.word_inputs(token_ids)
        output, state, attention = self.decoder.step(token_ids, words, state, memory)
        log_probs = torch.log_softmax(self.decoder.logits(*output), -1)
        return log_probs, *state, *(() if attention is None else (attention,))


def export_captioner(
    model: CaptioningModel, directory: str | Path, precision: str = "float32"
) -> None:
    """Write a captioner as an exported folder, see ``captioner.runtime.exported``.

    Args:
        model: On the CPU.
        directory: Replaced, if it is there, when all is written.
        precision: Of the weights in the files: "float32"; "float16", half as large; or "int8", in
            which the decoder's are whole numbers with a scale for each output of a layer, and the
            CNN's float16. All compute in float32.

    Raises:
        UsageError: onnx or onnxscript isn't installed.
    """
    _check_packages()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names of dimensions, and of what torch will change
        encoder, state, memory = _export_encoder(model.float().eval())
        step, attention = _export_step(model, state, memory)
    regions = model.encoder.grid_shape[0] if attention else 0
    preprocessing = model.encoder.preprocessing
    config = ExportConfig(__version__, precision, regions, preprocessing, model.search)
    with atomic_directory(directory) as folder:
        for name, graph in ((ENCODER_FILE, encoder), (STEP_FILE, step)):
            if precision != "float32":
                _shrink(graph, precision)
            (folder / name).write_bytes(graph.SerializeToString())
        write_json(folder / VOCABULARY_FILE, list(model.vocabulary.words), indent=None)
        if model.consensus:
            write_json(folder / NGRAMS_FILE, model.consensus.ngrams.content(), indent=None)
        write_json(folder / EXPORT_FILE, dataclasses.asdict(config))
        write_checksums(folder)


def _check_packages() -> None:
    for name in ("onnx", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"export needs {name}: pip install 'captioner[onnx]'")


def _dimension(name: str) -> Any:
    return torch.export.Dim(name, min=1, max=10_000)


def _export_encoder(model: CaptioningModel) -> tuple["ModelProto", State, Memory]:
    """Return the encoder's graph, and the state and memory of two images."""
    size = model.encoder.preprocessing.image_size
    pixels = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    shapes = ({0: _dimension("images")},)
    # What decoders keep for the gradient of attention isn't in the exported program's memory.
    program = torch.export.export(_EncoderGraph(model), (pixels,), dynamic_shapes=shapes)
    state, memory, expected = program.module()(pixels)
    names = [*_names("state", state), *_names("memory", memory), *["expected"] * len(expected)]
    return _to_onnx(program, ["pixels"], names), state, memory


def _export_step(model: CaptioningModel, state: State, memory: Memory) -> tuple["ModelProto", bool]:
    """Return the step's graph, and whether it has attention.

    Args:
        model: The captioner.
        state: Of two images, (2, 1, H) each.
        memory: Theirs, (2, …) each.
    """
    graph = _StepGraph(model.decoder)
    state = tuple(part.expand(-1, 3, -1).contiguous() for part in state)
    arguments = (torch.ones(2, 3, dtype=torch.long), state, memory)
    images, beams = _dimension("images"), _dimension("beams")
    shapes = (
        {0: images, 1: beams},
        tuple({0: images, 1: beams} for _ in state),
        tuple({0: images} for _ in memory),
    )
    program = torch.export.export(graph, arguments, dynamic_shapes=shapes)
    attention = len(program.module()(*arguments)) > 1 + len(state)
    outputs = ["log_probs", *_names("next_state", state), *(["attention"] if attention else [])]
    inputs = ["token_ids", *_names("state", state), *_names("memory", memory)]
    return _to_onnx(program, inputs, outputs), attention


def _names(name: str, parts: tuple[Tensor, ...]) -> list[str]:
    return [f"{name}_{number}" for number in range(len(parts))]


def _to_onnx(
    program: torch.export.ExportedProgram, inputs: list[str], outputs: list[str]
) -> "ModelProto":
    exported = torch.onnx.export(
        program,
        dynamo=True,
        input_names=inputs,
        output_names=outputs,
        opset_version=OPSET,
        verbose=False,
    )
    assert exported is not None
    return exported.model_proto


# --- smaller weights ------------------------------------------------------------------------------


def _shrink(model: "ModelProto", precision: str) -> None:
    """Store large weights in fewer bits, with a node before each that makes them float32 again."""
    from onnx import TensorProto, numpy_helper

    consumers: dict[str, tuple[NodeProto, int]] = {}
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            consumers.setdefault(name, (node, place))
    added = []
    for weight in list(model.graph.initializer):
        values = numpy_helper.to_array(weight)
        if weight.data_type != TensorProto.FLOAT or values.size < LARGE_WEIGHT:
            continue
        axis = _output_axis(*consumers[weight.name], values.ndim)
        model.graph.initializer.remove(weight)
        if precision == "float16" or axis is None:
            added.append(_as_float16(model, weight.name, values))
        else:
            added.append(_as_int8(model, weight.name, values, axis))
    nodes = [*added, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _output_axis(node: "NodeProto", place: int, axes: int) -> int | None:
    """Return along which axis of a weight its layer's outputs lie; None where that isn't known.

    None for convolutions too: a CNN's rounding errors add up from layer to layer. With all of
    MobileNetV2 in int8 three quarters of the captions stayed what they are, with the decoder alone
    97%.
    """
    if node.op_type == "Gather" and place == 0:  # a word vector has a scale of its own
        return 0
    if node.op_type in ("MatMul", "Gemm") and place == 1 and axes == 2:
        is_transposed = any(a.name == "transB" and a.i for a in node.attribute)
        return 0 if is_transposed else 1
    return None


def _as_float16(model: "ModelProto", name: str, values: np.ndarray) -> "NodeProto":
    from onnx import TensorProto, helper, numpy_helper

    stored = numpy_helper.from_array(values.astype(np.float16), f"{name}.float16")
    model.graph.initializer.append(stored)
    return helper.make_node("Cast", [stored.name], [name], to=TensorProto.FLOAT)


def _as_int8(model: "ModelProto", name: str, values: np.ndarray, axis: int) -> "NodeProto":
    """Store whole numbers from -127 to 127, and what each output's are multiplied with."""
    from onnx import helper, numpy_helper

    others = tuple(number for number in range(values.ndim) if number != axis)
    scale = np.maximum(np.abs(values).max(others, keepdims=True), 1e-12) / 127
    whole = np.rint(values / scale).astype(np.int8)
    scales = scale.reshape(-1).astype(np.float32)
    parts = [
        numpy_helper.from_array(whole, f"{name}.int8"),
        numpy_helper.from_array(scales, f"{name}.scale"),
    ]
    model.graph.initializer.extend(parts)
    return helper.make_node("DequantizeLinear", [part.name for part in parts], [name], axis=axis)
