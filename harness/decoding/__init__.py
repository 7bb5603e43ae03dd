"""How a request's tokens are chosen: greedily, n samples in parallel, or a beam; one idea a file."""
