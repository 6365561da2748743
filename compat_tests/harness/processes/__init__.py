"""Child processes of a test: started, watched, killed, and certainly ended.

It imports the public faces of the core, and no framework. It offers programs with logs
(`supervisor`), runs that are killed on purpose (`killed_runs`), a proxy that counts bytes
(`wiretap`), and a search for tensors in bytes (`wire_search`).
"""
