"""What became of the requests of a trace, and what a run says of it: read, dropped, cut, repeated, refused, served."""
