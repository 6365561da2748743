"""Tests that plugins inherit: the contracts of layers and stages, built in or of third parties.

A public face of the core, which may import everything but ``cli``. Offers `LayerContract` and
`StageContract`, which need pytest, and hostile bytes for the tests of codecs and adapters
(`damaged`, `signed`, `check_refusal`), which do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedpara_plugins.testing.hostile import check_refusal, damaged, signed

if TYPE_CHECKING:
    from fedpara_plugins.testing.layer_contract import LayerContract
    from fedpara_plugins.testing.stage_contract import StageContract

__all__ = ["LayerContract", "StageContract", "check_refusal", "damaged", "signed"]


def __getattr__(name: str) -> Any:
    """Import a contract on first use; the rest works without pytest."""
    if name == "LayerContract":
        from fedpara_plugins.testing.layer_contract import LayerContract

        return LayerContract
    if name == "StageContract":
        from fedpara_plugins.testing.stage_contract import StageContract

        return StageContract
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
