"""Everything that needs a GPU, run in one go: `./run.sh gpu-validation --out DIR`."""
