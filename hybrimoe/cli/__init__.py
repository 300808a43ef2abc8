"""The command line: one module a command, each with `register(app)`; `app` finds and loads them on demand."""
