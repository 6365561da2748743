"""Runs the cells, compares them with the oracles, and writes and renders the results.

It may import every other room. It offers a cell's run (`cell_runs`) and its checks (`checks`), the
pytest hooks that write results (`results`) and choose the smoke part (`smoke`), and the parts of
the page (`page`, `engine_page`, `transport_page`), which import the standard library only.
"""
