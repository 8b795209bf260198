"""Which layout to serve with: devices, what a step costs on them, traffic, and the planner. Everything here is pure."""
