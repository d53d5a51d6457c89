"""The command line: options that all commands share, tables, and the commands of the engine."""
