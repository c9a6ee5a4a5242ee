"""The example inputs of every op (fastok.testing.examples): complete, repeatable, and able to notice a wrong result."""

import pytest
import torch
from fastok import _library
from fastok.testing.examples import EXAMPLES, Example, examples, moved, outputs, verify


def test_every_op_has_examples_of_every_size() -> None:
    assert set(EXAMPLES) == set(_library.REFERENCE)
    for op, of_op in EXAMPLES.items():
        assert {example.size for example in of_op} == {"small", "awkward", "large"}, op
        assert all(example.op == op for example in of_op)
    names = [example.name for example in examples()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("example", list(examples("small", "awkward")), ids=lambda example: example.name)
def test_examples_change_with_the_seed_but_not_in_shape(example: Example) -> None:
    same, again, other = (example.arguments(torch.float16, seed) for seed in (1, 1, 2))
    changed = False
    for first, second, third in zip(same, again, other, strict=True):
        if not isinstance(first, torch.Tensor):
            assert first == second == third
            continue
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
        assert (first.shape, first.stride(), first.dtype) == (third.shape, third.stride(), third.dtype)
        changed |= not torch.equal(first, third)
    assert changed


def test_wrong_results_are_noticed() -> None:
    for example in examples("small"):
        arguments = example.arguments(torch.float32)
        result = getattr(torch.ops.fastok, example.op)(*arguments)
        parts = list(outputs(result))
        verify(example.op, arguments, tuple(parts))
        for place, part in enumerate(parts):
            wrong = part.clone()
            wrong.view(-1)[-1] += 1
            with pytest.raises(AssertionError):
                verify(example.op, arguments, (*parts[:place], wrong, *parts[place + 1 :]))


def test_moving_keeps_strides_and_offsets() -> None:
    view = torch.arange(60.0).view(3, 20)[:, 3:14:2]
    (there, number) = moved((view, 7), "cpu")
    assert number == 7
    assert torch.equal(there, view)
    assert (there.stride(), there.storage_offset()) == (view.stride(), view.storage_offset())
