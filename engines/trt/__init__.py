"""TensorRT engines: bounds and profiles, the build in a process of its own, and what was read back from the network."""
