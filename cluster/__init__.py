"""Running on a cluster: connecting to Ray, submitting jobs, checking nodes; imports no other package of the project."""
