"""The regression gate: `./run.sh regression` says whether a change costs memory or speed (docs/regression.md)."""
