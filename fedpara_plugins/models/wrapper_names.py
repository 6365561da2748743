"""Names of the state of a wrapped model, which differ from the model's by the wrapper's prefix."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["wrapper_hint"]

WRAPPERS = {
    "module": "DataParallel or DistributedDataParallel",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "checkpoint_wrapper",
}
"""The part that a wrapper puts into names, and the wrapper."""


def wrapper_hint(names: Collection[str], known: Collection[str]) -> str:
    """Return the sentence that names are those of a wrapped model; "" if they are not.

    Args:
        names: of a state.
        known: of the model, without a wrapper. The two may be given the other way round.
    """
    for theirs, mine, which in ((names, known, "these are"), (known, names, "the others are")):
        for name in theirs:
            parts = name.split(".")
            found = [part for part in parts if part in WRAPPERS]
            plain = ".".join(part for part in parts if part not in WRAPPERS)
            if found and name not in mine and plain in mine:
                inside = ".".join(dict.fromkeys(found))
                return (
                    f" {name!r} stands for {plain!r}: {which} names of a wrapped model "
                    f"({', '.join(WRAPPERS[part] for part in dict.fromkeys(found))}). Take the "
                    f"state of the model inside, model.{inside}.state_dict(), or remove "
                    f"'{inside}.' from the names."
                )
    return ""
