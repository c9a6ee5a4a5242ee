"""`fastok.apply`: find the encoder in a model and put a reducer into it."""

from typing import Any

from torch import nn

from ..reducers.context import Reducer
from . import timm, transformers, vision_language
from .handle import Handle, Work
from .session import check_needs
from .swap import Swaps

_LIBRARIES = (timm, transformers)


def apply(model: nn.Module, reducer: Reducer, **where: Any) -> Handle:
    """Reduce the tokens of images: in every layer of a vision transformer, or on their way into a language model.

    Args:
        model: a supported encoder or vision-language model, or any module that contains exactly one. Of a
            vision-language model, give the whole: it has to know that its encoder returns fewer tokens, and its
            ``generate`` that the cache is shorter than what it stands for. (Without its head, it can be called in a
            loop; a head that was not told gets an error where it counts by the cache.)
        reducer: for instance ``fastok.reducers.ToMe(r=16)``.
        where: for a vision-language model, ``place="layers"`` reduces in the layers of its vision tower (in Qwen's,
            methods that only drop tokens: FlowCut), ``place="output"`` behind it. By default in layers if the reducer
            says in which it reduces (ToMe, EViT, FlowCut), unless that is always the last.

    Returns:
        A `Handle`. ``with fastok.apply(model, reducer) as handle: …`` undoes it at the end, exactly, errors or not.

    Raises:
        TypeError: no supported model (the message lists those supported), an encoder with blocks that cannot be
            reduced, or something that is no reducer.
        ValueError: several encoders (give the one you mean), or one that has a reducer already.
        NotImplementedError: the reducer needs something that cannot be shown to it there.

    The model keeps its weights, hooks and attributes. Layers share state: threads must not share a model.

    **Encoders** (ViT, DeiT, DINOv2, CLIP, SigLIP; timm's VisionTransformer and Eva) are reduced between the attention
    residual and the MLP of each layer. Class, distillation and register tokens are protected. Merged tokens carry their
    size, in fp32: with the reducer's ``prop_attn``, attention (and an attention-pooling head) adds log(size) to their
    logits, and average-pooling heads count each token as often as its size. Keys are compared before rotary embedding,
    of which a merged token keeps the row of its lowest original position. Training works, also with gradient
    checkpointing (one forward per backward, or an error); so does ``torch.compile(fullgraph=True)``, where nothing is
    recorded in the handle.

    **Vision-language models** (LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL) are reduced once,
    between projector or patch merger and language model (or in the layers of their encoder): the reducer is called
    for each image and video, and the prompt is shortened to what it leaves. ``forward`` and ``generate`` are called
    as before and count the tokens of the original prompt: ``input_ids``, ``attention_mask``, ``position_ids`` and
    ``labels`` go in as the processor made them, with a cache, too, and ``generate`` returns prompt and new tokens;
    only logits and the cache are shorter. Positions are renumbered without gaps; in Qwen's models, tokens keep
    those they had (M-RoPE). Prompts of a batch that keep different numbers of tokens are padded on the side where
    they were padded, else on the left. Scores of the vision tower's attention are computed in the layers that the
    reducer asks for, and its attention is left as it is. Newline embeddings stay, unless the reducer says otherwise
    (``newlines = "filled"`` or ``"none"``). Training works.

    ``torch.compile`` of LLaVA-1.5 gives one graph (``fullgraph=True``, after a first call outside, in which
    transformers installs hooks) for methods that keep a fixed number of tokens, if all prompts have as many images;
    methods that read ``text`` want no attention mask there. Otherwise, and in the other models, which break graphs
    themselves, the graph ends once or twice between vision tower and language model: how long the prompt becomes
    depends on what is in it. A tower of Qwen's that drops tokens in its layers runs outside graphs. Compiled forwards
    of one graph record nothing in the handle.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__} {model!r}")
    needs = getattr(reducer, "needs", None)
    if needs is None or not callable(reducer) or isinstance(reducer, type):
        raise TypeError(f"reducer must be a reducer such as fastok.reducers.ToMe(r=16), got {reducer!r}")
    swaps = Swaps()
    try:
        return Handle(_patched(model, reducer, swaps, where), swaps)
    except BaseException:
        swaps.restore()
        raise


def _patched(model: nn.Module, reducer: Reducer, swaps: Swaps, where: dict[str, Any]) -> Work:
    cores = {name: module for name, module in model.named_modules() if vision_language.family_of(module) is not None}
    if cores:
        unknown = where.keys() - {"place"}
        if unknown:
            raise TypeError(
                f"for a vision-language model, where is place='layers' or 'output'; got {', '.join(unknown)}"
            )
        return vision_language.patch(model, _only(model, cores), reducer, swaps, where.get("place"))
    library, encoder = _find(model)
    if where:
        raise TypeError(f"{type(reducer).__name__} takes no place to act at, got {', '.join(where)}")
    check_needs(reducer, "in an encoder's layers", library.SHOWN)
    session: Work = library.patch(model, encoder, reducer, swaps)
    return session


def _find(model: nn.Module) -> tuple[Any, nn.Module]:
    """The one supported encoder in ``model``, and the integration that knows it."""
    found = {
        name: (library, module)
        for name, module in model.named_modules()
        for library in _LIBRARIES
        if library.is_encoder(module)
    }
    if not found:
        known = (*_LIBRARIES, vision_language)
        supported = "; ".join(f"{library.LIBRARY}: {', '.join(library.SUPPORTED)}" for library in known)
        raise TypeError(f"no supported encoder in {type(model).__name__}; supported are {supported}")
    encoder = _only(model, {name: module for name, (_, module) in found.items()})
    return next(library for library, module in found.values() if module is encoder), encoder


def _only(model: nn.Module, found: dict[str, nn.Module]) -> nn.Module:
    if len(found) > 1:
        names = ", ".join(f"{name or 'the model itself'} ({type(module).__name__})" for name, module in found.items())
        raise ValueError(f"{type(model).__name__} contains several encoders, give apply one of them: {names}")
    return next(iter(found.values()))
