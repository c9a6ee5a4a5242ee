"""What the tests on timm models share: small models with random weights, and how they are run."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision_shim  # noqa: F401
from torch import Tensor, nn

timm_eva = pytest.importorskip("timm.models.eva")
timm_vit = pytest.importorskip("timm.models.vision_transformer")

N = 49
SMALL: dict[str, Any] = {
    "img_size": 28,
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 64,
}


def randomised(model: nn.Module) -> nn.Module:
    """Weights large enough that tokens differ, layer scales and biases that matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5))
    return model.eval()


def vit(**options: Any) -> nn.Module:
    return randomised(timm_vit.VisionTransformer(**SMALL | options))


def eva(**options: Any) -> nn.Module:
    return randomised(timm_eva.Eva(**SMALL | options))


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 28, 28)


@pytest.fixture(autouse=True)
def one_thread_without_gradients() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these tensors are too small to share
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
