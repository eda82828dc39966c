"""The agent as a service: an HTTP API on a unix socket that `migrate` and everybody else drives it by.

    connect.py   `migrate-agent connect`: standard input and output as a connection to the service, which it
                 starts if need be
    service.py   `migrate-agent serve`: one a host and user, from its lock to its end
    routes.py    what it answers to, one table; openapi.py makes the document of that and of agent/api.py
    registry.py  the migrations that run, and those that ran (store.py keeps them in files)
    migration.py one migration: its events, its readers, what happens when nobody watches
    front.py     the process that carries it out, and a true report if that dies

No page of memory passes through here: each migration is a process of its own (`migrate-agent source`).
"""
