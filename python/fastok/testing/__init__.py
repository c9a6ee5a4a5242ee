"""What tests and benchmarks share, in the package so that other projects can use it: backends, comparator, bench."""

from .backends import Backend, available_backends, over_backends, register_backend
from .compare import assert_accurate, assert_same

__all__ = ["Backend", "assert_accurate", "assert_same", "available_backends", "over_backends", "register_backend"]
