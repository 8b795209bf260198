"""The scheduler, the planner and the reconfiguration over simulated devices, network and clock. Everything here is pure."""
