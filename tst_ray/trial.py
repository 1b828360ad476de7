"""A forward pass on the meta device: what keeps a model from running, found without its weights.

try_out           what such a pass raises
one_text_a_row    transformers' masks, without a look at the positions' values
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_LENGTH = 4
_PRODUCTS = {
    getattr(torch.ops.aten, name) for name in ("mm", "bmm", "addmm", "baddbmm", "addbmm", "linear")
}


@torch.no_grad()
def try_out(
    base: nn.Module,
    embedding: nn.Embedding,
    blocks: Iterable[nn.Module],
    head: nn.Module,
    *,
    dtype: torch.dtype,
    by_ids: bool,
) -> Exception | None:
    """What a model on the meta device raises in a forward pass; None where it goes through.

    Args:
        base, embedding, blocks, head: see `architecture.Anatomy`; the parameters are of `dtype`
            from then on.
        dtype: what FSDP has the parameters in, and casts to what goes into a block.
        by_ids: whether it is given token ids, or embeddings.
    """

    def cast(block: nn.Module, *given: Any) -> Any:
        return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, given)

    for parameter in [*base.parameters(), *head.parameters()]:
        parameter.data = parameter.data.to(dtype)
    inputs = {"input_ids": torch.zeros(1, _LENGTH, dtype=torch.int64, device="meta")}
    if not by_ids:
        width = embedding.weight.shape[1]
        inputs = {"inputs_embeds": torch.zeros(1, _LENGTH, width, dtype=dtype, device="meta")}
    hooks = [block.register_forward_pre_hook(cast, with_kwargs=True) for block in blocks]
    try:
        with one_text_a_row(), _no_kernels(), _WithoutValues():
            head(base(**inputs, use_cache=False).last_hidden_state)
    except Exception as error:  # whatever a model class raises
        return error
    finally:
        for hook in hooks:
            hook.remove()
    return None


class _WithoutValues(TorchDispatchMode):
    """Goes on where the meta device has no answer, and checks what it lets pass.

    A mixture asks which experts tokens are sent to: to none, so that the blocks after it are tried,
    too. Products of two types are refused, as devices do.
    """

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.aten.nonzero.default and args[0].is_meta:
            return args[0].new_empty((0, args[0].dim()), dtype=torch.int64)
        if op.overloadpacket in _PRODUCTS:
            dtypes = sorted({str(a.dtype)[6:] for a in args if isinstance(a, Tensor)})
            if len(dtypes) > 1:
                raise TypeError(f"it multiplies {' with '.join(dtypes)}")
        return op(*args, **(kwargs or {}))


@contextmanager
def _no_kernels() -> Iterator[None]:
    """No Triton kernel runs: it would take what has no storage for an address on the GPU."""
    with ExitStack() as stack:
        if torch.cuda.is_available():
            with suppress(ImportError):
                from triton.runtime.jit import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
                    JITFunction,
                )

                refusal = RuntimeError("no Triton kernel runs on the meta device")
                stack.enter_context(mock.patch.object(JITFunction, "run", side_effect=refusal))
        yield


@contextmanager
def one_text_a_row() -> Iterator[None]:
    """While transformers masks attention, it need not look for several texts packed in a row.

    It would look at the positions' values, and so wait for the device in each forward pass.
    """
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    with ExitStack() as stack:
        if hasattr(masking_utils, name):
            stack.enter_context(mock.patch.object(masking_utils, name, lambda positions: None))
        yield
