"""Published token-reduction methods, one small file each: functions from a `TokenContext` to a map, no models."""

from .average_pool import AveragePool
from .context import Reducer, TokenContext
from .divprune import DivPrune
from .evit import EViT
from .fastervlm import FasterVLM
from .flowcut import FlowCut
from .fopru import FoPru
from .fourier_pool import FourierPool
from .globalcom2 import GlobalCom2
from .hiprune import HiPrune
from .hired import HiRED
from .mmtok import MMTok
from .recoverable import RecoverableCompression
from .todre import ToDRE
from .tokencorr import TokenCorr
from .tome import ToMe
from .visionzip import VisionZip
from .vtccls import VTCCLS

__all__ = [
    "VTCCLS",
    "AveragePool",
    "DivPrune",
    "EViT",
    "FasterVLM",
    "FlowCut",
    "FoPru",
    "FourierPool",
    "GlobalCom2",
    "HiPrune",
    "HiRED",
    "MMTok",
    "RecoverableCompression",
    "Reducer",
    "ToDRE",
    "ToMe",
    "TokenContext",
    "TokenCorr",
    "VisionZip",
]
