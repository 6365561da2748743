"""Contracts that plugins, built in or of third parties, inherit as their tests; need pytest.

Also the hostile bytes that the project's own tests and adapters use. May import everything but
``cli``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedpara_plugins.testing.hostile import check_refusal, damaged, signed

if TYPE_CHECKING:
    from fedpara_plugins.testing.layer_contract import LayerContract
    from fedpara_plugins.testing.stage_contract import StageContract

__all__ = ["LayerContract", "StageContract", "check_refusal", "damaged", "signed"]


def __getattr__(name: str) -> Any:
    """Import a contract when it is asked for: without pytest the rest still works."""
    if name == "LayerContract":
        from fedpara_plugins.testing.layer_contract import LayerContract

        return LayerContract
    if name == "StageContract":
        from fedpara_plugins.testing.stage_contract import StageContract

        return StageContract
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
