"""Writing an ONNX graph: nodes, constants, and weights that go to an external data file one by one.

The only file that imports the `onnx` library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgekv.errors import InputError

OPSET = 24  # RMSNormalization and RotaryEmbedding came with 23, TensorScatter with 24
IR_VERSION = 11
MICROSOFT = "com.microsoft"  # onnxruntime's own operators
INLINE_NBYTES = 1024  # smaller tensors stay in the graph's file
ALIGNMENT = 4096  # so that a weight can be mapped on its own (onnx/docs/ExternalData.md)

FLOAT, UINT8, INT8, INT32, DOUBLE = 1, 2, 3, 6, 11  # onnx.TensorProto's element types, for Cast

AnyArray = NDArray[Any]
Shape = Sequence[int | str]


def onnx_library() -> ModuleType:
    """The `onnx` package.

    Raises:
        InputError: it is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise InputError("exporting to ONNX needs the onnx package: pip install 'edgekv[onnx]'") from None
    return onnx


class GraphWriter:
    """A graph under construction. Values are their names; `op` adds a node and gives its outputs' names.

    Large weights are appended to `data` as they come and forgotten, so that memory holds one at a time.
    """

    def __init__(self, data: BinaryIO, data_name: str) -> None:
        self._onnx = onnx_library()
        self._data = data
        self._data_name = data_name
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._initializers: list[Any] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._branched: set[str] = set()
        self._count = 0

    def input(self, name: str, dtype: type[np.generic], shape: Shape) -> str:
        """Declare a graph input; a str in `shape` names a dimension that varies."""
        self._inputs.append(self._value_info(name, dtype, shape))
        return name

    def optional_input(self, name: str, default: AnyArray) -> str:
        """Declare a graph input that has a default: onnxruntime lets a caller leave it out."""
        self._inputs.append(self._value_info(name, default.dtype.type, default.shape))
        self._initializers.append(self._onnx.numpy_helper.from_array(default, name))
        return name

    def output(self, name: str, dtype: type[np.generic], shape: Shape) -> str:
        """Declare a graph output; a node made with `out=name` gives it."""
        self._outputs.append(self._value_info(name, dtype, shape))
        return name

    def op(self, kind: str, *inputs: str, out: str = "", domain: str = "", **attributes: Any) -> str:
        """Add a node with one output; `out` names it, "" as an input leaves that input out."""
        name = out or self._fresh(kind)
        self._add(kind, inputs, [name], domain, attributes)
        return name

    def ops(self, kind: str, *inputs: str, n_outputs: int, domain: str = "", **attributes: Any) -> list[str]:
        """Add a node with several outputs."""
        names = [self._fresh(kind) for _ in range(n_outputs)]
        self._add(kind, inputs, names, domain, attributes)
        return names

    def named(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        """Add an onnxruntime operator whose outputs are all given names; "" leaves one out."""
        self._add(kind, inputs, outputs, MICROSOFT, attributes)

    def either(self, condition: str, then: Callable[[], str], otherwise: Callable[[], str]) -> str:
        """A float32 value that one of two branches gives at run time; both may use any value made before."""
        branches = {}
        for key, build in (("then_branch", then), ("else_branch", otherwise)):
            outer, self._nodes = self._nodes, []
            value = build()
            result = self._onnx.helper.make_tensor_value_info(value, FLOAT, None)
            branches[key] = self._onnx.helper.make_graph(self._nodes, self._fresh(key), [], [result])
            self._branched.update(node.op_type for node in self._nodes if node.domain == MICROSOFT)
            self._nodes = outer
        return self.op("If", condition, **branches)

    def constant(self, array: AnyArray) -> str:
        """A small tensor in the graph's own file; equal ones are stored once."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._fresh("constant")
            self._initializers.append(self._onnx.numpy_helper.from_array(array, name))
            self._constants[key] = name
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """A constant vector of int64: shapes, axes, split sizes."""
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: float) -> str:
        """A constant float32 without dimensions."""
        return self.constant(np.array(value, np.float32))

    def weight(self, name: str, array: AnyArray) -> str:
        """A model weight, appended to the data file unless it is small."""
        array = np.ascontiguousarray(array)
        if array.nbytes < INLINE_NBYTES:
            self._initializers.append(self._onnx.numpy_helper.from_array(array, name))
            return name
        self._data.write(b"\0" * (-self._data.tell() % ALIGNMENT))
        self._refer(name, array, self._data.tell())
        self._data.write(array.data.cast("B"))
        return name

    def same_weight(self, name: str, twin: str, shape: tuple[int, ...]) -> str:
        """The bytes of the weight `twin` once more, under another shape; stored once."""
        stored = next(tensor for tensor in self._initializers if tensor.name == twin)
        copy = type(stored)()
        copy.CopyFrom(stored)
        copy.name = name
        assert int(np.prod(shape)) == int(np.prod(stored.dims)), (shape, stored.dims)
        del copy.dims[:]
        copy.dims.extend(shape)
        self._initializers.append(copy)
        return name

    def save(self, path: Path, graph_name: str, notes: dict[str, str]) -> None:
        """Check the graph with onnx.checker, in full, and write it; `notes` become metadata_props."""
        helper = self._onnx.helper
        graph = helper.make_graph(self._nodes, graph_name, self._inputs, self._outputs, self._initializers)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgekv")
        helper.set_model_props(model, notes)
        path.write_bytes(model.SerializeToString())
        self._onnx.checker.check_model(str(path))

    def contrib_kinds(self) -> tuple[str, ...]:
        """Names of the operators in use that only onnxruntime has."""
        return tuple(sorted(self._branched.union(n.op_type for n in self._nodes if n.domain == MICROSOFT)))

    def _add(
        self,
        kind: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        domain: str,
        attributes: dict[str, Any],
    ) -> None:
        name = self._fresh(kind)
        self._nodes.append(
            self._onnx.helper.make_node(kind, inputs, outputs, name=name, domain=domain, **attributes)
        )

    def _refer(self, name: str, array: AnyArray, offset: int) -> None:
        """An initializer that points into the data file."""
        onnx = self._onnx
        tensor = onnx.TensorProto(name=name, data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype))
        tensor.dims.extend(array.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        pairs = (("location", self._data_name), ("offset", offset), ("length", array.nbytes))
        for key, value in pairs:
            tensor.external_data.add(key=key, value=str(value))
        self._initializers.append(tensor)

    def _value_info(self, name: str, dtype: type[np.generic], shape: Shape) -> Any:
        helper = self._onnx.helper
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)

    def _fresh(self, kind: str) -> str:
        self._count += 1
        return f"{kind.lower()}_{self._count}"
