"""One file per kind of thing a process owns: its state, how it is captured and rebuilt, why it may be refused."""
