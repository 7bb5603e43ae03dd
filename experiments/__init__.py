"""One module per experiment: takes a config, returns tidy frames, draws its figure."""
