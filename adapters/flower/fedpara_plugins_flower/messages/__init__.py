"""The records of Flower's messages: tensors, payloads, legacy lists, and the plugin's own records.

Imports: the root modules (``settings``, ``logs``, ``seams``) and the core.
Offers: `records` (records to tensors and back, payloads), `reply_marker` (a client's notes to the
server), `drift_records` (tasks and reports of SCAFFOLD and FedDyn), `legacy_lists` (names for the
legacy API's lists), `sixteen_bits` (bfloat16 in records), `refusal` (the reply to a server without
the plugin), `snippets` (lines that errors quote).
"""
