"""The parts that `experiments.benchmark` times, each in a process of its own."""
