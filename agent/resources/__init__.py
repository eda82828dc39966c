"""One file per kind of thing a process owns: its state, its capture and rebuilding, why it may be refused."""
