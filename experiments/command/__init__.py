"""What `./run.sh` runs: the command line, multiruns, folders, claims and the report."""
