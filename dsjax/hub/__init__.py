"""Checkpoints as DeepSeek publishes them, in and out.

    from dsjax import hub
    model = hub.load("DeepSeek-V2-Lite", dtype="bfloat16")  # .config, .params, .router_bias
    hub.save("copy", model)

`load`, `save` and `convert` are looked up when used: reading a config.json must not import JAX.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsjax.hub.conversion import convert
    from dsjax.hub.reading import Loaded, load
    from dsjax.hub.writing import save

__all__ = ["Loaded", "convert", "load", "save"]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def __getattr__(name: str) -> Any:
    if name == "convert":
        from dsjax.hub.conversion import convert

        return convert
    if name in ("Loaded", "load"):
        from dsjax.hub import reading

        return getattr(reading, name)
    if name == "save":
        from dsjax.hub.writing import save

        return save
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
