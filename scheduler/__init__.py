"""What decides: requests, batching, membership, the pure state machine and its thin asyncio driver."""
