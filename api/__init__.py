"""The roof: HTTP, command line, and the composition root that starts a head and its workers."""
