"""Attention kernels and the layouts they can read. Imports nothing of ours but `kvarena.errors`."""
