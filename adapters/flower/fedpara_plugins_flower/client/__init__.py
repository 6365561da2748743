"""A client's part of a run: decode the message, call the app, encode the reply, keep state.

Imports: ``factories``, ``run``, ``privacy``, ``messages`` and the root modules.
Offers: `mod.client_mod` and `mod.client_mod_with`, the mods that a user adds to the ClientApp, and
`storage`, a client's state between rounds.
"""
