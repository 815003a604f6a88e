"""The rivals of generation outside PyTorch: onnxruntime, OpenVINO and JAX, with the weights of a `fastrnn.Network`.

One ONNX graph, `step_graph`, is the step of both runtimes; onnxruntime also runs the whole loop as a Scan over it. All
draw by inverse CDF, from uniform numbers that NumPy makes.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.peers import FIRST, Peer, Unavailable
from fastrnn import Network

# torch's gates of a unit, in the order in which ONNX has them: LSTM i o f g, GRU z r n.
ONNX_GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}
JAX_TOKENS = 1 << 18  # of one call of the JAX loop, whose arrays have a fixed length
ONNX_OPS = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}


def needed(package: str) -> Any:
    """The package, or `Unavailable`."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Unavailable(f"{package} is not installed ({error})") from error


def arrays(network: Network) -> tuple[np.ndarray, list[list[np.ndarray]], np.ndarray, np.ndarray]:
    """(table, [w_ih, w_hh, b_ih, b_hh] of each layer, head weight, head bias) in float32."""
    table, weights = network.input_table()
    flat = [weight.detach().numpy() for weight in weights]
    layers = [flat[at : at + 4] for at in range(0, len(flat), 4)]
    head = network.head
    return table.detach().numpy(), layers, head.weight.detach().numpy(), head.bias.detach().numpy()


def state_names(network: Network) -> list[str]:
    kinds = "hc" if network.config.cell == "lstm" else "h"
    return [f"{kind}{layer}" for layer in range(network.config.num_layers) for kind in kinds]


def step_graph(network: Network, batch: int, loop: bool = False):
    """The ONNX graph (token, states, u) -> (next token, states, logits); as the body of a loop (next token, states,
    token again), the last of which the loop collects."""
    onnx = needed("onnx")
    helper, numpy_helper, kinds = onnx.helper, onnx.numpy_helper, onnx.TensorProto
    table, layers, head, bias = arrays(network)
    config = network.config
    order, op = ONNX_GATES[config.cell], ONNX_OPS[config.cell]
    nodes, constants = [], []

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(kind: str, inputs: list[str], outputs: list[str], **attributes) -> str:
        nodes.append(helper.make_node(kind, inputs, outputs, **attributes))
        return outputs[0]

    def gates(value: np.ndarray) -> np.ndarray:
        parts = np.split(value, len(order))
        return np.concatenate([parts[gate] for gate in order])

    axis = constant("axis", np.array([0], np.int64))
    x = node("Unsqueeze", [node("Gather", [constant("table", table), "token"], ["row"]), axis], ["x"])
    options = {"linear_before_reset": 1} if op == "GRU" else {}
    if config.cell == "rnn_relu":
        options["activations"] = ["Relu"]
    for layer, (w_ih, w_hh, b_ih, b_hh) in enumerate(layers):
        inputs = [x] + [constant(f"{name}{layer}", gates(value)[None]) for name, value in (("w", w_ih), ("r", w_hh))]
        inputs += [constant(f"b{layer}", np.concatenate([gates(b_ih), gates(b_hh)])[None]), "", f"h{layer}"]
        outputs = [f"y{layer}", f"next_h{layer}"]
        if op == "LSTM":
            inputs, outputs = [*inputs, f"c{layer}"], [*outputs, f"next_c{layer}"]
        node(op, inputs, outputs, hidden_size=config.hidden_size, **options)
        x = node("Squeeze", [f"y{layer}", constant(f"axis{layer}", np.array([1], np.int64))], [f"out{layer}"])
    x = node("Squeeze", [x, axis], ["y"])
    node("Gemm", [x, constant("head", head.T), constant("bias", bias)], ["logits"])
    column = constant("one", np.array(1, np.int64))
    total = node("CumSum", [node("Softmax", ["logits"], ["p"], axis=-1), column], ["cumulated"])
    reached = node("Cast", [node("LessOrEqual", [total, "u"], ["reached"])], ["count"], to=kinds.INT64)
    count = node("ReduceSum", [reached, constant("columns", np.array([1], np.int64))], ["drawn"], keepdims=0)
    node("Min", [count, constant("last", np.array(config.vocab_size - 1, np.int64))], ["next_token"])
    state, hidden = state_names(network), [1, batch, config.hidden_size]
    token = [("token", kinds.INT64, [batch])]
    before = token + [(name, kinds.FLOAT, hidden) for name in state] + [("u", kinds.FLOAT, [batch, 1])]
    after = [("next_token", kinds.INT64, [batch])] + [(f"next_{name}", kinds.FLOAT, hidden) for name in state]
    if loop:
        node("Identity", ["next_token"], ["collected"])
        after += [("collected", kinds.INT64, [batch])]
    else:
        after += [("logits", kinds.FLOAT, [batch, config.vocab_size])]
    ends = [[helper.make_tensor_value_info(*one) for one in side] for side in (before, after)]
    return helper.make_graph(nodes, "step", *ends, constants)


def loop_graph(network: Network, batch: int):
    """(token, states, u (n, B, 1)) -> tokens (n, B): a Scan over `step_graph`."""
    onnx = needed("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    state = state_names(network)
    inputs = ["token", *state, "u"]
    outputs = ["last_token", *(f"last_{name}" for name in state), "tokens"]
    body = step_graph(network, batch, loop=True)
    scan = helper.make_node("Scan", [f"from_{name}" for name in inputs], outputs, body=body, num_scan_inputs=1)
    hidden = [1, batch, network.config.hidden_size]
    values = [("from_token", kinds.INT64, [batch]), *((f"from_{name}", kinds.FLOAT, hidden) for name in state)]
    values.append(("from_u", kinds.FLOAT, ["n", batch, 1]))
    ends = [helper.make_tensor_value_info(*one) for one in values]
    return helper.make_graph([scan], "loop", ends, [helper.make_tensor_value_info("tokens", kinds.INT64, ["n", batch])])


def model_bytes(graph) -> bytes:
    onnx = needed("onnx")
    opset = [onnx.helper.make_opsetid("", 17)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def ort_session(graph):
    runtime = needed("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return runtime.InferenceSession(model_bytes(graph), options, providers=["CPUExecutionProvider"])


class Buffers:
    """Two sets of a step's arrays, so that the outputs of one call are the inputs of the next."""

    def __init__(self, network: Network, batch: int) -> None:
        config = network.config
        self.names = state_names(network)
        self.u = np.zeros((batch, 1), np.float32)
        self.logits = np.zeros((batch, config.vocab_size), np.float32)
        self.tokens = [np.zeros(batch, np.int64) for _ in range(2)]
        shape = (1, batch, config.hidden_size)
        self.states = [{name: np.zeros(shape, np.float32) for name in self.names} for _ in range(2)]
        self.random = np.random.default_rng(0)

    def inputs(self, side: int) -> dict[str, np.ndarray]:
        return {"token": self.tokens[side], "u": self.u, **self.states[side]}

    def outputs(self, side: int) -> dict[str, np.ndarray]:
        after = {f"next_{name}": array for name, array in self.states[1 - side].items()}
        return {"next_token": self.tokens[1 - side], "logits": self.logits, **after}

    def start(self) -> None:
        self.tokens[0][:] = FIRST
        for array in self.states[0].values():
            array[:] = 0

    def peer(self, dtype: str, calls: list[Callable[[], object]]) -> Peer:
        """The peer that calls ``calls[0]``, from side 0 to side 1, and ``calls[1]``, back, in turn."""

        def logits(ids: Tensor) -> Tensor:
            self.start()
            for step, token in enumerate(ids.numpy()):
                self.tokens[step % 2][:] = token
                calls[step % 2]()
            return torch.from_numpy(self.logits.copy())

        def run(number: int) -> Tensor:
            self.start()
            tokens = np.empty((number, len(self.u)), np.int64)
            for step in range(number):
                self.random.random(out=self.u, dtype=np.float32)
                calls[step % 2]()
                tokens[step] = self.tokens[1 - step % 2]
            return torch.from_numpy(tokens)

        return Peer(dtype, logits, run)


def ort_step(network: Network, batch: int) -> Peer:
    """A session of the step, inputs and outputs bound once to arrays in place."""
    session, buffers = ort_session(step_graph(network, batch)), Buffers(network, batch)
    calls = []
    for side in range(2):
        binding = session.io_binding()
        for name, array in buffers.inputs(side).items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in buffers.outputs(side).items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        calls.append(lambda binding=binding: session.run_with_iobinding(binding))
    return buffers.peer("float32", calls)


def ort_loop(network: Network, batch: int) -> Peer:
    """The whole loop within one session; its logits are those of its body, run step by step."""
    session, buffers = ort_session(loop_graph(network, batch)), Buffers(network, batch)
    start = {f"from_{name}": array for name, array in buffers.inputs(0).items() if name != "u"}

    def run(number: int) -> Tensor:
        buffers.start()
        u = buffers.random.random((number, batch, 1), dtype=np.float32)
        return torch.from_numpy(session.run(["tokens"], {**start, "from_u": u})[0])

    return Peer("float32", ort_step(network, batch).logits, run)


def openvino(network: Network, batch: int, dtype: str = "float32") -> Peer:
    """Two infer requests of the compiled step, whose tensors are arrays in place."""
    package = needed("openvino")
    core, buffers = package.Core(), Buffers(network, batch)
    options = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
    }  # fmt: skip
    compiled = core.compile_model(core.read_model(model_bytes(step_graph(network, batch))), "CPU", options)
    calls = []
    for side in range(2):
        request = compiled.create_infer_request()
        for name, array in (*buffers.inputs(side).items(), *buffers.outputs(side).items()):
            request.set_tensor(name, package.Tensor(array, shared_memory=True))
        calls.append(request.infer)
    return buffers.peer(dtype, calls)


@functools.cache
def jax_on(threads: int) -> Any:
    """JAX with pools of ``threads`` threads: it makes them at its first call, as many as it finds processors."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax, processors = needed("jax"), os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(processors)[:threads]))
    try:
        jax.numpy.zeros(1).block_until_ready()
    finally:
        os.sched_setaffinity(0, processors)
    return jax


def jax_loop(network: Network, batch: int) -> Peer:
    """The whole loop in one jitted function; layer 0's input product is a row of a table made beforehand."""
    jax = jax_on(torch.get_num_threads())
    jnp, config = jax.numpy, network.config
    table, layers, head, bias = arrays(network)
    rows = table @ layers[0][0].T + layers[0][2]
    constants = jax.tree.map(jnp.asarray, (rows, [[w.T, r.T, b, q] for w, r, b, q in layers], head.T, bias))

    def cell(gx, h, c, w_hh, b_hh):
        gh = h @ w_hh + b_hh
        if config.cell == "lstm":
            i, f, g, o = jnp.split(gx + gh, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return jax.nn.sigmoid(o) * jnp.tanh(c), c
        if config.cell == "gru":
            (xr, xz, xn), (hr, hz, hn) = jnp.split(gx, 3, -1), jnp.split(gh, 3, -1)
            n, z = jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn), jax.nn.sigmoid(xz + hz)
            return n + z * (h - n), c
        return (jnp.tanh if config.cell == "rnn_tanh" else jax.nn.relu)(gx + gh), c

    def step(constants, token, state):
        rows, layers, head, bias = constants
        after = []
        for layer, ((w_ih, w_hh, b_ih, b_hh), (h, c)) in enumerate(zip(layers, state)):
            gx = rows[token] if layer == 0 else after[-1][0] @ w_ih + b_ih
            after.append(cell(gx, h, c, w_hh, b_hh))
        return after[-1][0] @ head + bias, after

    def draw(logits, u):
        reached = jnp.cumsum(jax.nn.softmax(logits, -1), -1) <= u[:, None]
        return jnp.minimum(reached.sum(-1), config.vocab_size - 1).astype(jnp.int32)

    def loop(constants, token, state, u, number):
        def body(t, carry):
            token, state, tokens = carry
            logits, state = step(constants, token, state)
            token = draw(logits, u[t])
            return token, state, tokens.at[t].set(token)

        return jax.lax.fori_loop(0, number, body, (token, state, jnp.zeros(u.shape, jnp.int32)))[2]

    zeros = jnp.zeros((batch, config.hidden_size))
    first, zero = jnp.full((batch,), FIRST, jnp.int32), [(zeros, zeros)] * config.num_layers
    jitted, jitted_step, random = jax.jit(loop), jax.jit(step), np.random.default_rng(0)
    u = np.zeros((max(256, JAX_TOKENS // batch), batch), np.float32)

    def logits(ids: Tensor) -> Tensor:
        state = zero
        for token in ids.numpy():
            found, state = jitted_step(constants, jnp.asarray(token, jnp.int32), state)
        return torch.from_numpy(np.array(found))

    def run(number: int) -> Tensor:
        random.random(out=u[:number], dtype=np.float32)
        found = jitted(constants, first, zero, u, number)
        return torch.from_numpy(np.array(found)[:number]).long()

    return Peer("float32", logits, run)
