"""Virtual-memory drivers: reserve addresses, create physical page-groups, map the one onto the other."""
