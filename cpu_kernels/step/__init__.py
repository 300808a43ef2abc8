"""The compiled step: a list of operations that one team of threads performs in one call.

`program` holds the list and its memory, `run` performs it; each other module is one kind of operation: its named call
vector, its worker and the function that adds it. `emit` turns the description of a model (`parts`) into a program.
"""
