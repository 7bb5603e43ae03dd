"""The reproduction scorecard: every claim of both papers as data, judged from the runs that are kept."""
