"""The plugin's own message format, which needs no FedML to read.

Imports: the core alone.
Offers: `envelope` (a head and named payloads as bytes), `head` (the fields of the head), `hostile`
(damaged messages for tests and the fuzzer).
"""
