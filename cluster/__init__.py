"""Where the work runs; imports no other package of the project."""
