"""The ground floor: ids, block pool, prefix cache and directory (pure), page pool (torch).

It knows layer ranges and workers, never stages, requests or HTTP.
"""
