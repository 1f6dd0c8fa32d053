"""Graph under construction: onnx-ir's nodes and constants, and weights that go to a data file one by one.

The only file that imports `onnx` and `onnx_ir`, which come with the extra `onnx`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import InputError

try:
    import onnx
    import onnx_ir as ir
except ImportError:
    raise InputError("exporting to ONNX needs onnx and onnx-ir: pip install 'edgekv[onnx]'") from None

OPSET = 24  # RMSNormalization and RotaryEmbedding came with 23, TensorScatter with 24
IR_VERSION = 11
MICROSOFT = "com.microsoft"
ONLY_ONNXRUNTIME = frozenset(  # operators in use that are not the standard's
    {
        "GatherBlockQuantized",
        "GroupQueryAttention",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "SkipSimplifiedLayerNormalization",
    }
)
INLINE_NBYTES = 1024  # smaller tensors stay in the graph's file
ALIGNMENT = 4096  # so that a weight can be mapped on its own (onnx/docs/ExternalData.md)

Array = NDArray[Any]
Value = ir.Value
DType = type[np.generic]
Shape = Sequence[int | str]


class GraphWriter:
    """A decoder graph whose large weights are appended to `data` as they come: memory holds one of them.

    onnx-ir's LazyTensor asks for them when the graph is complete. A block that is loaded, and followed by
    edgekv.rewrite.int8_rows, as a whole would then stay in memory or be loaded once per weight.
    """

    def __init__(self, data: BinaryIO, data_name: str) -> None:
        self._data = data
        self._data_name = data_name
        self._graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, MICROSOFT: 1}, name="decoder")
        self._stored = ir.tape.Tape(self._graph)
        self._tape = self._stored  # of the graph that takes nodes: the decoder, or a branch of it
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}

    def input(self, name: str, dtype: DType, shape: Shape) -> Value:
        """Declare a graph input; a str in `shape` names a dimension that varies."""
        value = ir.val(name, _onnx_type(dtype), shape)
        self._graph.inputs.append(value)
        return value

    def optional_input(self, name: str, default: Array) -> Value:
        """Declare a graph input that has a default: onnxruntime lets a caller leave it out."""
        value = self._stored.initializer(ir.tensor(default), name)
        self._graph.inputs.append(value)
        return value

    def output(self, value: Value, name: str, dtype: DType, shape: Shape, first: bool = False) -> Value:
        """Make a node's output one of the graph's, behind those that are declared or as the first."""
        value.name, value.dtype, value.shape = name, _onnx_type(dtype), ir.Shape(shape)
        self._graph.outputs.insert(0 if first else len(self._graph.outputs), value)
        return value

    def op(self, kind: str, *inputs: Value | None, **attributes: Any) -> Value:
        """Add a node with one output; None as an input leaves that input out."""
        return self._tape.op(kind, inputs, attributes, domain=_domain(kind))

    def ops(self, kind: str, *inputs: Value | None, n_outputs: int, **attributes: Any) -> Sequence[Value]:
        """Add a node with several outputs."""
        return self._tape.op_multi_out(kind, inputs, attributes, num_outputs=n_outputs, domain=_domain(kind))

    def cast(self, x: Value, dtype: DType) -> Value:
        """The same values in another type."""
        return self.op("Cast", x, to=_onnx_type(dtype))

    def either(self, condition: Value, then: Callable[[], Value], otherwise: Callable[[], Value]) -> Value:
        """A float32 value that one of two branches gives at run time; both may use any value made before."""
        branches = (self._branch("then", then), self._branch("else", otherwise))
        return self.op("If", condition, then_branch=branches[0], else_branch=branches[1])

    def _branch(self, kind: str, build: Callable[[], Value]) -> ir.Graph:
        graph = ir.Graph([], [], nodes=[], name=f"{kind}_{len(self._graph)}")
        outer, self._tape = self._tape, ir.tape.Tape(graph)
        result = build()
        self._tape = outer
        result.dtype = ir.DataType.FLOAT
        graph.outputs.append(result)
        for node in graph:
            for value in node.outputs:
                value.name = f"{graph.name}.{value.name}"  # onnx-ir numbers each graph's values from 0
        return graph

    def constant(self, array: Array) -> Value:
        """A small tensor in the graph's own file; equal ones are stored once."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self._stored.initializer(ir.tensor(array), name)
        return self._constants[key]

    def ints(self, *values: int) -> Value:
        """A constant vector of int64: shapes, axes, split sizes."""
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: float) -> Value:
        """A constant float32 without dimensions."""
        return self.constant(np.array(value, np.float32))

    def weight(self, name: str, array: Array) -> Value:
        """A model weight, appended to the data file unless it is small."""
        array = np.ascontiguousarray(array)
        if array.nbytes < INLINE_NBYTES:
            return self._stored.initializer(ir.tensor(array), name)
        self._data.write(b"\0" * (-self._data.tell() % ALIGNMENT))
        dtype = ir.DataType.from_numpy(array.dtype)
        place = (self._data_name, self._data.tell(), array.nbytes)
        self._data.write(array.data.cast("B"))
        return self._stored.initializer(
            ir.ExternalTensor(*place, dtype, shape=ir.Shape(array.shape), name=name)
        )

    def same_weight(self, name: str, twin: Value, shape: tuple[int, ...]) -> Value:
        """The bytes of the weight `twin` once more, under another shape; a large one is stored once."""
        stored = twin.const_value
        assert stored is not None
        if not isinstance(stored, ir.ExternalTensor):
            return self.weight(name, stored.numpy().reshape(shape))
        place = (stored.location, stored.offset, stored.length)
        return self._stored.initializer(
            ir.ExternalTensor(*place, stored.dtype, shape=ir.Shape(shape), name=name)
        )

    def save(self, path: Path, notes: dict[str, str]) -> None:
        """Write the graph and check it with onnx.checker; `notes` become metadata_props."""
        model = ir.Model(self._graph, ir_version=IR_VERSION, producer_name="edgekv", metadata_props=notes)
        ir.save(model, path)
        onnx.checker.check_model(str(path))

    def contrib_kinds(self) -> tuple[str, ...]:
        """Names of the operators in use that only onnxruntime has."""
        return tuple(sorted({node.op_type for node in self._graph.all_nodes() if node.domain == MICROSOFT}))


def _domain(kind: str) -> str:
    return MICROSOFT if kind in ONLY_ONNXRUNTIME else ""


def _onnx_type(dtype: DType) -> ir.DataType:
    return ir.DataType.from_numpy(np.dtype(dtype))
