"""The cells of the matrix, as data: strategies, methods, codecs, versions and expected refusals.

It imports the standard library only, so that the renderer needs no torch. It offers the lists of
cells (`flower`, `fedml`, `engines`, `transports`), the tox environments (`environments`), and what
is expected of a cell that must not train (`refusals`).
"""
