"""The test harness of the compatibility matrix; the distributions import nothing of it.

Rooms, from the ground up:

- `harness.cells`: which combinations run, as data.
- `harness.processes`: child processes, runs that are killed, bytes on a wire.
- `harness.oracles`: what a run must come to, computed without framework and adapter.
- `harness.flower` and `harness.fedml`: projects, and ways to run them on the framework.
- `harness.matrix`: runs cells, holds them against the oracles, writes and renders the results.

A room imports only from rooms above it in this list, and never from one beside it.
"""
