"""What every adapter does with a message's tensors, on either side, whatever the framework.

A record is a named group of tensors in a message: the model, or an optimizer's variates beside it.
"""

from __future__ import annotations

from fedpara_plugins.exchange.client_state import ClientState

__all__ = ["ClientState"]
