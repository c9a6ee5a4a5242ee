"""Argument checks shared by all ops: the argument's name, the value got, what is allowed."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ACTIVATIONS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def check_tensor(name: str, x: object) -> None:
    """TypeError unless ``x`` is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__} {x!r}")


def has_values(x: Tensor) -> bool:
    """Whether there is anything in ``x`` to be looked at: not while tracing, nor in meta and fake tensors."""
    return not (torch.compiler.is_compiling() or x.device.type == "meta" or isinstance(x, FakeTensor))


def check_dtype(name: str, x: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """TypeError unless ``x`` is a tensor of one of the ``allowed`` dtypes."""
    check_tensor(name, x)
    if x.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name} must have dtype {names}; got {str(x.dtype).removeprefix('torch.')}")


def check_int(name: str, value: int) -> None:
    """TypeError unless ``value`` is an int (a traced size counts as one)."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")


def check_at_least(name: str, value: int, least: int) -> None:
    """TypeError unless ``value`` is an int, ValueError unless it is at least ``least``."""
    check_int(name, value)
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")


def check_number(name: str, value: float) -> None:
    """TypeError unless ``value`` is an int or a float (traced ones count)."""
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")


def check_scale(scale: float | None, width: int) -> float:
    """``scale``, or ``width ** -0.5`` for None; TypeError or ValueError unless it is finite."""
    if scale is None:
        return width**-0.5 if width else 1.0
    check_number("scale", scale)
    if not abs(scale) < float("inf"):
        raise ValueError(f"scale must be finite, got {scale}")
    return float(scale)


def check_softcap(softcap: float | None) -> float:
    """``softcap`` as the ops take it, 0 for none; TypeError or ValueError unless it is finite and not negative."""
    if softcap is None:
        return 0.0
    check_number("softcap", softcap)
    if not 0 <= softcap < float("inf"):
        raise ValueError(f"softcap must be finite and >= 0 (0 or None: none), got {softcap}")
    return float(softcap)


def check_shape(name: str, x: Tensor, shape: tuple[int | None, ...], meaning: str) -> None:
    """TypeError unless ``x`` is a tensor, ValueError unless it has ``shape``, where None stands for any length."""
    check_tensor(name, x)
    got = x.shape
    if len(got) == len(shape):
        for length, wanted in zip(got, shape, strict=True):
            if wanted is not None and length != wanted:
                break
        else:
            return
    wanted_text = ", ".join("*" if length is None else str(length) for length in shape)
    raise ValueError(f"{name} must have shape {meaning}, here [{wanted_text}]; got {list(got)}")


def check_same_device(name: str, x: Tensor, other: str, device: torch.device) -> None:
    """ValueError unless ``x`` is on ``device``, where ``other`` is."""
    if x.device != device:
        raise ValueError(f"{name} must be on the same device as {other}, {device}; got {x.device}")


def check_range(name: str, x: Tensor, low: int, high: int) -> None:
    """TypeError unless ``x`` is integer, ValueError unless ``low <= x < high``; what has no values yet is trusted."""
    check_tensor(name, x)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {str(x.dtype).removeprefix('torch.')}")
    if not has_values(x) or x.numel() == 0:
        return
    least, most = (int(value) for value in x.aminmax())
    if least < low or most >= high:
        bad = least if least < low else most
        raise ValueError(f"{name} must be within [{low}, {high}), got {bad}")


def check_finite(**named: Tensor) -> None:
    """ValueError if there is NaN or inf in any of these tensors; what has no values yet is trusted."""
    for name, x in named.items():
        odd = ~x.isfinite() if has_values(x) else None
        if odd is not None and bool(odd.any()):
            where = tuple(odd.nonzero()[0].tolist())
            raise ValueError(f"{name} must be finite, got {x[where].item()} at {list(where)}")
