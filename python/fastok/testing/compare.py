"""The one comparator: anomalies first, then an error bound taken from PyTorch itself, then the worst coordinate."""

import torch
from torch import Tensor


def assert_same(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Bitwise equality of two tensors (NaN equals NaN), naming the first coordinate that differs."""
    _same_layout(actual, expected, name)
    differs = (actual != expected) & ~((actual != actual) & (expected != expected))
    if bool(differs.any()):
        where = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{name} differs at {int(differs.sum())} of {differs.numel()} places, first at {list(where)}: "
            f"{actual[where].item()} instead of {expected[where].item()}"
        )


def assert_accurate(
    actual: Tensor,
    truth: Tensor,
    peer: Tensor,
    *,
    factor: float = 2.0,
    floor: Tensor | None = None,
    name: str = "result",
) -> None:
    """``actual`` errs at most ``factor`` times as much as the same computation in PyTorch.

    Args:
        actual: what the kernel gave.
        truth: the fp64 reference.
        peer: plain PyTorch in the kernel's dtype. Its largest error against ``truth`` sets the bound, plus one rounding
            of the result to the kernel's dtype (a peer that happens to be exact cannot demand more than the dtype has).
        factor: how many times the peer's error is allowed.
        floor: what is allowed besides, at each place (broadcast): how far a rounding that the peer need not make, or
            may make by luck without error, moves the result.
        name: what to call the tensor in the message.
    """
    if actual.shape != truth.shape or actual.dtype != peer.dtype:
        raise AssertionError(
            f"{name} is {actual.dtype} {list(actual.shape)}, expected {peer.dtype} {list(truth.shape)}"
        )
    if truth.numel() == 0:
        return
    wanted = truth.to(actual.dtype).double()  # beyond the dtype's range the truth is inf there
    got = actual.double()
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        odd = test(got) != test(wanted)
        if bool(odd.any()):
            where = tuple(odd.nonzero()[0].tolist())
            raise AssertionError(
                f"{name} and the truth disagree on {kind} at {int(odd.sum())} places, first at {list(where)}: "
                f"{got[where].item()} instead of {wanted[where].item()}"
            )
    finite = torch.isfinite(wanted)
    if not bool(finite.any()):
        return
    exact = torch.where(finite, truth.double(), 0)
    error = torch.where(finite, got - exact, 0).abs()
    peer_error = torch.where(finite & torch.isfinite(peer), peer.double() - exact, 0).abs().max()
    rounding = torch.finfo(actual.dtype).eps * exact.abs() + torch.finfo(actual.dtype).tiny
    if floor is not None:
        rounding = rounding + floor.double().nan_to_num(nan=0, posinf=0)
    excess = error - factor * peer_error - rounding
    if bool((excess > 0).any()):
        flat = int(excess.argmax())
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), excess.shape))
        raise AssertionError(
            f"{name} errs {error[where].item():.3g} at {list(where)} ({got[where].item()} instead of "
            f"{exact[where].item()}); allowed {factor:g} x {float(peer_error):.3g}, PyTorch's own error, "
            f"+ {rounding[where].item():.3g} of rounding; {int((excess > 0).sum())} of {excess.numel()} places exceed"
        )


def _same_layout(actual: Tensor, expected: Tensor, name: str) -> None:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(
            f"{name} is {actual.dtype} {list(actual.shape)}, expected {expected.dtype} {list(expected.shape)}"
        )
