"""What a multiply-add costs at each width, measured once per machine and version of onnxruntime.

Kernels work in blocks of channels. How large the blocks are, and what a width costs that does not fill them, differs by
processor and by version, so it is measured: short chains of layers of one kind, at every width of two stretches of
sixteen. Other widths take the figure of the one that leaves the same remainder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from onnxshrink import save
from onnxshrink.errors import InputError
from onnxshrink.weights import Array

BLOCK = 16  # no kernel's block is larger
_STRETCHES = (BLOCK, 3 * BLOCK)  # widths 17 to 32 and 49 to 64
_LAYERS = 4
_ROUNDS = 9
_SIDE = 28  # of the images, pixels
_ROWS = 1024  # of the matrices
_FORMAT = 1  # of the cache


@dataclass(frozen=True)
class Kernels:
    """What work costs.

    Attributes:
        units: by kind of layer, seconds per multiply-add at the widths 17 to 32 and 49 to 64, in this order.
        element: seconds per element of anything else.
    """

    units: Mapping[str, tuple[float, ...]]
    element: float

    def unit(self, kind: str, width: int) -> float:
        """Seconds per multiply-add of a layer of this kind and width."""
        table = self.units[kind]
        blocks, rest = -(-width // BLOCK), (width - 1) % BLOCK
        if blocks <= 2:
            return table[rest]
        if blocks >= 4:
            return table[BLOCK + rest]
        return (table[rest] + table[BLOCK + rest]) / 2


# A machine like many, every width alike: enough to tell whether a run takes microseconds.
NOMINAL = Kernels(dict.fromkeys(("convolution", "pointwise", "depthwise", "product"), (5e-11,) * 2 * BLOCK), 5e-10)


def load_kernels() -> Kernels:
    """The figures of this machine: from the cache, else measured (a second or two) and cached."""
    path = _cache_file()
    found = _read(path)
    if found is None:
        found = measure_kernels()
        with contextlib.suppress(OSError, InputError):  # measured again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            save.write_text(json.dumps(asdict(found)), path)
    return found


def _cache_file() -> Path:
    """One file per machine and version, in the user's cache folder."""
    from platformdirs import user_cache_path

    version = onnxruntime.__version__
    machine = "|".join((platform.node(), platform.machine(), _processor(), version, str(_FORMAT)))
    digest = hashlib.sha256(machine.encode()).hexdigest()[:16]
    return user_cache_path("onnxshrink", appauthor=False) / f"kernels-{version}-{digest}.json"


def _processor() -> str:
    """The processor's name, where the system tells it."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith("model name")), platform.processor())
    return platform.processor()


def _read(path: Path) -> Kernels | None:
    try:
        data = json.loads(path.read_text())
        units = {kind: tuple(map(float, data["units"][kind])) for kind in _CHAINS}
        found = Kernels(units, float(data["element"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    complete = all(len(row) == BLOCK * len(_STRETCHES) and min(row) > 0 for row in found.units.values())
    return found if complete and found.element > 0 else None


# --- measuring -----------------------------------------------------------------------------------------------------


def measure_kernels() -> Kernels:
    """Time every kind of layer at every width."""
    widths = [start + 1 + rest for start in _STRETCHES for rest in range(BLOCK)]
    units = {}
    for kind, chain in _CHAINS.items():
        seconds = _best_seconds([chain.model(width) for width in widths])
        units[kind] = tuple(s / chain.multiply_adds(w) for s, w in zip(seconds, widths, strict=True))
    elements = _LAYERS * 4 * BLOCK * _SIDE**2
    (seconds_,) = _best_seconds([_additions(4 * BLOCK)])
    return Kernels(units, seconds_ / elements)


@dataclass(frozen=True)
class _Chain:
    """Some equal layers, one after the other."""

    op: str
    kernel: int = 1
    depthwise: bool = False

    def multiply_adds(self, width: int) -> int:
        if self.op == "MatMul":
            return _LAYERS * _ROWS * width * width
        return _LAYERS * _SIDE**2 * self.kernel**2 * width * (1 if self.depthwise else width)

    def model(self, width: int) -> onnx.ModelProto:
        random = np.random.default_rng(0)
        nodes, weights, data = [], [], "x"
        for layer in range(_LAYERS):
            names = [f"weight{layer}"] + ([f"bias{layer}"] if self.op == "Conv" else [])
            arrays = [self._weight(random, width), random.standard_normal(width)]
            weights += [numpy_helper.from_array(a.astype(np.float32), n) for n, a in zip(names, arrays, strict=False)]
            nodes.append(self._node([data, *names], f"y{layer}", width))
            nodes.append(helper.make_node("Relu", [f"y{layer}"], [f"x{layer}"]))
            data = f"x{layer}"
        shape = [_ROWS, width] if self.op == "MatMul" else [1, width, _SIDE, _SIDE]
        return _model(nodes, shape, weights)

    def _weight(self, random: np.random.Generator, width: int) -> Array:
        inner = 1 if self.depthwise else width
        shape = (width, inner, self.kernel, self.kernel) if self.op == "Conv" else (width, width)
        return np.asarray(random.standard_normal(shape) / np.sqrt(inner * self.kernel**2))

    def _node(self, inputs: list[str], output: str, width: int) -> onnx.NodeProto:
        if self.op == "MatMul":
            return helper.make_node(self.op, inputs, [output])
        window, pads = [self.kernel] * 2, [self.kernel // 2] * 4
        group = width if self.depthwise else 1
        return helper.make_node(self.op, inputs, [output], kernel_shape=window, pads=pads, group=group)


_CHAINS = {
    "convolution": _Chain("Conv", 3),
    "pointwise": _Chain("Conv"),
    "depthwise": _Chain("Conv", 3, depthwise=True),
    "product": _Chain("MatMul"),
}


def _additions(width: int) -> onnx.ModelProto:
    names = ["x", *(f"x{layer}" for layer in range(_LAYERS))]
    nodes = [helper.make_node("Mul", [a, a], [b]) for a, b in pairwise(names)]
    return _model(nodes, [1, width, _SIDE, _SIDE], [])


def _model(nodes: list[onnx.NodeProto], shape: Sequence[int], weights: list[onnx.TensorProto]) -> onnx.ModelProto:
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", nodes[-1].output[0])]
    graph = helper.make_graph(nodes, "kernels", infos[:1], infos[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _best_seconds(models: Sequence[onnx.ModelProto]) -> list[float]:
    """The shortest run of each of some models with one float input of fixed shape: what is in the way only adds."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    best = [float("inf")] * len(models)
    runs = []
    for model in models:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        feed = {given.name: np.random.default_rng(0).standard_normal(given.shape).astype(np.float32)}
        session.run(None, feed)
        runs.append((session, feed))
    for _ in range(_ROUNDS):
        for index, (session, feed) in enumerate(runs):
            start = time.perf_counter()
            session.run(None, feed)
            best[index] = min(best[index], time.perf_counter() - start)
    return best
