"""The ATen operators that a program may call. Nothing else of torch can be reached from an engine's files.

An operator is named "aten.NAME.OVERLOAD". NAMES lists those that compute: no files, no processes, no random numbers,
no new storage from pointers. FAST holds torch functions that mean the same for the arguments that the compiler writes
and cost half of an operator call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moec.runtime.errors import FormatError

NAMES_TEXT = """
    __or__ _fused_rms_norm _grouped_mm _softmax _log_softmax _to_copy _unsafe_view _weight_norm abs acos add addbmm
    addcdiv addcmul addmm addmv alias amax amin all any arange argmax argmin argsort as_strided asin atan atan2
    baddbmm bincount bitwise_and bitwise_not bitwise_or bitwise_xor bmm broadcast_tensors bucketize cat ceil chunk
    clamp clamp_max clamp_min clone concat conj constant_pad_nd contiguous conv1d conv2d copy cos cosh count_nonzero
    cumprod cumsum detach diagonal diff div dot einsum elu embedding empty empty_like eq erf erfc exp exp2 expand
    expand_as expm1 eye fill flatten flip floor floor_divide fmod full full_like gather ge gelu glu group_norm gt
    hardsigmoid hardswish hardtanh histc imag index index_add index_copy index_fill index_put index_select isfinite
    isinf isnan kthvalue layer_norm le leaky_relu lift_fresh_copy linalg_vector_norm linear linspace log log10 log1p
    log2 log_sigmoid log_softmax logaddexp logical_and logical_not logical_or logical_xor logsumexp lt masked_fill
    masked_scatter matmul max maximum mean median min minimum mish mm movedim mul mv native_layer_norm
    native_group_norm nan_to_num narrow ne neg new_empty new_full new_ones new_zeros nonzero norm one_hot ones
    ones_like pad permute pixel_shuffle polar pow prelu prod reciprocal relu relu6 remainder repeat repeat_interleave
    reshape rms_norm roll round rsqrt rsub scaled_dot_product_attention scalar_tensor scatter scatter_add
    scatter_reduce select select_scatter sigmoid sign silu sin sinh slice slice_scatter softmax softplus sort split
    split_with_sizes sqrt square squeeze stack std std_mean sub sum swapaxes t take take_along_dim tan tanh
    tensor_split tile to topk transpose tril tril_indices triu true_divide trunc type_as unbind unflatten unfold
    unsafe_chunk unsafe_split unsqueeze upsample_nearest2d var var_mean view view_as view_as_complex view_as_real
    vstack where xlogy zeros zeros_like
"""
NAMES = frozenset(NAMES_TEXT.split())

FAST: dict[str, Callable[..., Any]] = {
    "aten.add.Tensor": torch.add,
    "aten.addmm.default": torch.addmm,
    "aten.bmm.default": torch.bmm,
    "aten.cat.default": torch.cat,
    "aten.chunk.default": torch.chunk,
    "aten.cos.default": torch.cos,
    "aten.div.Tensor": torch.div,
    "aten.embedding.default": torch.embedding,
    "aten.expand.default": Tensor.expand,
    "aten.index_select.default": torch.index_select,
    "aten.linear.default": torch.nn.functional.linear,
    "aten.matmul.default": torch.matmul,
    "aten.mul.Tensor": torch.mul,
    "aten.neg.default": torch.neg,
    "aten.permute.default": Tensor.permute,
    "aten.reshape.default": Tensor.reshape,
    "aten.rsqrt.default": torch.rsqrt,
    "aten.select.int": torch.select,
    "aten.sigmoid.default": torch.sigmoid,
    "aten.silu.default": torch.nn.functional.silu,
    "aten.sin.default": torch.sin,
    "aten.squeeze.dim": torch.squeeze,
    "aten.sub.Tensor": torch.sub,
    "aten.t.default": torch.t,
    "aten.tanh.default": torch.tanh,
    "aten.transpose.int": torch.transpose,
    "aten.unsqueeze.default": torch.unsqueeze,
    "aten.view.default": Tensor.view,
}


def is_allowed(name: str) -> bool:
    """Whether a program may name this operator. Operators that write their inputs or an `out` tensor may not."""
    parts = name.split(".")
    return len(parts) == 3 and parts[0] == "aten" and parts[1] in NAMES and "out" not in parts[2].split("_")


def operator(name: str, has_kwargs: bool) -> Callable[..., Any]:
    """The function of an allowed operator. Raises: FormatError: it is not on the list, or this torch has none such."""
    if not is_allowed(name):
        raise FormatError(
            f"program.json calls {name}, which is not on the runtime's list of ATen operators; update moec"
        )
    if not has_kwargs and name in FAST:
        return FAST[name]
    _, packet, overload = name.split(".")
    try:
        return getattr(getattr(torch.ops.aten, packet), overload)._op
    except AttributeError as error:
        raise FormatError(f"program.json calls {name}, which torch {torch.__version__} does not have") from error
