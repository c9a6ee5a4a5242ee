"""How keys and values are coded: ``Code`` for one of them, ``KVFormat`` for both, presets by published names."""

from dataclasses import dataclass, field
from typing import Literal, Union

import torch

from ..ops.checks import check_int, check_number
from ..reference.kv_layout import CHANNEL_SCALE, COMPAT, SIGN_MIXES, Layout

BITS = (8, 4, 2, 1.58, 1.5, 1.25, 1)
AFFINE = (8, 4, 2)
LOW_BITS = (4, 2, 1.58)
CLASSES = ("high", "low")
AXES = ("channel", "token")
SCALE_DTYPES = ("fp16", "bf16", "fp32")
WIDTHS = "a multiple of 8 from 32 to 256"


def check_share(name: str, share: float) -> None:
    """``share`` is a number within [0, 1]."""
    check_number(name, share)
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must be within [0, 1], got {share}")


@dataclass(frozen=True)
class Code:
    """How keys (or values) are coded.

    Attributes:
        bits: 8, 4, 2: affine, ``x = code * scale + zero``, the group's range exactly covered. 1.58: ternary, five trits
            a byte, thresholds ±gamma·mean|x|, scale the mean |x| beyond them. 1.5, 1.25, 1: the half spectrum (over
            channels) of the channels with the smaller ranges in sign bits, ± mean of the magnitudes, and the share
            0.5, 0.25, 0 of channels with the largest ranges in affine 2 bits. The number of sign-coded channels must be
            a power of two for the spectrum to be taken; where it is not, the channels' own signs are coded.
        axis: ``"channel"``: a group is ``group`` consecutive tokens of one channel; ``"token"``: ``group`` consecutive
            channels of one token.
        channel_scale: divide each channel by the square root of its largest magnitude (in the first sealed page)
            before coding: the channel-separable token-wise scheme of ZipCache.
        gamma: the ternary threshold; 0.7 is the VidKV paper's, 0.5 the release's.
        compat: numerics as in VidKV's release: ternary codes without a scale, spectrum components 0 or s.
        low_bits: two classes of tokens: those that are not salient have this many bits, fewer than ``bits``, which must
            be affine. 4 or 2: affine too. 1.58: ternary, with scales of their own, for axis ``"channel"``.
        per_head: every KV head has its own hard channels, those of its own largest ranges, where VidKV has the heads of
            a layer share them. For 1.5 and 1.25 bits.
    """

    bits: float
    axis: Literal["channel", "token"]
    channel_scale: bool = field(default=False, kw_only=True)
    gamma: float = field(default=0.7, kw_only=True)
    compat: bool = field(default=False, kw_only=True)
    per_head: bool = field(default=False, kw_only=True)
    low_bits: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.bits not in BITS or isinstance(self.bits, bool):
            raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}; got {self.bits!r}")
        if self.axis not in AXES:
            raise ValueError(f"axis must be 'channel' or 'token', got {self.axis!r}")
        for name in ("channel_scale", "compat", "per_head"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.channel_scale and (self.bits not in AFFINE or self.axis != "token"):
            raise ValueError(f"channel_scale goes with bits 8, 4 or 2 and axis 'token'; got {self.bits}, {self.axis!r}")
        if self.per_head and (self.bits not in (1.5, 1.25) or self.compat):
            raise ValueError(f"per_head goes with bits 1.5 or 1.25 and without compat; got {self.bits}, {self.compat}")
        if self.low_bits is not None:
            if self.low_bits not in LOW_BITS or self.bits not in AFFINE or self.low_bits >= self.bits:
                raise ValueError(f"low_bits must be one of {', '.join(map(str, LOW_BITS))} and fewer than affine bits, "
                                 f"here {self.bits}; got {self.low_bits!r}")  # fmt: skip
            if self.low_bits == 1.58 and self.axis != "channel":
                raise ValueError(f"low_bits 1.58 goes with axis 'channel', got {self.axis!r}")
        check_number("gamma", self.gamma)
        if not 0 <= self.gamma < float("inf"):
            raise ValueError(f"gamma must be finite and not negative, got {self.gamma!r}")

    @property
    def hundredths(self) -> int:
        """``bits`` in hundredths."""
        return round(100 * self.bits)

    @property
    def flat(self) -> list[int]:
        """As the ops take it."""
        flags = CHANNEL_SCALE * self.channel_scale + COMPAT * self.compat
        return [self.hundredths, AXES.index(self.axis), flags, round(100 * (self.low_bits or 0))]


@dataclass(frozen=True)
class KVFormat:
    """How a cache is stored.

    Attributes:
        key, value: a :class:`Code` each.
        group: elements that share parameters, a multiple of 8 up to 256. Along channels a head with fewer has one
            group, and the last group may be shorter.
        page: tokens that are sealed together, a multiple of 8 up to 256; of ``group`` too, for codes along channels.
        hot: tokens (at least) that stay in the model's dtype.
        scale_dtype: of the parameters: ``"fp16"``, ``"bf16"`` or ``"fp32"``. Groups whose range it cannot hold become
            NaN.
        salient: where a code has ``low_bits``, the share of a prompt's tokens that are to be salient (0.6 is that of
            ZipCache); ``group`` must be ``page`` then for codes along channels.
        later: the class of tokens that nobody has classed, as those that are appended: ``"high"`` or ``"low"``.
    """

    key: Code
    value: Code
    group: int = 64
    page: int = 64
    hot: int = 128
    scale_dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    salient: float = field(default=0.6, kw_only=True)
    later: Literal["high", "low"] = field(default="high", kw_only=True)

    def __post_init__(self) -> None:
        for name in ("key", "value"):
            if not isinstance(getattr(self, name), Code):
                raise TypeError(f"{name} must be a Code, got {getattr(self, name)!r}")
        for name in ("group", "page"):
            size = getattr(self, name)
            if not isinstance(size, int) or size % 8 or not 8 <= size <= 256:
                raise ValueError(f"{name} must be a multiple of 8 from 8 to 256, got {size!r}")
        along_channels = "channel" in (self.key.axis, self.value.axis)
        if along_channels and self.page % self.group:
            raise ValueError(f"page must be a multiple of group, {self.group}, for codes of axis 'channel'; "
                             f"got {self.page}")  # fmt: skip
        if not isinstance(self.hot, int) or isinstance(self.hot, bool) or self.hot < 0:
            raise ValueError(f"hot must be an int >= 0, got {self.hot!r}")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype must be one of {', '.join(SCALE_DTYPES)}; got {self.scale_dtype!r}")
        check_share("salient", self.salient)
        if self.later not in CLASSES:
            raise ValueError(f"later must be 'high' or 'low', got {self.later!r}")
        if self.two_classes and along_channels and self.group != self.page:
            raise ValueError(f"group must be page, {self.page}, for two classes of tokens; got {self.group}")

    @classmethod
    def preset(cls, name: str) -> "KVFormat":
        """A published format by name, one of ``KVFormat.presets()``; ValueError for others."""
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"fmt must be a KVFormat or one of {', '.join(PRESETS)}; got {name!r}")
        return PRESETS[name]

    @staticmethod
    def presets() -> tuple[str, ...]:
        """The names that :meth:`preset` knows."""
        return tuple(PRESETS)

    @classmethod
    def of(cls, fmt: Union["KVFormat", str]) -> "KVFormat":
        """``fmt``, or the preset of that name."""
        if not isinstance(fmt, (KVFormat, str)):
            raise TypeError(f"fmt must be a KVFormat or the name of a preset, got {type(fmt).__name__} {fmt!r}")
        return cls.preset(fmt) if isinstance(fmt, str) else fmt

    @property
    def flat(self) -> list[int]:
        """As the ops take it (``reference.kv_layout.Layout.of``)."""
        return [*self.key.flat, *self.value.flat, self.group, self.page, SCALE_DTYPES.index(self.scale_dtype)]

    @property
    def two_classes(self) -> bool:
        """Whether salient tokens have more bits than others."""
        return self.key.low_bits is not None or self.value.low_bits is not None

    @property
    def scale_torch_dtype(self) -> torch.dtype:
        """``scale_dtype`` as torch knows it."""
        return Layout.of(self.flat, 32).scale_dtype

    def bits_per_element(self, width: int, *, salient: float | None = None) -> tuple[float, float]:
        """Stored bits per key element and per value element of a sealed page, parameters and padding included.

        Args:
            width: channels of a head.
            salient: share of tokens in the high class, where there are two; None: the format's.

        Raises:
            TypeError, ValueError: ``width`` of no head that can be coded, ``salient`` outside [0, 1].
        """
        share = self.salient if salient is None else salient
        check_share("salient", share)
        layout = self.layout(width)
        high = round(self.page * share) if self.two_classes else self.page
        sizes = layout.sizes(high, self.page - high, layout.token_groups)
        key, value = (8 * size / (self.page * width) for size in sizes)
        return key, value

    def layout(self, width: int) -> Layout:
        """The byte layout for heads of ``width`` channels; ValueError where there is none."""
        check_int("head dim", width)
        if width % 8 or not 32 <= width <= 256:
            raise ValueError(f"head dim must be {WIDTHS}, got {width}")
        return Layout.of(self.flat, width)

    def describe(self, width: int) -> str:
        """One line: what is stored, and what it takes."""
        layout, texts = self.layout(width), []
        for name, code, side in (("keys", self.key, layout.key), ("values", self.value, layout.value)):
            what = f"{code.bits:g} bits per {code.axis}"
            if code.hundredths in SIGN_MIXES:
                easy = side.parts[0]
                signs = "of their spectrum" if easy.fourier else f"of their own ({easy.channels} is no power of two)"
                what += f" ({easy.channels} channels by signs {signs}, {side.hard} affine)"
            if code.low_bits is not None:
                what += f" (tokens that are not salient {code.low_bits:g})"
            texts.append(f"{name} {what}")
        key, value = self.bits_per_element(width)
        return f"{', '.join(texts)}: {key:.3f} and {value:.3f} bits per element at head dim {width}"


PRESETS = {
    "int8": KVFormat(Code(8, "token"), Code(8, "token"), group=256),
    "int4": KVFormat(Code(4, "token"), Code(4, "token"), group=256),
    "kivi-4": KVFormat(Code(4, "channel"), Code(4, "token")),
    "kivi-2": KVFormat(Code(2, "channel"), Code(2, "token")),
    "zipcache-4/2": KVFormat(
        Code(4, "channel", low_bits=2), Code(4, "token", channel_scale=True, low_bits=2), 128, 128
    ),
    "vidkv-2": KVFormat(Code(2, "channel"), Code(2, "channel")),
    "vidkv-1.5": KVFormat(Code(1.5, "channel"), Code(2, "channel")),
    "vidkv-1.5/1.58": KVFormat(Code(1.5, "channel"), Code(1.58, "channel")),
    "vidkv-1.5/1.66": KVFormat(
        Code(1.5, "channel"), Code(2, "channel", low_bits=1.58), 128, 128, salient=0.2, later="low"
    ),
}
