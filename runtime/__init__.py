"""What runs on a worker: layout and messages (pure), the model, attention, sampling, the stage and the RPC door."""
