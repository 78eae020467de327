"""Mixers by name: what ``model.mixer=NAME`` names."""

import difflib
from collections.abc import Callable

from torch import nn

from .mixer import BiMambaMixer, MambaMixer

MixerFactory = Callable[..., nn.Module]
"""``factory(d_model, **options, device=, dtype=)``: a module from (B,L,D) to (B,L,D), which knows nothing of scans."""

_mixers: dict[str, MixerFactory] = {}


def register_mixer(name: str, factory: MixerFactory | None = None) -> Callable[[MixerFactory], MixerFactory]:
    """Register a mixer under ``name``, or act as a decorator where ``factory`` is omitted.

    Raises:
        ValueError: the name is taken by another one.
    """

    def add(value: MixerFactory) -> MixerFactory:
        known = _mixers.get(name)
        if known is not None and _origin(known) != _origin(value):
            raise ValueError(
                f"mixer {name!r} is already registered by {_origin(known)}; {_origin(value)} must choose another name"
            )
        _mixers[name] = value
        return value

    if factory is not None:
        add(factory)
    return add


def get_mixer(mixer: str | MixerFactory) -> MixerFactory:
    """The mixer of a name; a factory is returned as it is.

    Raises:
        ValueError: no mixer has that name; near matches are named.
    """
    if not isinstance(mixer, str):
        return mixer
    if mixer not in _mixers:
        close = difflib.get_close_matches(mixer, _mixers, n=2, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"unknown mixer {mixer!r}.{hint} Known: {', '.join(list_mixers())}")
    return _mixers[mixer]


def list_mixers() -> list[str]:
    """The names of all registered mixers."""
    return sorted(_mixers)


def _origin(factory: MixerFactory) -> str:
    return f"{getattr(factory, '__module__', '?')}.{getattr(factory, '__qualname__', type(factory).__qualname__)}"


register_mixer("mamba", MambaMixer)
register_mixer("bi_mamba", BiMambaMixer)
