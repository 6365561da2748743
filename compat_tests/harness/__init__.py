"""The test harness of the compatibility matrix; the distributions import nothing of it.

Rooms, lowest layer first:

- `harness.cells`: which combinations run, as data.
- `harness.processes`: child processes, runs that are killed, bytes on a wire.
- `harness.oracles`: the result that a run must have, computed without framework and adapter.
- `harness.flower` and `harness.fedml`: projects, and ways to run them on the framework.
- `harness.matrix`: runs cells, compares them with the oracles, writes and renders the results.

A room imports only rooms that precede it in this list. Neither `harness.cells` and
`harness.processes` nor `harness.flower` and `harness.fedml` import each other.
"""
