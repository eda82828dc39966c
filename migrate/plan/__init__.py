"""Plans: many moves, and what may leave a host that must be emptied, in a YAML file.

    tree.py     YAML text or a JSON object as a tree that knows where each thing is written; bounded
    kinds.py    the kinds of values: how each is read, and what is wrong with one
    schema.py   every key with its kind, default and meaning: one table, of which docs/plans.md is made
    model.py    what a plan is once it is read
    parse.py    tree + schema -> plan, or all that is wrong with it
    write.py    the way back: a plan as an object that reads as the same plan
    apply.py    checks and carries out the moves of a plan
    drain.py    watches an agent empty its host
    outcome.py  what came of each, and of all of them together
    show.py     how a person sees that
    command.py  what the commands have in common

The agent reads plans too, when it is asked to empty its host (`agent/server/drain.py`).
"""
