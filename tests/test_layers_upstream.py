"""PyTorch's own module tests (test/test_modules.py) over its samples of the recurrent modules, with our classes.

The samples are `torch.testing._internal.common_modules.module_db`'s; the loops are written here after what each
upstream test checks.
"""

import copy
import io
import itertools
import pickle

import pytest
import torch
from layer_cases import CELLS, LAYERS, flat

from fastrnn import layers

pytest.importorskip("expecttest", reason="needs what torch.testing._internal imports: pip install expecttest")
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

INFOS = {info.module_cls.__name__: info for info in module_db if info.module_cls.__name__ in LAYERS + CELLS}
NAMES = [*LAYERS, *CELLS]


def _samples(name, dtype=torch.float64, training=True, requires_grad=False):
    """Each upstream sample with a module of ours built from it."""
    torch.manual_seed(0)
    info = INFOS[name]
    for sample in info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training
    ):
        build, call = sample.constructor_input, sample.forward_input
        module = getattr(layers, name)(*build.args, **build.kwargs, dtype=dtype).train(training)
        yield module, call.args, call.kwargs, sample


def test_every_recurrent_module_has_samples():
    assert sorted(INFOS) == sorted(NAMES)
    assert all(sum(1 for _ in _samples(name)) >= 2 for name in NAMES)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_forward(name, dtype, training):
    for module, args, kwargs, sample in _samples(name, dtype, training):
        out = module(*args, **kwargs)
        expected = sample.reference_fn(module, *args, **kwargs)
        for actual, wanted in zip(flat(out), flat(expected), strict=True):
            torch.testing.assert_close(actual, wanted)
        twin = module.to_torch()
        for actual, wanted in zip(flat(out), flat(twin(*args, **kwargs)), strict=True):
            torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_factory_kwargs(name):
    for _, _, _, sample in _samples(name):
        build = sample.constructor_input
        for device, dtype in itertools.product(("cpu", "meta"), (torch.float32, torch.float64, torch.bfloat16)):
            module = getattr(layers, name)(*build.args, **build.kwargs, device=device, dtype=dtype)
            assert all(p.device.type == device and p.dtype == dtype for p in module.parameters())
        skipped = torch.nn.utils.skip_init(getattr(layers, name), *build.args, **build.kwargs)
        assert all(p.device.type == "cpu" for p in skipped.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_pickle_save_load_and_state_dict(name):
    for module, args, kwargs, _ in _samples(name):
        expected = flat(module(*args, **kwargs))
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        clones = [pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False), copy.deepcopy(module)]
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        clones.append(copy.deepcopy(module))
        torch.nn.init.zeros_(next(clones[-1].parameters()))
        clones[-1].load_state_dict(torch.load(file))
        for clone in clones:
            assert all(torch.equal(a, b) for a, b in zip(flat(clone(*args, **kwargs)), expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_repr_and_members(name):
    for module, _, _, _ in _samples(name):
        repr(module)
        str(module)
        assert all(
            member in {**dict(module.named_parameters()), **dict(module.named_buffers())}
            for member in module.state_dict()
        )


def _variants(tensor):
    """The tensor itself, and with the same values a non-contiguous one."""
    spread = torch.stack([tensor.detach(), tensor.detach()], -1)[..., 0]
    assert tensor.dim() == 0 or tensor.numel() < 2 or not spread.is_contiguous()
    return tensor.detach().clone(), spread


@pytest.mark.parametrize("name", NAMES)
def test_non_contiguous_tensors(name):
    for module, args, kwargs, _ in _samples(name):
        leaves = flat(args)
        results = []
        for choice in ([0] * len(leaves), [1] * len(leaves)):
            made = iter([_variants(leaf)[k].requires_grad_() for leaf, k in zip(leaves, choice, strict=True)])
            call = [tuple(next(made) for _ in arg) if isinstance(arg, tuple) else next(made) for arg in args]
            out = flat(module(*call, **kwargs))
            found = torch.autograd.grad(sum(t.square().sum() for t in out), [*flat(call), *module.parameters()])
            results.append([*out, *found])
        for contiguous, spread in zip(*results, strict=True):
            torch.testing.assert_close(spread, contiguous)
        out = flat(module(*args, **kwargs))
        cotangents = [torch.ones(1, dtype=t.dtype).expand_as(t) for t in out]
        a = torch.autograd.grad(out, list(module.parameters()), cotangents)
        out = flat(module(*args, **kwargs))
        b = torch.autograd.grad(out, list(module.parameters()), [c.contiguous() for c in cotangents])
        for expanded, contiguous in zip(a, b, strict=True):
            torch.testing.assert_close(expanded, contiguous)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_grad_and_gradgrad(name):
    """Every sample's gradient, in training and in eval mode by turns, and every fifth sample's second derivative."""
    for k, (module, args, kwargs, _) in enumerate(_samples(name, requires_grad=True)):
        module.train(k % 3 != 0)
        names = [key for key, _ in module.named_parameters()]
        shape = [len(arg) if isinstance(arg, tuple) else 0 for arg in args]
        inputs = [*flat(args), *[p.detach().clone().requires_grad_() for p in module.parameters()]]

        def function(*tensors, module=module, names=names, shape=shape, kwargs=kwargs):
            given = iter(tensors)
            call = [tuple(next(given) for _ in range(n)) if n else next(given) for n in shape]
            params = dict(zip(names, given, strict=True))
            return tuple(flat(torch.func.functional_call(module, params, tuple(call), kwargs)))

        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert k % 5 or torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_device_transfer_and_to_empty(name):
    for module, args, kwargs, _ in _samples(name):
        expected = flat(module(*args, **kwargs))
        values = {key: value.clone() for key, value in module.state_dict().items()}
        module.to("meta")
        for out in flat(module(*[_to_meta(arg) for arg in args], **kwargs)):
            assert out.is_meta
        module.to_empty(device="cpu")
        module.load_state_dict(values)
        assert all(torch.equal(a, b) for a, b in zip(flat(module(*args, **kwargs)), expected, strict=True))
        module.float()
        assert all(p.dtype == torch.float32 for p in module.parameters())


def _to_meta(value):
    return tuple(_to_meta(v) for v in value) if isinstance(value, tuple) else value.to("meta")


@pytest.mark.parametrize("name", LAYERS)
def test_train_and_eval(name):
    """Without dropout, training and eval agree bit for bit."""
    for module, args, kwargs, _ in _samples(name):
        trained = flat(module.train()(*args, **kwargs))
        assert all(torch.equal(a, b) for a, b in zip(flat(module.eval()(*args, **kwargs)), trained, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_errors(name):
    info = INFOS[name]
    count = 0
    for sample in info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    ):
        build = sample.module_error_input.constructor_input
        call = sample.module_error_input.forward_input
        count += 1
        if sample.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(sample.error_type, match=sample.error_regex):
                getattr(layers, name)(*build.args, **build.kwargs)
        else:
            module = getattr(layers, name)(*build.args, **build.kwargs)
            with pytest.raises(sample.error_type, match=sample.error_regex):
                module(*call.args, **call.kwargs)
    assert count > 0
