"""A CUDA graph's semantics without CUDA: what a function asks of the device is recorded, and done again from there.

As with CUDA graphs, nothing is done while recording, a replay works on the tensors that were there then, writes its
results where the recorded ones lay, has all of Python's numbers baked in, and draws from the generators as they are
when it runs. Reading from the device while recording is an error.
"""

import weakref
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SoftwareGraphs:
    """As `lowcal.training.graphed.Graphs` says."""

    recorded = 0  # by all of them

    def __init__(self, device):
        assert device.type == "cpu"

    @staticmethod
    def check(device):
        pass

    @contextmanager
    def aside(self, *, strict=False):
        with _NoReading() if strict else nullcontext():
            yield

    def record(self, body):
        type(self).recorded += 1
        random = torch.get_rng_state()
        with _Recorder() as recorder:
            body()
        recorder.undo()
        torch.set_rng_state(random)
        return recorder.replay


class _Mode(TorchDispatchMode):
    @classmethod
    def is_infra_mode(cls):  # under other modes torch runs no compiled code
        return True


class _NoReading(_Mode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the device was read from\nas by Tensor.item()")
        return func(*args, **(kwargs or {}))


class _Recorder(_Mode):
    def __init__(self):
        super().__init__()
        self.operations = []
        self._own = {}  # storages made while recording, by their address
        self._before = {}  # what others held before the first change

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("recording: the device was read from\nas by Tensor.item()")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in given:  # all of them, as batch normalisation does not say that it changes running statistics
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._own and storage.data_ptr() not in self._before:
                self._before[storage.data_ptr()] = (storage, storage.clone())
        outputs = func(*args, **kwargs)
        addresses = {tensor.untyped_storage().data_ptr() for tensor in given}
        made = []
        for leaf in tree_leaves(outputs):
            is_new = isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in addresses
            made.append(leaf if is_new else None)
            if is_new:
                self._own[leaf.untyped_storage().data_ptr()] = leaf.untyped_storage()
        self.operations.append((func, args, kwargs, made))
        return outputs

    def undo(self):
        for storage, before in self._before.values():
            storage.copy_(before)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, made in self.operations:
            outputs = tree_leaves(func(*args, **kwargs))
            for kept, output in zip(made, outputs, strict=True):
                if kept is not None:
                    kept.copy_(output)


class LateStream:
    """A second stream in the worst order that CUDA allows: it does all of its work when it is joined.

    Until then results are NaN, and what they are made from is not kept alive.
    """

    work = joins = 0  # of all of them

    def __init__(self, device):
        assert device.type == "cpu"
        self._work = []

    def run(self, function, *args):
        type(self).work += 1
        result = function(*args).fill_(torch.nan)
        kept = [weakref.ref(arg) if isinstance(arg, Tensor) else (lambda arg=arg: arg) for arg in args]
        self._work.append((result, function, kept))
        return result

    @torch.no_grad()
    def join(self):
        type(self).joins += 1
        for result, function, kept in self._work:
            args = [arg() for arg in kept]
            assert all(arg is not None for arg in args), "memory that the second stream reads was let go"
            result.copy_(function(*args))
        self._work.clear()
