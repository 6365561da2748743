"""Child processes of a test: started, watched, killed, and certainly ended.

It imports the core, and no framework. It offers programs with logs (`supervisor`), runs that are
killed on purpose (`killed_runs`), a proxy that counts bytes (`wiretap`), and a search of what left
a client (`canaries`) for what it keeps private (`kept_private`).
"""
