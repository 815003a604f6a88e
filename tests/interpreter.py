"""Triton's interpreter made exact, so that kernels can be tested on a machine without a GPU.

`install` patches the interpreter of the installed Triton (3.6 to 3.9); it must be imported by a process that has
TRITON_INTERPRET=1 in its environment before Triton is imported. What it repairs:

* bfloat16: the interpreter keeps it as 16-bit integers and computes on those. Here conversions round to nearest even,
  products of bfloat16 are taken in float32, and any other arithmetic on it is an error: kernels compute in float32.
* A comparison of two scalars is labelled with the type of the scalars, and its broadcast is then no mask any more.
* float32 products with TF32 operands are taken exactly by the interpreter; here operands are rounded as the tensor
  cores round them, for one product ("tf32") or three ("tf32x3").
* At every call of a function by another the interpreter looks through Triton's language for what it must replace, and
  at every operation it makes the table of NumPy's types anew, which takes more time than what is computed. Here a
  module is gone through once, and stays as it is then, and a type is looked up once.
* Programs run one after another, so a program that waits for others waits for ever. Launches with
  ``launch_cooperative_grid=True`` run theirs as threads of which one runs at a time; at each atomic operation another
  takes over, picked at random by a seed, so that a missing or wrong barrier shows in some order.
"""

from __future__ import annotations

import inspect
import random
import threading
import types

import numpy as np

SPINS = 200_000  # atomic operations of one launch after which it is taken for a deadlock
seed = 0  # of the order in which the programs of a cooperative launch run; tests set it


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16, given as 16-bit integers, in float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16, ties to even, as 16-bit integers; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    with np.errstate(over="ignore"):
        rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def as_tf32(values: np.ndarray) -> np.ndarray:
    """float32 with 10 bits of mantissa, ties away from zero, as cvt.rna.tf32.f32 of the PTX manual rounds."""
    values = np.ascontiguousarray(values)
    with np.errstate(over="ignore"):
        rounded = ((values.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def install() -> None:
    """Repair the interpreter of this process."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = type(interpreter.interpreter_builder)
    _repair_bfloat16(builder, interpreter, tl)
    _repair_dot(builder, interpreter, tl)
    _do_once(interpreter, tl)
    _run_cooperative_grids(builder, interpreter)


def _repair_bfloat16(builder, interpreter, tl) -> None:
    handle, cast, arithmetic = interpreter.TensorHandle, builder.cast_impl, {}

    def cast_impl(self, source, to):
        old, new = source.dtype.scalar, to.scalar
        if tl.bfloat16 not in (old, new):
            return cast(self, source, to)
        if old == new:
            return source
        if old == tl.bfloat16:
            return handle(widened(source.data).astype(interpreter._get_np_dtype(to)), new)
        return handle(narrowed(source.data.astype(np.float32)), new)

    def create_fp_to_fp(self, source, to, rounding):
        if tl.bfloat16 not in (source.dtype.scalar, to.scalar):
            return arithmetic["create_fp_to_fp"](self, source, to, rounding)
        assert rounding != interpreter._ir.ROUNDING_MODE.RTZ, "bfloat16 is rounded to nearest here"
        return cast_impl(self, source, to)

    def refusing(name):
        def operation(self, *operands):
            if any(isinstance(o, handle) and o.dtype.scalar.name == tl.bfloat16.name for o in operands):
                raise NotImplementedError(f"{name} on bfloat16: convert to float32 first")
            return _as_bool(arithmetic[name](self, *operands), handle, tl)

        return operation

    names = ("binary_op", "unary_op", "create_fma", "create_fabs", "create_erf", "create_rsqrt")
    for name in (*names, "create_fp_to_fp"):
        arithmetic[name] = getattr(builder, name)
    for name in names:
        setattr(builder, name, refusing(name))
    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp


def _as_bool(result, handle, tl):
    """A comparison's result as the type of one bit; the interpreter labels it with the type of what was compared."""
    return handle(result.data, tl.int1) if result.data.dtype == np.bool_ else result


def _repair_dot(builder, interpreter, tl) -> None:
    dot, handle = builder.create_dot, interpreter.TensorHandle
    kinds = interpreter._ir.INPUT_PRECISION

    def create_dot(self, a, b, acc, precision, imprecise):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (handle(widened(o.data), tl.float32) for o in (a, b))
            return dot(self, a, b, acc, kinds.IEEE, imprecise)
        if a.dtype.scalar != tl.float32 or precision == kinds.IEEE:
            return dot(self, a, b, acc, precision, imprecise)
        (big_a, small_a), (big_b, small_b) = (_parts(o.data) for o in (a, b))
        terms = [(big_a, big_b)]
        if precision == kinds.TF32x3:
            terms = [(small_a, big_b), (big_a, small_b), *terms]
        for left, right in terms:
            acc = dot(self, handle(left, tl.float32), handle(right, tl.float32), acc, kinds.IEEE, imprecise)
        return acc

    builder.create_dot = create_dot


def _parts(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The TF32 nearest to a number and the TF32 nearest to what it lacks; nothing is lacking at infinity and NaN."""
    big = as_tf32(values)
    with np.errstate(invalid="ignore"):
        return big, np.nan_to_num(as_tf32(values - big), nan=0.0)


def _do_once(interpreter, tl) -> None:
    patch, patched, find_type, known = interpreter._patch_lang, set(), interpreter._get_np_dtype, {}

    def patch_once(function):
        needed = {m.__name__ for m in function.__globals__.values() if m is tl or m is tl.core}
        if not needed or needed - patched:  # without either module the interpreter says what is missing
            patch(function)
            patched.update(needed)
        return interpreter._LangPatchScope()  # of no change: nothing is taken back after the launch

    def np_dtype(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = find_type(dtype)
        return known[name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, np_dtype


# --- grids whose programs wait for one another ------------------------------------------------------------------------

_grid: _Grid | None = None  # the running one


def _run_cooperative_grids(builder, interpreter) -> None:
    for name in ("create_atomic_rmw", "create_atomic_cas"):
        setattr(builder, name, _yielding(getattr(builder, name)))
    executor = interpreter.GridExecutor
    plain = executor.__call__

    def call(self, *args, **kwargs):
        if not kwargs.get("launch_cooperative_grid"):
            return plain(self, *args, **kwargs)
        kernel, grid = self.fn, _Grid(interpreter.interpreter_builder)

        def run(**named):
            return grid.run(kernel, named)

        # The executor looks at the globals and the signature of its function.
        self.fn = types.FunctionType(run.__code__, kernel.__globals__, kernel.__name__, None, run.__closure__)
        self.fn.__signature__ = inspect.signature(kernel)
        return plain(self, *args, **kwargs)

    executor.__call__ = call


def _yielding(operation):
    def with_turn(self, *args):
        if _grid is not None:
            _grid.pass_on()
        return operation(self, *args)

    return with_turn


class _Grid:
    """The programs of one launch as threads that hand one another the turn."""

    def __init__(self, builder):
        self.builder, self.random, self.spins = builder, random.Random(seed), 0
        self.turn, self.failure = threading.Condition(), None

    def run(self, kernel, named) -> None:
        global _grid
        if tuple(self.builder.grid_idx) != (0, 0, 0):
            return  # the executor calls once a program; the first call runs them all
        x, y, z = self.builder.grid_dim
        self.programs = [(i, j, k) for i in range(x) for j in range(y) for k in range(z)]
        self.waiting, self.now = set(range(len(self.programs))), None
        threads = [threading.Thread(target=self._body, args=(kernel, named, n), daemon=True) for n in self.waiting]
        _grid = self
        try:
            self.now = self.random.choice(sorted(self.waiting))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            _grid = None
            self.builder.set_grid_idx(0, 0, 0)
        if self.failure is not None:
            raise self.failure

    def _body(self, kernel, named, number: int) -> None:
        try:
            self._wait(number)
            kernel(**named)
        except Exception as problem:  # noqa: BLE001  whatever a kernel raises ends the launch, in the caller's thread
            self.failure = self.failure or problem
        with self.turn:
            self.waiting.discard(number)
            self.now = self.random.choice(sorted(self.waiting)) if self.waiting else None
            self.turn.notify_all()

    def _wait(self, number: int) -> None:
        with self.turn:
            self.turn.wait_for(lambda: self.now == number or self.failure is not None)
            if self.failure is not None:
                raise RuntimeError("another program of the grid failed")
            threading.current_thread().number = number
            self.builder.set_grid_idx(*self.programs[number])

    def pass_on(self) -> None:
        """Give the turn to some program, perhaps the same."""
        number, self.spins = threading.current_thread().number, self.spins + 1
        if self.spins > SPINS:
            raise RuntimeError("the programs of a cooperative grid wait for one another for ever")
        with self.turn:
            self.now = self.random.choice(sorted(self.waiting))
            self.turn.notify_all()
        self._wait(number)
