"""The commands, one module each: `add` lists the options, `run` carries it out and imports what it needs."""
