"""Messages between processes over FedML's communication managers, with failures that are noticed.

Imports: the root modules (``seams``, ``logs``) and the core.
Offers: `peers.Endpoint` (send, receive, watch the peers), `protocol` (types of messages, events),
`shutdown` (ends of a transport and of a process). `wire` and `blocking_queue` serve `peers`.
"""
